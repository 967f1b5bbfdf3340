"""Whole sublayers as one kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from skipc.kernels.attention import attention_reference
from skipc.kernels.library import library
from skipc.kernels.linear import skinny_linear
from skipc.kernels.lora import OPERANDS, Lora

library.define(
    "attention_block(Tensor x, Tensor? norm, float eps, Tensor[] projections, Tensor?[] biases, Tensor? q_norm, "
    "Tensor? k_norm, float head_eps, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor? mask, Tensor? live, bool causal, float scale, float softcap, Tensor out, Tensor? out_bias, "
    "Tensor? residual, Tensor?[] lora) -> Tensor"
)
library.define(
    "cache_block(Tensor x, Tensor? norm, float eps, Tensor[] projections, Tensor?[] biases, Tensor? k_norm, "
    "float head_eps, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor?[] lora) -> ()"
)
library.define(
    "copy_rows(Tensor from_keys, Tensor from_values, Tensor(a!) keys, Tensor(b!) values, Tensor position, int tokens) "
    "-> ()"
)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864) with halves turned against each other, as in GPT-NeoX.

    Args:
        x: ``[batch, heads, tokens, dim]``.
        cos, sin: ``[batch or 1, tokens or 1, width]``; the last ``dim - width`` elements of ``x`` stay as they are.
    """
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos.unsqueeze(1) + other * sin.unsqueeze(1), kept], dim=-1)


def split_heads(
    projected: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, ``[batch, heads, tokens, dim]``, of ``[batch, tokens, all]``, for a cache of as many
    heads. There may be no queries."""
    (_, key_heads, _, dim), v_dim = keys.shape, values.shape[-1]
    rows = projected.shape[-1] - key_heads * (dim + v_dim)
    sizes = [(rows // dim, dim), (key_heads, dim), (key_heads, v_dim)]
    parts = projected.split([rows, key_heads * dim, key_heads * v_dim], -1)
    q, k, v = (part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True))
    return q, k, v


def attention_block(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    projections: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    head_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    out: torch.Tensor,
    out_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    lora: Lora = (),
) -> torch.Tensor:
    """An attention sublayer over a cache that it first extends: norm, projections, rotation, attention, output, sum.

    Args:
        x: ``[batch, tokens, k]``, fp32 or bf16, contiguous; few rows.
        norm, eps: of an RMS norm of ``x``, as in :func:`skinny_linear`.
        projections, biases: as in :func:`skinny_linear`; what they make is all queries, then all keys, then all values.
        q_norm, k_norm: weights ``[dim]`` of RMS norms of each head's query and key, before rotation (as in Qwen 3);
            head_eps: of both.
        cos, sin: as in :func:`rotate`, or both None.
        keys, values: the cache, ``[batch, key_heads, length, dim]``; written at ``position``. If ``projections`` make
            keys of fewer heads, these are the first ones of the cache.
        position: int64, ``[]`` (where the first token goes) or ``[tokens]``.
        mask, live, causal, scale, softcap: as in :func:`attention_reference`.
        out, out_bias: ``[n, heads * dim]`` and ``[n]``.
        residual: added, ``[batch, tokens, n]``; or None.
        lora: adapters of the projections and of ``out``; see :mod:`skipc.kernels.lora`.

    Returns:
        ``[batch, tokens, n]``. Everything between ``x`` and what is written is computed in fp32.

    Raises:
        RuntimeError: for a position outside the cache (IndexError from the reference).
    """
    batch, tokens, _ = x.shape
    projected = skinny_linear(x.float(), [w.float() for w in projections], biases, _wide(norm), eps, None, lora)
    queries = out.shape[1] // values.shape[-1] * keys.shape[-1]
    keys, values = _of_heads(projected.shape[-1] - queries, keys, values)
    q, k, v = split_heads(projected, keys, values)
    _write(_turned(k, k_norm, head_eps, cos, sin), v, keys, values, position)
    q = _turned(q, q_norm, head_eps, cos, sin)
    mixed = attention_reference(q, keys, values, mask, live, causal, scale, softcap)
    rows = mixed.transpose(1, 2).reshape(batch, tokens, -1)
    last = lora[OPERANDS * len(projections) :]
    made = skinny_linear(rows, [out.float()], [_wide(out_bias)], residual=_wide(residual), lora=last)
    return made.to(x.dtype)


def cache_block(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    projections: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    k_norm: torch.Tensor | None,
    head_eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    lora: Lora = (),
) -> None:
    """What :func:`attention_block` writes to the cache, alone: what is left of a skipped attention whose keys and
    values later tokens attend to. ``projections`` make keys and values."""
    projected = skinny_linear(x.float(), [w.float() for w in projections], biases, _wide(norm), eps, None, lora)
    keys, values = _of_heads(projected.shape[-1], keys, values)
    _, k, v = split_heads(projected, keys, values)
    _write(_turned(k, k_norm, head_eps, cos, sin), v, keys, values, position)


def copy_rows(
    from_keys: torch.Tensor,
    from_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    tokens: int,
) -> None:
    """What a skipped attention keeps under ``kv="copy"``: the rows of another attention's cache at the same places.

    Args:
        from_keys, from_values, keys, values: ``[batch, heads, length, dim]``, fp32 or bf16; rows are contiguous.
        position: int64, the place of the first of ``tokens``, or ``[tokens]``, of each.
    """
    places = _places(position, tokens)
    for source, target in ((from_keys, keys), (from_values, values)):
        target.index_copy_(2, places, source.index_select(2, places))


def _of_heads(rows: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a cache that so many numbers of keys and values for each token go to."""
    heads = rows // (keys.shape[-1] + values.shape[-1])
    return keys.narrow(1, 0, heads), values.narrow(1, 0, heads)


def _turned(
    heads: torch.Tensor, norm: torch.Tensor | None, eps: float, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> torch.Tensor:
    if norm is not None:
        heads = torch.rms_norm(heads, heads.shape[-1:], norm.float(), eps)
    return heads if cos is None or sin is None else rotate(heads, cos.float(), sin.float())


def _places(position: torch.Tensor, tokens: int) -> torch.Tensor:
    return position + torch.arange(tokens) if position.dim() == 0 else position


def _write(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
    places = _places(position, k.shape[2])
    keys.index_copy_(2, places, k.to(keys.dtype))
    values.index_copy_(2, places, v.to(values.dtype))


def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float()


library.impl("attention_block", attention_block, "CompositeExplicitAutograd")
library.impl("cache_block", cache_block, "CompositeExplicitAutograd")
library.impl("copy_rows", copy_rows, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::attention_block")
def _(*args: torch.Tensor) -> torch.Tensor:
    x, out = args[0], args[18]
    return x.new_empty(*x.shape[:-1], out.shape[0])


@torch.library.register_fake("skipc::cache_block")
@torch.library.register_fake("skipc::copy_rows")
def _(*args: torch.Tensor) -> None:
    return None


# Kernels that can be links of a chain: a region of one such call needs no compiler.
SUBLAYERS = frozenset(
    [
        torch.ops.skipc.attention_block.default,
        torch.ops.skipc.cache_block.default,
        torch.ops.skipc.copy_rows.default,
        torch.ops.skipc.gated_mlp.default,
        torch.ops.skipc.skinny_linear.default,
    ]
)
