"""Norms of rows (RMSNorm, Zhang and Sennrich, arXiv 1910.07467; LayerNorm, Ba et al., arXiv 1607.06450), alone and with
the residual addition before them."""

from __future__ import annotations

import torch
from skipc.kernels.library import library
from skipc.kernels.similarity import stream_moments

KINDS = ("rms", "layer")

_NORM = "Tensor? weight, Tensor? bias, float eps, str kind, float weight_offset"
library.define(f"norm_rows(Tensor x, {_NORM}) -> Tensor")
library.define(f"add_norm(Tensor x, Tensor branch, {_NORM}, float scale) -> (Tensor, Tensor, Tensor)")


def norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """A norm of each row, computed in fp32 and rounded once.

    Args:
        x: ``[..., width]``, floating.
        weight, bias: ``[width]``, floating; or None.
        eps: added to the mean of squares.
        kind: ``rms``: rows are divided by the root of their mean square; ``layer``: after their mean was taken off.
        weight_offset: added to the weight (1 for Gemma's, whose weights are what is more than one).
    """
    rows = x if x.dtype == torch.float64 else x.float()
    if kind == "layer":
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        rows = rows * (weight.to(rows.dtype) + weight_offset)
    return (rows if bias is None else rows + bias.to(rows.dtype)).to(x.dtype)


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    weight_offset: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a residual stream is after a sublayer, what the next one gets, and how far the two points are apart.

    Args:
        x: the stream, ``[..., width]``, floating.
        branch: what the sublayer made, of the same shape and dtype.
        weight, bias, eps, kind, weight_offset: of the norm; see :func:`norm_rows`.
        scale: of the branch.

    Returns:
        ``x + scale * branch``, computed in fp32 and rounded once; its norm; and :func:`stream_moments` of ``x`` and the
        sum, as it was rounded, fp32 ``[..., 3]``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = (x.to(wide) + scale * branch.to(wide)).to(x.dtype)
    return total, norm_rows(total, weight, bias, eps, kind, weight_offset), stream_moments(x, total)


library.impl("norm_rows", norm_rows, "CompositeExplicitAutograd")
library.impl("add_norm", add_norm, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::norm_rows")
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("skipc::add_norm")
def _(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)
