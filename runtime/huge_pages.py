"""Weights in huge pages. A decode step reads all of them; with pages of 4 KB, looking pages up takes a fifth of it.

Linux only. Nothing but the placement in memory changes, for the model as a whole, whoever runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

log = logging.getLogger("skipc")

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_USAGE = Path("/proc/self/smaps_rollup")
_PAGE = 2 << 20
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, from Linux 6.1 on


def unavailable() -> str | None:
    """Why this machine has no huge pages to give, if so."""
    if not sys.platform.startswith("linux"):
        return "huge pages are advised on Linux only"
    try:
        setting = _SETTING.read_text()
    except OSError:
        return "the kernel has no transparent huge pages"
    return "transparent huge pages are switched off" if "[never]" in setting else None


def back_with_huge_pages(tensors: Iterable[torch.Tensor]) -> int:
    """Ask for the memory of CPU tensors to be moved to huge pages, several in one where they lie side by side. Returns
    how many bytes were; what cannot be stays as it is."""
    storages = _storages(tensors)
    if unavailable() is not None or 2 * _shared() > sum(storages.values()):
        return 0  # moving what processes share (after a fork) would give each a copy of its own
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for page in _pages(storages):
        madvise(page * _PAGE, _PAGE, _ADVISE)
        moved += _PAGE * (madvise(page * _PAGE, _PAGE, _COLLAPSE) == 0)
    log.debug("%d MB of weights in huge pages", moved >> 20)
    return moved


def _shared() -> int:
    """Bytes of this process's own memory that other processes share with it."""
    with contextlib.suppress(OSError):
        for line in _USAGE.read_text().splitlines():
            if line.startswith("Shared_Dirty:"):
                return int(line.split()[1]) << 10
    return 0


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and size of the memory behind dense CPU tensors."""
    dense = (t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided)
    return {s.data_ptr(): s.nbytes() for s in dense}


def _pages(storages: dict[int, int]) -> list[int]:
    """Numbers of the pages of which more than half belong to ``storages``: little else becomes resident with them."""
    covered: Counter[int] = Counter()
    for start, size in storages.items():
        for page in range(start // _PAGE, -(-(start + size) // _PAGE)):
            covered[page] += min(start + size, (page + 1) * _PAGE) - max(start, page * _PAGE)
    return [page for page, count in covered.items() if 2 * count > _PAGE]
