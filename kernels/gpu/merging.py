"""Adapters folded into the weights of all layers by one launch. Semantics: :mod:`skipc.kernels.merging`.

A program has a tile of a weight. Which weight, it reads from a table of addresses that is made once for a set of
weights, so that a model of hundreds of layers is one launch; the time is that of reading and writing all weights
once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.lora import room_of, second_of
from skipc.kernels.gpu.rounding import by_hand, rounded, widens
from skipc.kernels.lora import OPERANDS, PACK, Lora
from skipc.kernels.tables import Choice

_FIELDS = 10  # of a row of the table of weights


@triton.jit
def merge_weights(
    like, weights, owners, slots, factors, count,
    BY_HAND: tl.constexpr, PACKED: tl.constexpr, PACK: tl.constexpr, WIDEN: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = weights + FIELDS * tl.load(owners + tl.program_id(0)).to(tl.int64)
    weight = tl.load(row).to(like.dtype)
    out = tl.load(row + 1).to(like.dtype)
    a = tl.load(row + 2).to(like.dtype)
    b = tl.load(row + 3).to(like.dtype)
    where = tl.load(row + 4).to(slots.dtype)
    scales = tl.load(row + 5).to(factors.dtype)
    n_size = tl.load(row + 6)
    k_size = tl.load(row + 7)
    transposed = tl.load(row + 8)
    tile = tl.program_id(0) - tl.load(row + 9)
    across = tl.cdiv(k_size, BLOCK_K)
    n = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n < n_size)[:, None] & (k < k_size)[None, :]
    at = (n * tl.where(transposed != 0, 1, k_size))[:, None] + (k * tl.where(transposed != 0, n_size, 1))[None, :]
    total = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(count):
        slot = tl.load(slots + i)
        rank = tl.load(where + 4 * slot)
        first_place = tl.multiple_of(tl.load(where + 4 * slot + 1), 16)
        place = tl.multiple_of(tl.load(where + 4 * slot + 2), 16)
        change = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            firsts = tl.load(
                a + first_place + (r * k_size)[:, None] + k[None, :],
                mask=(r < rank)[:, None] & (k < k_size)[None, :], other=0.0,
            )  # fmt: skip
            seconds = tl.load(
                second_of(b, place, n, r, rank, PACKED, PACK), mask=(r < rank)[:, None] & (n < n_size)[None, :],
                other=0.0,
            )  # fmt: skip
            if WIDEN:
                firsts, seconds = firsts.to(tl.float32), seconds.to(tl.float32)
            change = tl.dot(tl.trans(seconds), firsts, change, input_precision="ieee")
        if rank > 0:
            total += tl.load(factors + i) * tl.load(scales + slot) * change
    tl.store(out + at, rounded(total, like.dtype.element_ty, BY_HAND), mask=inside)


SWITCH = Kernel(
    "merge_weights", merge_weights, ("count", "bits"),
    {"BLOCK_N": (32, 64, 128), "BLOCK_K": (64, 128), "BLOCK_R": (16, 32), "warps": (4, 8), "stages": (1, 2)},
    Choice(constants={"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16}, warps=4, stages=1), (second_of, rounded),
    lambda sizes, c: 4 + 3 * sizes["count"],
)  # fmt: skip

_tables: OrderedDict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = OrderedDict()
_KEPT = 8  # sets of weights whose tables are kept


def merge_lora(
    weights: Sequence[torch.Tensor],
    merged: Sequence[torch.Tensor],
    lora: Lora,
    transposed: Sequence[bool],
    slots: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """The operation of that name. Weights without adapters are copied.

    Raises:
        RuntimeError: for weights of several dtypes, and if adapters are packed in some layers and not in others.
    """
    if not weights:
        return
    first = weights[0]
    operands = [lora[OPERANDS * i : OPERANDS * (i + 1)] for i in range(len(weights))]
    known: Any = next((o for o in operands if o[0] is not None), None)
    if any(w.dtype != first.dtype or not w.is_contiguous() for w in (*weights, *merged)):
        raise RuntimeError("merge_lora: weights are contiguous and of one dtype")
    if known is None or any(o[0] is not None and o[0].dtype != first.dtype for o in operands):
        raise RuntimeError("merge_lora: adapters are of the weights' dtype")
    packed = known[0].dim() == 1
    if any(o[0] is not None and (o[0].dim() == 1) != packed for o in operands):
        raise RuntimeError("merge_lora: the adapters of all layers are packed, or of none")
    sizes = {"count": len(slots), "bits": 8 * first.element_size()}
    choice = pick(SWITCH, first, **sizes)
    tiles = (choice.constants["BLOCK_N"], choice.constants["BLOCK_K"])
    table, owners = _table_of(weights, merged, [o if o[0] is not None else known for o in operands],
                              [o[0] is not None for o in operands], transposed, tiles)  # fmt: skip
    elements = sum(w.numel() for w in weights)
    ranks = sum(room_of(o[2]) * sum(w.shape) for w, o in zip(weights, operands, strict=True) if o[2] is not None)
    given = {"like": first, "weights": table, "owners": owners, "slots": slots, "factors": factors,
             "count": len(slots), "PACKED": packed, "PACK": PACK, "FIELDS": _FIELDS,
             "WIDEN": widens(first.dtype),
             "BY_HAND": by_hand(first.dtype)}  # fmt: skip
    launch(
        SWITCH, choice, (len(owners),), given, sizes=sizes,
        moved=first.element_size() * (2 * elements + len(slots) * ranks), operations=2 * len(slots) * elements * 16,
    )  # fmt: skip


def _table_of(
    weights: Sequence[torch.Tensor],
    merged: Sequence[torch.Tensor],
    operands: Sequence[Any],
    adapted: Sequence[bool],
    transposed: Sequence[bool],
    tiles: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each weight its addresses, sizes and first tile; and whose each tile is."""
    device = weights[0].device
    counts = []
    for w, turned in zip(weights, transposed, strict=True):
        n, k = reversed(w.shape) if turned else w.shape
        counts.append(triton.cdiv(n, tiles[0]) * triton.cdiv(k, tiles[1]))
    if device.type == "meta":
        return (torch.empty(len(weights), _FIELDS, dtype=torch.int64, device=device),
                torch.empty(sum(counts), dtype=torch.int32, device=device))  # fmt: skip
    addresses = (t.data_ptr() for t in (*weights, *merged, *(t for o in operands for t in o)))
    key = (*addresses, *(n for w in weights for n in w.shape), *transposed, *adapted, *tiles)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key][:2]
    rows, before = [], 0
    blank = torch.zeros(operands[0][2].shape, dtype=torch.int64, device=device)  # ranks of no adapters
    for w, out, o, has, turned, count in zip(weights, merged, operands, adapted, transposed, counts, strict=True):
        n, k = reversed(w.shape) if turned else w.shape
        where = o[2] if has else blank
        rows.append([w.data_ptr(), out.data_ptr(), o[0].data_ptr(), o[1].data_ptr(), where.data_ptr(),
                     o[3].data_ptr(), n, k, int(turned), before])  # fmt: skip
        before += count
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    owners = torch.repeat_interleave(torch.arange(len(weights), dtype=torch.int32), torch.tensor(counts)).to(device)
    _tables[key] = table, owners, blank  # which lives as long as its address is in the table
    while len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return table, owners


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """All linear layers of SmolLM2-135M, and two of Llama 3 8B; one adapter, and two of which one is taken out."""
    small = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
    for model, shapes in {"smollm2": small * 30, "llama3": [(4096, 4096), (14336, 4096)]}.items():
        for count in (1, 2):
            yield f"{model}, {count} adapters", partial(_example, shapes, count, dtype)


def _example(shapes: Sequence[tuple[int, int]], count: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    rank = 16
    lora: list[Any] = []
    for n, k in shapes:
        memory = random(2 * rank * (k + n), dtype=dtype, device=device)
        places = [[rank, slot * rank * (k + n), slot * rank * (k + n) + rank * k, 64] for slot in range(2)]
        lora += [memory, memory, torch.tensor(places, device=device), torch.ones(2, device=device)]
    weights = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    merged = [torch.empty_like(w) for w in weights]
    slots, factors = torch.arange(count, device=device), torch.tensor([1.0, -1.0][:count], device=device)
    return lambda: merge_lora(weights, merged, lora, [False] * len(shapes), slots, factors)
