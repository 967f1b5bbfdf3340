"""Counters that kernels use between their phases: one set for each stream, since launches of a stream come one after
the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

COUNTERS = 1 << 16
_of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_private: ContextVar[torch.Tensor | None] = ContextVar("private", default=None)


def counters(t: torch.Tensor) -> torch.Tensor:
    """Counters of :mod:`skipc.kernels.gpu.phases` for launches on the current stream of the device of ``t``: int32
    ``[COUNTERS]``, all zero between launches.

    Raises:
        RuntimeError: while a graph is captured that has none of its own.
    """
    private = _private.get()
    if private is not None:
        return private
    if not t.is_cuda:
        return torch.zeros(COUNTERS, dtype=torch.int32, device=t.device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a graph may run beside the stream that it was captured on: capture it in own_counters()")
    key = t.device, torch.cuda.current_stream(t.device).cuda_stream
    if key not in _of_stream:
        _of_stream[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=t.device)
    return _of_stream[key]


@contextmanager
def own_counters(device: torch.device) -> Iterator[torch.Tensor]:
    """Launches in here have counters of their own, which whoever captures them must keep."""
    made = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    token = _private.set(made)
    try:
        yield made
    finally:
        _private.reset(token)
