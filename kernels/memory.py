"""Memory for what many layers have, in one piece."""

from __future__ import annotations

import mmap

import torch


def aligned(count: int) -> int:
    """So many elements, of two bytes or more, or a few more: whole lines of the cache."""
    return count + -count % 32


def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory the system gives when they are written, in huge pages: most banks are never full."""
    memory = mmap.mmap(-1, count * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
