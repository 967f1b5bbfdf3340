"""Which kernels a tensor is for. Knows nothing of Triton, which is imported when a kernel is launched."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch for Windows comes without
_simulated: ContextVar[str | None] = ContextVar("simulated", default=None)


@contextmanager
def simulated(arch: str = "sm_90") -> Iterator[None]:
    """Tensors on the CPU are taken to be on a GPU of this architecture: models are compiled as for one, and Triton's
    interpreter runs the kernels. Slow, and exact: for tests."""
    from skipc.kernels.gpu.ops import on_cpu_too

    token = _simulated.set(arch)
    try:
        with on_cpu_too():
            yield
    finally:
        _simulated.reset(token)


def simulated_arch() -> str | None:
    """The architecture that tensors on the CPU are taken to be on, if any."""
    return _simulated.get()


def simulating() -> bool:
    """Whether tensors on the CPU are taken to be on a GPU."""
    return _simulated.get() is not None


def on_gpu(t: torch.Tensor) -> bool:
    """Whether Triton kernels take ``t``. (On the ``meta`` device launches are noted, and nothing runs.)"""
    return HAS_TRITON and (t.is_cuda or t.is_meta or (t.device.type == "cpu" and simulating()))


def wait_for(device: torch.device) -> Callable[[], None]:
    """What to call before reading the clock."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def on_cpu(t: torch.Tensor) -> bool:
    """Whether native kernels take ``t``."""
    return t.device.type == "cpu" and not simulating()
