"""Linear layers of a few rows: every weight is read once, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from skipc.kernels.library import library

# More rows are bound by arithmetic, where a blocked matrix product wins (oneDNN's for bf16, earlier).
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 8}

library.define("skinny_linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor")


def skinny_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """``cat([x @ w.T + b for each weight], dim=-1)`` without a copy of the weights.

    Args:
        x: ``[..., k]``, fp32 or bf16, contiguous; few rows.
        weights: ``[n_i, k]`` each, of the dtype of ``x``, rows contiguous.
        biases: one for each weight, ``[n_i]`` or None.

    Returns:
        ``[..., sum(n_i)]``, summed in fp32 and rounded once. A row's result does not depend on the other rows.
    """
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


library.impl("skinny_linear", skinny_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::skinny_linear")
def _(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))
