"""Adapters folded into weights, of all layers of a model in one call (what AdaFuse's and V-LoRA's switch is, arXiv
2603.11873 and 2411.00915), always from the weights as they were: one adapter after the other and back gives the same
bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from skipc.kernels.library import library
from skipc.kernels.lora import Lora, matrices

library.define(
    "merge_lora(Tensor[] weights, Tensor(a!)[] merged, Tensor?[] lora, bool[] transposed, Tensor slots, "
    "Tensor factors) -> ()"
)


def merge_lora(
    weights: Sequence[torch.Tensor],
    merged: Sequence[torch.Tensor],
    lora: Lora,
    transposed: Sequence[bool],
    slots: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """For each weight write ``weight + sum of factor * scale * (b @ a)``, computed in fp32 and rounded once.

    Args:
        weights: ``[n, k]`` each, or transposed; contiguous, and of one dtype.
        merged: what is written, of the same shapes and dtypes.
        lora: adapters of the weights, four tensors each; see :mod:`skipc.kernels.lora`. No table and no gates.
        transposed: which of the weights are ``[k, n]``.
        slots: int64, those that are merged.
        factors: fp32, how much of each.
    """
    for i, (weight, out) in enumerate(zip(weights, merged, strict=True)):
        n, k = reversed(weight.shape) if transposed[i] else weight.shape
        total = weight.float()
        for slot, factor in zip(slots.tolist(), factors.tolist(), strict=True):
            if (found := matrices(lora, i, slot, k, n)) is not None:
                a, b, scale = found
                change = factor * scale * (b.float().T @ a.float())
                total = total + (change.T if transposed[i] else change)
        out.copy_(total)


library.impl("merge_lora", merge_lora, "CompositeExplicitAutograd")
