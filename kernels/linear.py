"""Linear layers of a few rows, and gated MLPs made of them: every weight is read once, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from skipc.kernels import native
from skipc.kernels.library import library
from skipc.kernels.lora import Lora, add_lora

MOST_ROWS = 16  # that one launch on a GPU takes

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2}


def max_rows(dtype: torch.dtype) -> int:
    """How many rows the native kernels take. More are bound by arithmetic, where a blocked matrix product wins
    (oneDNN's for bf16, earlier, unless both have tile registers)."""
    return 8 if dtype == torch.bfloat16 and not native.tiles() else 16


library.define(
    "skinny_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm, float eps, Tensor? residual, "
    "Tensor?[] lora) -> Tensor"
)
library.define(
    "gated_mlp(Tensor x, Tensor? norm, float eps, Tensor gate, Tensor? up, Tensor down, int activation, "
    "Tensor? residual, Tensor?[] lora) -> Tensor"
)


def _normed(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.float() if norm is None else F.rms_norm(x.float(), x.shape[-1:], norm.float(), eps)


def _adapted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Lora, at: int) -> torch.Tensor:
    return _add_rows(F.linear(x, weight.float(), bias), x, lora, at)


def _add_rows(out: torch.Tensor, x: torch.Tensor, lora: Lora, at: int) -> torch.Tensor:
    add_lora(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), lora, at)
    return out


def skinny_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    lora: Lora = (),
) -> torch.Tensor:
    """``cat([rms_norm(x) @ w.T + b for each weight], dim=-1) + residual`` without a copy of the weights.

    Args:
        x: ``[..., k]``, fp32 or bf16, contiguous; few rows.
        weights: ``[n_i, k]`` each, of the dtype of ``x``, rows contiguous.
        biases: one for each weight, ``[n_i]`` or None.
        norm: weight ``[k]`` of an RMS norm of ``x`` (Zhang and Sennrich, arXiv 1910.07467); None for no norm.
        eps: of the norm.
        residual: added, ``[..., sum(n_i)]``, contiguous; or None.
        lora: adapters of the weights, of their dtype; see :mod:`skipc.kernels.lora`.

    Returns:
        ``[..., sum(n_i)]``, computed in fp32 and rounded once; natively in bf16 on CPUs with tile registers, the normed
        rows are rounded, too. A row's result does not depend on the other rows.
    """
    rows = _normed(x, norm, eps)
    parts = [
        _adapted(rows, w, None if b is None else b.float(), lora, i)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True))
    ]
    out = torch.cat(parts, dim=-1)
    return (out if residual is None else out + residual.float()).to(x.dtype)


def gated_mlp(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    activation: int,
    residual: torch.Tensor | None,
    lora: Lora = (),
) -> torch.Tensor:
    """``(act(h @ gate.T) * (h @ up.T)) @ down.T + residual`` with ``h = rms_norm(x)`` (Shazeer, arXiv 2002.05202).

    Args:
        x, norm, eps, residual: as in :func:`skinny_linear`.
        gate, up: ``[inner, k]``; or ``gate`` is both, one below the other, ``[2 * inner, k]``, and ``up`` is None.
        down: ``[n, inner]``.
        activation: a value of :data:`ACTIVATIONS`.
        lora: adapters of gate, up and down.

    Returns:
        ``[..., n]``, computed in fp32 and rounded once; in tile registers, what each layer reads is rounded, too.
    """
    rows = _normed(x, norm, eps)
    if up is None:  # computed like two weights, so that both forms give the same bits
        both = torch.cat([F.linear(rows, w.float()) for w in gate.chunk(2)], -1)
        gates, ups = (half.contiguous() for half in _add_rows(both, rows, lora, 0).chunk(2, dim=-1))
    else:
        gates, ups = (_adapted(rows, w, None, lora, i) for i, w in enumerate((gate, up)))
    acts = (F.silu(gates), F.gelu(gates, approximate="tanh"), F.relu(gates))
    out = _adapted(acts[activation] * ups, down, None, lora, 2)
    return (out if residual is None else out + residual.float()).to(x.dtype)


library.impl("skinny_linear", skinny_linear, "CompositeExplicitAutograd")
library.impl("gated_mlp", gated_mlp, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::skinny_linear")
def _(x: torch.Tensor, weights: list[torch.Tensor], *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))


@torch.library.register_fake("skipc::gated_mlp")
def _(*args: torch.Tensor) -> torch.Tensor:
    x, down = args[0], args[5]
    return x.new_empty(*x.shape[:-1], down.shape[0])
