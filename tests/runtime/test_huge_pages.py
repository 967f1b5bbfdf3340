"""Weights in huge pages: which pages, who may say no, and that nothing but their place changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.runtime import huge_pages, program
from skipc.runtime.huge_pages import back_with_huge_pages

import skipc
from tests.harness import STRICT, run_regions_uncompiled
from tests.models.zoo import HandWritten, ids

MB = 1 << 20


class Memory:
    """A tensor at a place in memory, as far as the module looks at one."""

    device, layout = torch.device("cpu"), torch.strided

    def __init__(self, start: int, size: int):
        self.start, self.size = start, size

    def untyped_storage(self) -> Memory:
        return self

    def data_ptr(self) -> int:
        return self.start

    def nbytes(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("tensors", "pages"),
    [
        ([], []),
        ([Memory(4 * MB, 2 * MB)], [2]),
        ([Memory(4 * MB, MB)], []),
        ([Memory(4 * MB, MB + 1)], [2]),
        ([Memory(3 * MB, 6 * MB)], [2, 3]),
        ([Memory(3 * MB + 512, 6 * MB)], [2, 3, 4]),
        ([Memory(4 * MB, MB), Memory(5 * MB, MB // 2)], [2]),
        ([Memory(4 * MB, MB), Memory(4 * MB, MB)], []),
        ([Memory(4 * MB, 0)], []),
    ],
)
def test_pages_that_mostly_belong_to_the_tensors(tensors: Any, pages: list[int]) -> None:
    assert sorted(huge_pages._pages(huge_pages._storages(tensors))) == pages


def test_contents_stay() -> None:
    tensors = [torch.randn(3_000_000), torch.randn(10), torch.empty(0), torch.ones(900, 1000, dtype=torch.bfloat16)]
    before = [t.clone() for t in tensors]
    moved = back_with_huge_pages([*tensors, tensors[0][5:], torch.empty(9, device="meta"), torch.eye(3).to_sparse()])
    assert moved % (2 * MB) == 0
    assert all(map(torch.equal, tensors, before))
    if huge_pages.unavailable() is not None:
        assert moved == 0


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_machine_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None) -> None:
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTING", file)
    assert huge_pages.unavailable() is not None
    assert back_with_huge_pages([torch.randn(3_000_000)]) == 0


@pytest.mark.skipif(not huge_pages._USAGE.exists(), reason="the system does not tell what is shared")
def test_memory_shared_with_another_process_stays_shared() -> None:
    weights = torch.randn(3_000_000)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, str(back_with_huge_pages([weights])).encode())
        os._exit(0)
    assert os.read(ours, 20) == b"0"
    os.waitpid(child, 0)
    if huge_pages.unavailable() is None:
        assert huge_pages._shared() < weights.nbytes


@pytest.mark.parametrize("wanted", [True, False])
def test_the_option(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(program, "back_with_huge_pages", lambda tensors: seen.extend(tensors))
    run_regions_uncompiled(monkeypatch)
    model = HandWritten().eval()
    with torch.no_grad():
        skipc.compile(model, huge_pages=wanted, **STRICT)(ids())
    assert {id(p) for p in seen} == ({id(p) for p in model.parameters()} if wanted else set())
