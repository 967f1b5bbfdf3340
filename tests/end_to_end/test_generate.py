"""Hugging Face generation, through the handle and through the model's own compile config."""

from __future__ import annotations

import copy

import pytest
import torch
from skipc.runtime import registry
from transformers import CompileConfig

import skipc
from tests.harness import STRICT, eager_skip
from tests.models.zoo import ZOO

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def compilations() -> int:
    return sum(registry._compiled.values())


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_handle_generates_the_same_tokens_and_compiles_once(cache: str) -> None:
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, **STRICT)
    prompt = torch.randint(3, 90, (2, 7))
    expected = model.generate(prompt, cache_implementation=cache, **GREEDY)
    before = compilations()
    assert torch.equal(compiled.generate(prompt, cache_implementation=cache, **GREEDY), expected)
    first = compilations()
    assert first > before
    assert torch.equal(compiled.generate(prompt, cache_implementation=cache, **GREEDY), expected)
    assert compilations() == first
    assert "forward" not in model.__dict__, "the model was changed"


def test_handle_generates_under_a_session() -> None:
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, **STRICT)
    prompt = torch.randint(3, 90, (1, 7))
    skip = {"model.layers.1.mlp"}
    with eager_skip(model, skip):
        expected = model.generate(prompt, cache_implementation="static", **GREEDY)
    with compiled.session(skip=skip) as session:
        assert torch.equal(compiled.generate(prompt, cache_implementation="static", **GREEDY), expected)
        assert session.stats().skipped == {"model.layers.1.mlp": 6}


def test_compile_config_deepcopies_and_compiles_once() -> None:
    model = ZOO["llama"].build()
    config = CompileConfig(backend="skipc", mode=None, options={"on_error": "raise"})
    config._compile_all_devices = True
    assert copy.deepcopy(config).to_dict()["options"] == {"on_error": "raise"}
    prompt = torch.randint(3, 90, (1, 7))
    expected = model.generate(prompt, cache_implementation="static", disable_compile=True, **GREEDY)
    counts = []
    for _ in range(2):
        before = compilations()
        found = model.generate(prompt, cache_implementation="static", compile_config=copy.deepcopy(config), **GREEDY)
        counts.append(compilations() - before)
        assert torch.equal(found, expected)
    assert counts[0] >= 1
    assert counts[1] == 0


def test_encoder_decoder_generates() -> None:
    model = ZOO["t5"].build()
    compiled = skipc.compile(model, **STRICT)
    prompt = torch.randint(3, 90, (1, 7))
    skip = {"decoder.block.0.layer.2.DenseReluDense"}
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(compiled.generate(prompt, **GREEDY), expected)
    with eager_skip(model, skip):
        expected = model.generate(prompt, **GREEDY)
    with compiled.session(skip=skip):
        assert torch.equal(compiled.generate(prompt, **GREEDY), expected)
