"""Rounding to the dtype of a tensor, on a GPU and in Triton's interpreter alike."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from skipc.kernels.device import simulating


def by_hand(dtype: torch.dtype) -> bool:
    """Whether kernels must round to ``dtype`` themselves: the interpreter cuts the bits off that bf16 has no room
    for."""
    return dtype == torch.bfloat16 and simulating()


def widens(dtype: torch.dtype) -> bool:
    """Whether operands of a matrix product must be cast to fp32 before it: the interpreter multiplies bf16 wrongly."""
    return dtype == torch.float32 or by_hand(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """fp32 ``x`` as the nearest number of ``dtype``, of two the even one."""
    if BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
