"""Options: frozen, checked, equal by value."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from pydantic import ValidationError

import skipc


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(skipc.ConfigError, match=r"unknown option 'presets' \(did you mean 'preset'\?\)"):
        skipc.Config(presets="exact")


@pytest.mark.parametrize(
    "bad", [{"preset": "fastest"}, {"kv": "keep"}, {"on_error": 3}, {"disable_passes": "remove_noops"}]
)
def test_bad_values_name_the_option(bad: dict[str, object]) -> None:
    with pytest.raises(skipc.ConfigError, match=next(iter(bad))):
        skipc.Config(**bad)


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_presets_that_need_a_profile_say_so(preset: str) -> None:
    with pytest.raises(skipc.ConfigError, match="takes its plan from a profile"):
        skipc.Config(preset=preset)
    with pytest.raises(skipc.ConfigError, match="needs lowering='outline'"):
        skipc.Config(preset=preset, profile="somewhere", lowering="cond")
    with pytest.raises(skipc.ConfigError, match="'profile' is for presets"):
        skipc.Config(profile="somewhere")
    assert skipc.Config(preset=preset, profile=Path("somewhere")).profile == "somewhere"


def test_frozen_equal_hashable_copyable() -> None:
    config = skipc.Config(inductor={"max_autotune": False}, disable_passes=["remove_noops"])
    assert config == skipc.Config(inductor={"max_autotune": False}, disable_passes=("remove_noops",))
    assert hash(config) == hash(copy.deepcopy(config))
    assert skipc.Config(**config.model_dump()) == config
    assert config.cache_key() != skipc.Config().cache_key()
    with pytest.raises(ValidationError):
        config.preset = "off"  # type: ignore[misc]


def test_list_options_tells_all() -> None:
    assert list(skipc.list_options()) == list(skipc.Config.model_fields)
    assert "'exact' | 'balanced' | 'fast' | 'off'" in skipc.list_options()["preset"]


def test_every_public_name_resolves() -> None:
    for name in skipc.__all__:
        assert getattr(skipc, name) is not None
