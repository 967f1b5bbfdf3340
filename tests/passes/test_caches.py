"""Inductor's caches: what one process compiled is not compiled again by the next, unless skipc has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.passes.lowering import inductor
from torch._dynamo.utils import counters

import skipc
from tests.harness import STRICT


class Block(torch.nn.Module):
    """A residual MLP of as many rows as torch keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = torch.nn.Linear(24, 40), torch.nn.LayerNorm(24), torch.nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.second(torch.relu(self.first(self.norm(x))))
        return x * 2


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.no_grad():
        yield


def found() -> dict[str, int]:
    """Hits and misses of a compilation in what is, but for caches, a new process."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    compiled = skipc.compile(Block().eval(), fullgraph=True, **STRICT)
    compiled(torch.randn(40, 24))
    seen: Any = counters["inductor"]
    return {key: seen[f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")}


def test_regions_are_found_again() -> None:
    first = found()
    assert first["miss"] > 0
    assert first["bypass"] == 0
    assert found() == {"hit": first["miss"], "miss": 0, "bypass": 0}


def test_another_skipc_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    monkeypatch.setattr(inductor, "source_tag", lambda: "other code")
    assert found() == first


def test_caches_can_be_carried_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found()
    artifacts = torch.compiler.save_cache_artifacts()
    assert artifacts is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    torch.compiler.load_cache_artifacts(artifacts[0])
    assert found() == {"hit": first["miss"], "miss": 0, "bypass": 0}


def test_the_tag_says_what_code_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tag = inductor.source_tag.__wrapped__()
    assert tag == inductor.source_tag.__wrapped__()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b" " if self.name == "lora.py" else b""))
    assert inductor.source_tag.__wrapped__() != tag
