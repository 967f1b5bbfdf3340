"""What tests of Triton kernels share: a GPU, adapters in slots, and fp64 beside them.

The GPU is simulated: tensors are on the CPU, and Triton's interpreter runs the kernels. With ``SKIPC_TEST_DEVICE=cuda``
the same tests run on a real one (``benchmarks/gpu_check.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from skipc.kernels.device import simulated
from skipc.kernels.lora import pack
from skipc.kernels.memory import aligned

DEVICE = os.environ.get("SKIPC_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def a_gpu() -> Iterator[None]:
    """Tensors that are made in here are on it."""
    if DEVICE == "cpu":
        with simulated():
            yield
        return
    torch.set_default_device(DEVICE)
    try:
        yield
    finally:
        torch.set_default_device(None)


def slots_of(k: int, n: int, ranks: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """The four operands of a layer whose slots hold random adapters of these ranks, with NaN between them."""
    where, memory, at = torch.zeros(len(ranks), 4, dtype=torch.int64), [], 0
    where[:, 3] = max(*ranks, 1)
    for slot, rank in enumerate(ranks):
        where[slot, 0] = rank
        for which, matrix in enumerate((torch.randn(rank, k) / k**0.5, pack(torch.randn(n, rank)))):
            flat = matrix.flatten().to(dtype)
            where[slot, 1 + which] = at
            memory += [flat, torch.full((aligned(len(flat)) - len(flat),), torch.nan, dtype=dtype)]
            at += aligned(len(flat))
    joined = torch.cat([*memory, torch.full((32,), torch.nan, dtype=dtype)])
    return [joined, joined, where, torch.rand(len(ranks)) + 0.5]


def table_of(wanted: Sequence[Sequence[int]], tokens: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Table and gates of groups that want these slots, with rubbish behind them."""
    groups, per = len(wanted), len(wanted[0]) if wanted else 0
    table, gates = torch.full((2 + groups * per + 40,), 10**6), torch.full((2 + groups * per + 40,), torch.nan)
    table[:2] = torch.tensor([-groups if tokens else groups, per])
    table[2 : 2 + groups * per] = torch.tensor(wanted, dtype=torch.int64).flatten()
    gates[2 : 2 + groups * per] = torch.randn(groups * per)
    return table, gates


def in_double(values: Sequence[Any]) -> list[Any]:
    """Floating tensors in fp64; the rest as it is."""
    return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def assert_close(made: torch.Tensor, truth: torch.Tensor, eager: torch.Tensor, factor: float = 2.0) -> None:
    """No further from fp64 than torch in the same dtype, times 2, and one rounding of the largest value."""
    assert made.shape == truth.shape
    assert torch.isfinite(made).all()
    if not truth.numel():
        return
    slack = 2 * torch.finfo(made.dtype).eps * max(1.0, truth.abs().max().item())
    allowed = factor * (eager.double() - truth).abs().max().item() + slack
    assert (made.double() - truth).abs().max().item() <= allowed
