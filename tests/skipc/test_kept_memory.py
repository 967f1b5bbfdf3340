"""Freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipc.calibration.kept_memory import kept_memory

_SIZE, _COUNT = 16 << 20, 8
_BYTES = _SIZE * _COUNT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone is told to keep memory"
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def use_buffers() -> None:
    """Write to some at once, and free them."""
    buffers = [torch.empty(_SIZE, dtype=torch.uint8).fill_(1) for _ in range(_COUNT)]
    del buffers


@pytest.mark.parametrize("check", ["kept_used_again_and_given_back", "given_back_after_an_error"])
def test_memory_is(check: str) -> None:
    """In a process of its own, whose heap has no free memory from before."""
    command = [sys.executable, "-c", f"from tests.skipc import test_kept_memory as t; t.{check}()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def kept_used_again_and_given_back() -> None:
    use_buffers()
    before = resident()
    with kept_memory():
        use_buffers()
        kept = resident()
        assert kept > before + _BYTES / 2
        before_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(9):
            use_buffers()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before_faults
        assert faults < 9 * _BYTES / 4096 / 10, "buffers are not used again"
        assert resident() < before + 3 * _BYTES, "it grows from use to use"
    assert resident() < kept - _BYTES / 2


def given_back_after_an_error() -> None:
    seen: list[int] = []

    @kept_memory()
    def failing() -> None:
        use_buffers()
        seen.append(resident())
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        failing()
    assert resident() < seen[0] - _BYTES / 2
