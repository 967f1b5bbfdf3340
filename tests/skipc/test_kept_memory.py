"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import resource
import sys

import pytest
import torch

from skipc.calibration.kept_memory import kept_memory

_BYTES = 64 << 20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told to keep memory"
)


def faults() -> int:
    """Of writing to a large buffer, the page faults."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(_BYTES, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_buffers_are_used_again() -> None:
    with kept_memory():
        faults()
        assert faults() < _BYTES / 4096 / 10


def test_memory_goes_back_afterwards() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with kept_memory():
        faults()
        before = resident()
    assert resident() < before - _BYTES / 2


def test_it_is_left_after_an_error() -> None:
    with pytest.raises(ValueError, match="mine"), kept_memory():
        raise ValueError("mine")
    faults()
    assert faults() > 10
