"""Attention over the live part of a cache, in one launch. Semantics: :mod:`skipc.kernels.attention`.

The queries of all heads that share a key head, token by token, are the rows of a tile, so that a key is read once for
all of them. A program goes through keys block by block, with the softmax made as it goes (FlashAttention, arXiv
2205.14135 and 2307.08691). Few rows leave most of a GPU idle, so ``SPLIT`` programs share the live keys of a tile, and
the one that is ready last adds up what they found, in the order of the keys whoever it is (flash-decoding, of the same
authors).

How many programs there are depends on the room in the cache alone. What is live is read on the device: a block of keys
goes to a program by its place among the live ones, and keys that are not live are never read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.phases import is_last
from skipc.kernels.gpu.rounding import by_hand, rounded, widens
from skipc.kernels.gpu.workspace import COUNTERS, counters
from skipc.kernels.tables import Choice

FEW = 64  # rows of a key head up to which a call is taken for one of decoding
MODEST = 16 << 10  # bytes of keys and values in a block that are not too many for any device's registers and memory
ALIGNED = 16  # places in a mask at whose multiples blocks begin


@triton.jit
def tanh(x):
    """To fp32's precision; not every device has one."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    away = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 * abs(x))
    large = (1 - away) / (1 + away)
    return tl.where(square < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def power_of(score, most):
    """``exp(score - most)``, and 0 for -inf whatever ``most``."""
    return tl.exp2((score - tl.maximum(most, -3.4028234663852886e38)) * 1.4426950408889634)


@triton.jit
def hidden(beyond):
    """-inf for positive integers, else 0, made of their signs: AMD has few registers for conditions."""
    return ((-beyond >> 31) & -0x800000).to(tl.float32, bitcast=True)


@triton.jit
def attention(
    q, q_batch, q_head, q_token, q_at, k, k_batch, k_head, k_key, k_at, v, v_batch, v_head, v_key, v_at,
    mask, mask_batch, mask_head, mask_token, mask_key, live, live_batch, live_end,
    out, planes, sync, key_heads, groups, tokens, keys, scale, softcap,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WIDEN: tl.constexpr, BY_HAND: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    rows = groups * tokens
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    key_head = tile // tiles % key_heads
    batch = (tile // tiles // key_heads).to(tl.int64)
    first_row = tile % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    there = row < rows
    row = tl.minimum(row, rows - 1)  # those behind the last are computed like it, and go nowhere
    token, head = row // groups, key_head * groups + row % groups
    at_k, at_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)

    start, stop = 0, keys
    if live is not None:
        start = tl.minimum(tl.maximum(tl.load(live + batch * live_batch), 0), keys).to(tl.int32)
        stop = tl.minimum(tl.maximum(tl.load(live + batch * live_batch + live_end), 0), keys).to(tl.int32)
    if CAUSAL:
        stop = tl.minimum(stop, tl.minimum(first_row + BLOCK_M - 1, rows - 1) // groups + 1)
    before = start // ALIGNED * ALIGNED
    blocks = tl.cdiv(tl.maximum(stop - before, 0), BLOCK_N)
    begin = before + split * blocks // SPLIT * BLOCK_N
    end = tl.minimum(before + (split + 1) * blocks // SPLIT * BLOCK_N, stop)

    queries = tl.load(
        q + batch * q_batch + token.to(tl.int64)[:, None] * q_token + head[:, None] * q_head + (at_k * q_at)[None, :],
        mask=(at_k < K_DIM)[None, :], other=0.0,
    )  # fmt: skip
    if WIDEN:
        queries = queries.to(tl.float32)
    k += batch * k_batch + key_head.to(tl.int64) * k_head + begin.to(tl.int64) * k_key
    v += batch * v_batch + key_head.to(tl.int64) * v_head + begin.to(tl.int64) * v_key
    places_k = (at_k * k_at)[:, None] + (tl.arange(0, BLOCK_N) * k_key)[None, :]
    places_v = (tl.arange(0, BLOCK_N) * v_key)[:, None] + (at_v * v_at)[None, :]
    if mask is not None:
        mask += batch * mask_batch
        mask_rows = mask + token.to(tl.int64) * mask_token + head.to(tl.int64) * mask_head

    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for block in range(begin, end, BLOCK_N):
        block = tl.multiple_of(block, ALIGNED)
        key = block + tl.arange(0, BLOCK_N)
        seen = (key >= start) & (key < stop)
        block_k = tl.load(k + places_k, mask=(at_k < K_DIM)[:, None] & seen[None, :], other=0.0)
        block_v = tl.load(v + places_v, mask=seen[:, None] & (at_v < V_DIM)[None, :], other=0.0)
        if WIDEN:
            block_k, block_v = block_k.to(tl.float32), block_v.to(tl.float32)
        scores = tl.dot(queries, block_k, input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * tanh(scores / softcap)
        if mask is not None:
            given = tl.load(mask_rows[:, None] + (key * mask_key)[None, :], mask=seen[None, :], other=0)
            if mask.dtype.element_ty == tl.int1:
                scores = tl.where(given, scores, -float("inf"))
            else:
                scores += given.to(tl.float32)
        scores += hidden(tl.maximum(start - key, key - stop + 1))[None, :]
        if CAUSAL:
            scores += hidden(key[None, :] - token[:, None])
        now = tl.maximum(most, tl.max(scores, 1))
        weights = power_of(scores, now[:, None])
        kept = power_of(most, now)
        total = total * kept + tl.sum(weights, 1)
        found = tl.dot(weights.to(block_v.dtype), block_v, found * kept[:, None], input_precision="ieee")
        most = now
        k += BLOCK_N * k_key
        v += BLOCK_N * v_key

    ready = SPLIT == 1
    inside = there[:, None] & (at_v < V_DIM)[None, :]
    if SPLIT > 1:
        # Of each program: what it found, then of each program its maxima and sums.
        sums = planes + tl.num_programs(0).to(tl.int64) * (BLOCK_M * BLOCK_V)
        row_in = tl.arange(0, BLOCK_M)
        mine = tl.program_id(0).to(tl.int64) * BLOCK_M
        tl.store(planes + (mine + row_in)[:, None] * BLOCK_V + at_v[None, :], found, mask=inside)
        tl.store(sums + 2 * mine + row_in, most, mask=there)
        tl.store(sums + 2 * mine + BLOCK_M + row_in, total, mask=there)
        ready = is_last(sync + 1 + tile, SPLIT)  # at its own counter
        if ready:
            tl.store(sync + 2 + tile, 0)
            first = tile.to(tl.int64) * (SPLIT * BLOCK_M)
            at = 2 * (first + tl.arange(0, SPLIT)[None, :] * BLOCK_M) + row_in[:, None]
            every = tl.load(sums + at, mask=there[:, None], other=-float("inf"))
            most = tl.max(every, 1)
            totals = tl.load(sums + at + BLOCK_M, mask=there[:, None], other=0.0)
            total = tl.sum(power_of(every, most[:, None]) * totals, 1)
            found = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for other in tl.range(0, SPLIT, loop_unroll_factor=4):
                theirs = first + other * BLOCK_M
                part = tl.load(planes + (theirs + row_in)[:, None] * BLOCK_V + at_v[None, :], mask=inside, other=0.0)
                amount = power_of(tl.load(sums + 2 * theirs + row_in, mask=there, other=-float("inf")), most)
                found += part * amount[:, None]
    if ready:
        found = found / tl.where(total == 0, 1.0, total)[:, None]
        place = (batch * tokens + token)[:, None] * (key_heads * groups * V_DIM) + (head * V_DIM)[:, None]
        tl.store(out + place + at_v[None, :], rounded(found, out.dtype.element_ty, BY_HAND), mask=inside)


_SIZES = ("keys", "rows", "heads", "dim", "bits")


def _steps(sizes: Mapping[str, int], choice: Choice) -> float:
    split = choice.constants["SPLIT"]
    blocks = triton.cdiv(sizes["keys"], choice.constants["BLOCK_N"] * split)
    return 6 + 2 * blocks / choice.stages + (4 + split / 4 if split > 1 else 0)


_HELPERS = (tanh, power_of, hidden, is_last, rounded)
DECODE = Kernel(
    "decode_attention", attention, _SIZES,
    {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64), "SPLIT": (1, 2, 4, 8, 16, 32, 64),
     "warps": (2, 4, 8), "stages": (1, 2, 3)},
    Choice(constants={"BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": 16}, warps=4, stages=2), _HELPERS, _steps,
)  # fmt: skip
PREFILL = Kernel(
    "prefill_attention", attention, _SIZES,
    {"BLOCK_M": (32, 64, 128), "BLOCK_N": (16, 32, 64, 128), "SPLIT": (1, 2), "warps": (4, 8), "stages": (1, 2, 3)},
    Choice(constants={"BLOCK_M": 64, "BLOCK_N": 32, "SPLIT": 1}, warps=4, stages=2), _HELPERS, _steps,
)  # fmt: skip


@functools.lru_cache(1024)
def _fitted(choice: Choice, rows: int, keys: int, heads: int, most_rows: int, most_keys: int) -> Choice:
    """``choice`` with blocks no larger than there are rows and keys, or than ``most_rows`` and ``most_keys``, and no
    more splits than blocks. ``heads``: key heads in all rows of the batch."""
    block_m = min(choice.constants["BLOCK_M"], max(16, min(most_rows, triton.next_power_of_2(rows))))
    block_n = min(choice.constants["BLOCK_N"], max(16, min(most_keys, triton.next_power_of_2(keys))))
    split = min(choice.constants["SPLIT"], triton.next_power_of_2(max(triton.cdiv(keys, block_n), 1)))
    if heads * triton.cdiv(rows, block_m) > COUNTERS - 2:  # more than there can be counters for
        split = 1
    constants = {**choice.constants, "BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split}
    return Choice(constants=constants, warps=choice.warps, stages=choice.stages)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    live: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """:func:`skipc.kernels.attention.attention_reference` in one launch, for fp32, fp16 and bf16 and any strides.

    Nothing that is masked reaches the result of a query whose keys are all finite; what is not live may be anything.
    Sums do not depend on timing: the same call gives the same bits.
    """
    batch, heads, tokens, k_dim = q.shape
    key_heads, keys, v_dim = k.shape[1], k.shape[2], v.shape[3]
    groups, size = heads // key_heads, q.element_size()
    rows = groups * tokens
    out = torch.empty(batch, tokens, heads, v_dim, dtype=q.dtype, device=q.device)
    block_k, block_v = (max(16, triton.next_power_of_2(dim)) for dim in (k_dim, v_dim))
    kernel = DECODE if rows <= FEW else PREFILL
    sizes = {"keys": keys, "rows": rows, "heads": batch * key_heads, "dim": max(k_dim, v_dim), "bits": 8 * size}
    choice = pick(kernel, q, **sizes)
    most_rows = most_keys = 1 << 16
    if choice == kernel.default:  # which must do for all sizes and devices
        most_keys = MODEST // (size * (block_k + block_v))
        most_rows = 2 * most_keys
        if size == 4:  # is multiplied out of registers on NVIDIA
            most_rows, most_keys = min(most_rows, 32), most_keys // 2
    choice = _fitted(choice, rows, keys, batch * key_heads, most_rows, most_keys)
    block_m, split = choice.constants["BLOCK_M"], choice.constants["SPLIT"]
    programs = batch * key_heads * triton.cdiv(rows, block_m) * split
    given: dict[str, Any] = {
        **_strided("q", q, "batch", "head", "token", "at"),
        **_strided("k", k, "batch", "head", "key", "at"),
        **_strided("v", v, "batch", "head", "key", "at"),
        **_strided("mask", mask, "batch", "head", "token", "key", shape=(batch, heads, tokens, keys)),
        **_strided("live", live, "batch", "end", shape=(batch, 2)),
    }
    planes = (
        torch.empty(programs * block_m * (block_v + 2), dtype=torch.float32, device=q.device) if split > 1 else None
    )
    given |= {
        "out": out, "planes": planes, "sync": counters(q) if split > 1 else None, "key_heads": key_heads,
        "groups": groups, "tokens": tokens, "keys": keys, "scale": scale, "softcap": softcap,
        "K_DIM": k_dim, "V_DIM": v_dim, "BLOCK_K": block_k, "BLOCK_V": block_v, "CAUSAL": causal,
        "CAPPED": softcap != 0, "WIDEN": widens(q.dtype), "BY_HAND": by_hand(q.dtype),
        "ALIGNED": ALIGNED,
    }  # fmt: skip
    # Of the keys, those that have room: how many are live is known on the device alone.
    moved = size * (q.numel() + out.numel() + batch * key_heads * keys * (k_dim + v_dim))
    moved += 0 if mask is None else mask.numel() * mask.element_size()
    work = 2 * batch * heads * tokens * keys * (k_dim + v_dim)
    launch(kernel, choice, (programs,), given, sizes=sizes, moved=moved, operations=work)
    return out.transpose(1, 2)


def _strided(name: str, t: torch.Tensor | None, *letters: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Arguments for a tensor, which is taken to be of this shape, and for its strides."""
    strides = [0] * len(letters) if t is None else (t if shape is None else t.expand(shape)).stride()
    return {name: t, **{f"{name}_{letter}": n for letter, n in zip(letters, strides, strict=True)}}


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Tokens and prompts of SmolLM2-135M, Llama 3 8B and Gemma 2 2B."""
    models = {"SmolLM2-135M": (9, 3, 64, 2048), "Llama 3 8B": (32, 8, 128, 8192), "Gemma 2 2B": (8, 4, 256, 4096)}
    for model, (heads, key_heads, dim, cache) in models.items():
        of = functools.partial(example, heads, key_heads, dim, dtype=dtype)
        for batch in (1, 8):
            for how in ("boolean", "additive", "capped"):
                yield f"{model}, {batch} tokens, {how}", of(batch=batch, tokens=1, keys=cache, how=how)
            yield f"{model}, {batch} prompts, boolean", of(batch=batch, tokens=512, keys=cache, how="boolean")
            yield f"{model}, {batch} prompts, causal", of(batch=batch, tokens=512, keys=512, how="causal")


def example(
    heads: int, key_heads: int, dim: int, batch: int, tokens: int, keys: int, how: str, dtype: torch.dtype
) -> Callable[[str], Callable[[], object]]:
    """A call whose last query sees all keys that there is room for.

    Args:
        how: ``boolean`` or ``additive`` for a mask, ``causal``, or ``capped`` for scores of which no one is too large.
    """

    def prepare(device: str) -> Callable[[], object]:
        q = random(batch, tokens, heads, dim, dtype=dtype, device=device).transpose(1, 2)
        k, v = (random(batch, key_heads, keys, dim, dtype=dtype, device=device) for _ in range(2))
        live = None if how == "causal" else torch.tensor([[0, keys]], device=device)
        mask = None
        if how in ("boolean", "additive"):
            mask = torch.ones(batch, 1, tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
        if mask is not None and how == "additive":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        softcap = 50.0 if how == "capped" else 0.0
        return lambda: decode_attention(q, k, v, mask, live, how == "causal", dim**-0.5, softcap)

    return prepare
