"""Memory for what many layers have, in one piece."""

from __future__ import annotations

import contextlib
import mmap

import torch

_PAGE = 2 << 20  # a huge one


def aligned(count: int) -> int:
    """So many elements, of two bytes or more, or a few more: whole lines of the cache."""
    return count + -count % 32


def zeros(count: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Zeros. On the CPU the system gives their memory when they are written, in huge pages: most banks are never
    full."""
    if count * dtype.itemsize < _PAGE or (device is not None and device.type != "cpu"):
        with torch.inference_mode(False):  # else nobody outside it could write them
            return torch.zeros(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory, which is the default, gets no huge pages
    memory = mmap.mmap(-1, count * dtype.itemsize + _PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):
        first = torch.frombuffer(memory, dtype=torch.uint8)
        start = -first.data_ptr() % _PAGE
        return first[start : start + count * dtype.itemsize].view(dtype)
