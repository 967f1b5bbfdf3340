"""Attention with shared key heads over the live part of a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skipc.kernels import native
from skipc.kernels.device import on_gpu
from skipc.kernels.library import library

_STRETCH = 512  # queries of a long prompt that are looked at together
MAX_ROWS = 64  # queries of one key head (groups times tokens) that the native kernel takes; more go to torch's own

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? live, bool causal, float scale, float softcap) -> Tensor"
)
library.define("grouped_attention" + _SCHEMA)
library.define("decode_attention" + _SCHEMA)


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Softmax attention in which ``heads // key_heads`` query heads share each key head.

    Args:
        q: ``[batch, heads, queries, k_dim]``, fp32 or bf16.
        k, v: ``[batch, key_heads, keys, k_dim or v_dim]``, never repeated in memory.
        mask: boolean (True: attend) or additive, broadcastable to ``[batch, heads, queries, keys]``.
        live: int64 ``[batch or 1, 2]``, the first and one past the last key that any query of a row may see, as made
            by :func:`live_range`; keys outside are not read.
        causal: query ``i`` sees keys up to ``i``.
        scale: factor of the scores. softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2,
            arXiv 2408.00118, section 2); 0 for none.

    Returns:
        ``[batch, heads, queries, v_dim]``, stored as ``[batch, queries, heads, v_dim]``. A query that may see no key
        gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    scores = q.unflatten(1, (k.shape[1], groups)).float() @ k.unsqueeze(2).float().transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.flatten(1, 2)
    keys = torch.arange(k.shape[2], device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(keys > torch.arange(q.shape[2], device=q.device)[:, None], -torch.inf)
    if live is not None:
        outside = (keys < live[:, :1]) | (keys >= live[:, 1:])
        scores = scores.masked_fill(outside[:, None, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0).unflatten(1, (k.shape[1], groups))
    out = (weights @ v.unsqueeze(2).float()).flatten(1, 2).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """The same for any number of queries: a kernel of skipc's for few, torch's own, on the live keys, for many. (On a
    GPU on all keys: which are live, the host would have to wait for.)"""
    queries = q.shape[2]
    if q.shape[1] // k.shape[1] * queries <= MAX_ROWS and (on_gpu(q) or native.available() is None):
        out: torch.Tensor = torch.ops.skipc.decode_attention(q, k, v, mask, live, causal, scale, softcap)
        return out
    if on_gpu(q):
        return attend(q, k, v, mask, causal, scale, softcap)
    if live is not None:
        k, v, mask = _narrowed(live, k, v, mask)
    each = mask is not None and mask.dim() == 4 and mask.shape[2] == queries  # has the mask a row for each query?
    if mask is None or live is None or causal or not each or queries < 2 * _STRETCH:
        return attend(q, k, v, mask, causal, scale, softcap)
    # Under a causal mask half of all scores are for nothing. A stretch of queries sees fewer keys than all of them.
    out = q.new_empty(q.shape[0], queries, q.shape[1], v.shape[-1]).transpose(1, 2)
    for i in range(0, queries, _STRETCH):
        few, theirs = slice(i, i + _STRETCH), mask[:, :, i : i + _STRETCH]
        out[:, :, few] = attend(q[:, :, few], *_narrowed(live_range(theirs), k, v, theirs), False, scale, softcap)
    return out


def _narrowed(
    live: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    start, stop = int(live[:, 0].min()), int(live[:, 1].max())
    if start >= stop:
        start, stop = 0, 1  # no query sees a key: their mask says so for the first one, too
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., start:stop]
    return k[:, :, start:stop], v[:, :, start:stop], mask


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """The same over all keys, by torch's own attention where it can."""
    if softcap:
        return attention_reference(q, k, v, mask, None, causal, scale, softcap)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


library.impl("grouped_attention", grouped_attention, "CompositeExplicitAutograd")
library.impl("decode_attention", attention_reference, "CompositeExplicitAutograd")


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


torch.library.register_fake("skipc::grouped_attention", _fake)
torch.library.register_fake("skipc::decode_attention", _fake)


def live_range(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets any query see anything: int64 ``[batch, 2]``, first key and one past the last.

    Args:
        mask: ``[batch, heads, queries, keys]``, boolean or additive. A forbidden key is one at or below half of the
            dtype's lowest value: its weight is exactly 0 beside any allowed one. A query without any allowed key
            averages all keys under an additive mask, so the range is then all of them; under a boolean mask it gets
            zeros, whatever the range.
    """
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    keys = torch.arange(mask.shape[-1], device=mask.device)
    seen = allowed.any(2).any(1)
    start = torch.where(seen, keys, mask.shape[-1]).amin(-1)
    stop = torch.where(seen, keys + 1, 0).amax(-1)
    if mask.dtype != torch.bool:
        blind = (~allowed.any(-1)).any(2).any(1)
        start, stop = torch.where(blind, 0, start), torch.where(blind, mask.shape[-1], stop)
    return torch.stack([start, stop], dim=-1)
