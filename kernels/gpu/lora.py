"""What adapters add to linear layers that share an input. Semantics and operands: :mod:`skipc.kernels.lora`.

With ``x`` a row, ``A`` and ``B`` the matrices of a slot and ``g`` its gate times its scale, ``out += g * B @ (A @ x)``
for each slot that the row wants, layer by layer (q, k and v; gate and up), in one launch:

* ``lora_rows`` for few rows, each by itself, so that a batch of as many adapters as rows costs no more than one of one.
  Programs of the first phase multiply by a part of ``A``, those of the second sum the parts and multiply by ``B`` (the
  parts are summed in order, so that nothing depends on timing). With ``SPLIT_K`` 0 there is no first phase, and each
  program of the second computes all of ``A @ x`` for itself: for small layers that is less than waiting.
* ``lora_tiles`` for many, by tensor cores: a program has a tile of rows and goes through the slots that they want.

Rows that want nothing are not touched: ``out`` keeps its bits. The layout is that of Punica's BGMV (arXiv 2310.18547)
with ranks as they are in each slot, as S-LoRA has it (arXiv 2311.03285).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.phases import arrive, is_last, leave, reset, take_ticket, wait
from skipc.kernels.gpu.rounding import by_hand, rounded, widens
from skipc.kernels.gpu.workspace import counters
from skipc.kernels.lora import MOST, OPERANDS, PACK, Lora, adapters_wanted
from skipc.kernels.tables import Choice

SLICES = 3  # layers of a launch
FEW = 64  # rows that go one by one


@triton.jit
def of(at, first, second, third):
    """What belongs to slice ``at``."""
    return tl.where(at == 0, first, tl.where(at == 1, second, third))


@triton.jit
def group_of(table, row, rows):
    """The group that a row belongs to; -1 if nobody wants anything."""
    groups = tl.load(table)
    groups = tl.where(groups == -rows, rows, groups)
    return tl.where(groups > 0, row // tl.maximum(rows // tl.maximum(groups, 1), 1), -1)


@triton.jit
def second_of(b, place, n, r, rank, PACKED: tl.constexpr, PACK: tl.constexpr):
    """Addresses of ``B[n, r]``: ``[len(r), len(n)]``."""
    if PACKED:
        block = n // PACK
        return b + place + (block * rank * PACK + n % PACK)[None, :] + (r * PACK)[:, None]
    return b + place + (n * rank)[None, :] + r[:, None]


@triton.jit
def part_of_bridge(x, k, a, place, r, rank, begin, step, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """``A[r] @ x`` over the blocks of columns from ``begin`` on, every ``step`` columns: fp32 ``[BLOCK_R]``."""
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for first in range(begin, k, step):
        at = first + tl.arange(0, BLOCK_K)
        there = at < k
        row = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        weights = tl.load(
            a + place + (r * k)[:, None] + at[None, :], mask=(r < rank)[:, None] & there[None, :], other=0.0
        )
        total += weights.to(tl.float32) * row[None, :]
    return tl.sum(total, 1)


@triton.jit
def lora_rows(
    x, x_stride, rows, k, table, gates, planes, room, sync,
    out_0, stride_0, n_0, a_0, b_0, where_0, scales_0,
    out_1, stride_1, n_1, a_1, b_1, where_1, scales_1,
    out_2, stride_2, n_2, a_2, b_2, where_2, scales_2,
    SLICES: tl.constexpr, BY_HAND: tl.constexpr, PACKED: tl.constexpr, PACK: tl.constexpr, MOST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    tiles_0 = tl.cdiv(n_0, BLOCK_N)
    tiles_1 = tiles_0 + tl.cdiv(n_1, BLOCK_N)
    tiles = tiles_1 + tl.cdiv(n_2, BLOCK_N)
    shrinks = rows * SLICES * SPLIT_K
    if SPLIT_K:
        program = take_ticket(sync)
    else:
        program = tl.program_id(0)
    if program < shrinks:
        if SPLIT_K:
            row = program // (SLICES * SPLIT_K)
            at = program // SPLIT_K % SLICES
            split = program % SPLIT_K
            a, where = of(at, a_0, a_1, a_2), of(at, where_0, where_1, where_2)
            group = group_of(table, row, rows)
            per = tl.where(group >= 0, tl.load(table + 1), 0).to(tl.int32)
            for i in range(per):
                slot = tl.load(table + 2 + group * per + i)
                if slot >= 0:
                    rank = tl.load(where + 4 * slot)
                    place = tl.multiple_of(tl.load(where + 4 * slot + 1), 16)
                    plane = planes + (((split * rows + row) * SLICES + at) * MOST + i) * room
                    for first in range(0, rank, BLOCK_R):
                        r = first + tl.arange(0, BLOCK_R)
                        made = part_of_bridge(
                            x + row.to(tl.int64) * x_stride, k, a, place, r, rank, split * BLOCK_K, SPLIT_K * BLOCK_K,
                            BLOCK_R, BLOCK_K,
                        )  # fmt: skip
                        tl.store(plane + r, made, mask=r < rank)
            arrive(sync, row * SLICES + at)
    else:
        row = (program - shrinks) // tiles
        tile = (program - shrinks) % tiles
        at = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
        tile = tile - of(at, 0, tiles_0, tiles_1)
        size = of(at, n_0, n_1, n_2)
        a, b, where = of(at, a_0, a_1, a_2), of(at, b_0, b_1, b_2), of(at, where_0, where_1, where_2)
        scales = of(at, scales_0, scales_1, scales_2)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        group = group_of(table, row, rows)
        per = tl.where(group >= 0, tl.load(table + 1), 0).to(tl.int32)
        total = tl.zeros([BLOCK_N], tl.float32)
        touched = False
        waits = True
        for i in range(per):
            slot = tl.load(table + 2 + group * per + i)
            rank = tl.load(where + 4 * slot, mask=slot >= 0, other=0)
            if rank > 0:
                if SPLIT_K:
                    if waits:
                        wait(sync, row * SLICES + at, SPLIT_K)
                touched, waits = True, False
                first_place = tl.multiple_of(tl.load(where + 4 * slot + 1), 16)
                place = tl.multiple_of(tl.load(where + 4 * slot + 2), 16)
                amount = tl.load(gates + 2 + group * per + i) * tl.load(scales + slot)
                part = tl.zeros([BLOCK_N], tl.float32)
                for first in range(0, rank, BLOCK_R):
                    r = first + tl.arange(0, BLOCK_R)
                    if SPLIT_K:
                        bridge = tl.zeros([BLOCK_R], tl.float32)
                        for split in range(SPLIT_K):
                            plane = planes + (((split * rows + row) * SLICES + at) * MOST + i) * room
                            bridge += tl.load(plane + r, mask=r < rank, other=0.0)
                    else:
                        bridge = part_of_bridge(
                            x + row.to(tl.int64) * x_stride, k, a, first_place, r, rank, 0, BLOCK_K, BLOCK_R, BLOCK_K
                        )
                    inside = (r < rank)[:, None] & (n < size)[None, :]
                    weights = tl.load(second_of(b, place, n, r, rank, PACKED, PACK), mask=inside, other=0.0)
                    part += tl.sum(bridge[:, None] * weights.to(tl.float32), 0)
                total += amount * part
        if touched:
            out = of(at, out_0, out_1, out_2) + row.to(tl.int64) * of(at, stride_0, stride_1, stride_2) + n
            before = tl.load(out, mask=n < size, other=0.0)
            tl.store(out, rounded(before.to(tl.float32) + total, before.dtype, BY_HAND), mask=n < size)
    if SPLIT_K:
        leave(sync, rows * SLICES, shrinks + rows * tiles)


@triton.jit
def lora_tiles(
    x, x_stride, rows, k, table, gates,
    out_0, stride_0, n_0, a_0, b_0, where_0, scales_0,
    out_1, stride_1, n_1, a_1, b_1, where_1, scales_1,
    out_2, stride_2, n_2, a_2, b_2, where_2, scales_2,
    BY_HAND: tl.constexpr, PACKED: tl.constexpr, PACK: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_0 = tl.cdiv(n_0, BLOCK_N)
    tiles_1 = tiles_0 + tl.cdiv(n_1, BLOCK_N)
    tile = tl.program_id(0)
    at = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
    tile = tile - of(at, 0, tiles_0, tiles_1)
    size = of(at, n_0, n_1, n_2)
    a, b, where = of(at, a_0, a_1, a_2), of(at, b_0, b_1, b_2), of(at, where_0, where_1, where_2)
    scales = of(at, scales_0, scales_1, scales_2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    group = group_of(table, row, rows)
    per = tl.where(tl.max(group, 0) >= 0, tl.load(table + 1), 0).to(tl.int32)
    there = row < rows
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    touched = tl.zeros([BLOCK_M], tl.int1)
    NONE: tl.constexpr = 1 << 40
    for i in range(per):
        wanted = tl.load(table + 2 + group * per + i, mask=there, other=-1)
        wanted = tl.where(wanted >= 0, wanted, NONE)
        amounts = tl.load(gates + 2 + group * per + i, mask=there, other=0.0)
        slot = tl.min(wanted, 0)
        while slot < NONE:  # each that a row of the tile wants, from the lowest on
            mine = wanted == slot
            rank = tl.load(where + 4 * slot)
            first_place = tl.multiple_of(tl.load(where + 4 * slot + 1), 16)
            place = tl.multiple_of(tl.load(where + 4 * slot + 2), 16)
            amount = amounts * tl.load(scales + slot, mask=rank > 0, other=0.0)
            touched = touched | (mine & (rank > 0))
            for first in range(0, rank, BLOCK_R):
                r = first + tl.arange(0, BLOCK_R)
                bridge = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for begin in range(0, k, BLOCK_K):
                    at_k = begin + tl.arange(0, BLOCK_K)
                    inputs = tl.load(
                        x + row.to(tl.int64)[:, None] * x_stride + at_k[None, :],
                        mask=mine[:, None] & (at_k < k)[None, :], other=0.0,
                    )  # fmt: skip
                    firsts = tl.load(
                        a + first_place + at_k[:, None] + (r * k)[None, :],
                        mask=(at_k < k)[:, None] & (r < rank)[None, :], other=0.0,
                    )  # fmt: skip
                    if WIDEN:
                        inputs, firsts = inputs.to(tl.float32), firsts.to(tl.float32)
                    bridge = tl.dot(inputs, firsts, bridge, input_precision="ieee")
                bridge = tl.where(mine[:, None], bridge * amount[:, None], 0.0)
                inside = (r < rank)[:, None] & (n < size)[None, :]
                seconds = tl.load(second_of(b, place, n, r, rank, PACKED, PACK), mask=inside, other=0.0)
                if WIDEN:
                    total = tl.dot(bridge, seconds.to(tl.float32), total, input_precision="ieee")
                else:
                    total = tl.dot(bridge.to(seconds.dtype), seconds, total, input_precision="ieee")
            slot = tl.min(tl.where(wanted > slot, wanted, NONE), 0)
    out = of(at, out_0, out_1, out_2)
    out += row.to(tl.int64)[:, None] * of(at, stride_0, stride_1, stride_2) + n[None, :]
    inside = touched[:, None] & (n < size)[None, :]
    before = tl.load(out, mask=inside, other=0.0)
    tl.store(out, rounded(before.to(tl.float32) + total, before.dtype, BY_HAND), mask=inside)


_HELPERS = (of, group_of, second_of, rounded)
ROWS = Kernel(
    "lora_rows", lora_rows, ("rows", "k", "n", "bits"),
    {"BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (128, 256, 512, 1024), "BLOCK_R": (16, 32), "SPLIT_K": (0, 1, 2, 4, 8),
     "warps": (2, 4, 8), "stages": (1, 2, 3)},
    Choice(constants={"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_R": 16, "SPLIT_K": 4}, warps=4, stages=2),
    (*_HELPERS, part_of_bridge, take_ticket, arrive, wait, is_last, reset, leave),
    lambda sizes, c: 6 + max(-(-sizes["k"] // (c.constants["BLOCK_K"] * max(c.constants["SPLIT_K"], 1))), 1)
    + (3 if c.constants["SPLIT_K"] else 0),
)  # fmt: skip
TILES = Kernel(
    "lora_tiles", lora_tiles, ("rows", "k", "n", "bits"),
    {"BLOCK_M": (16, 32, 64), "BLOCK_N": (64, 128), "BLOCK_K": (32, 64, 128), "BLOCK_R": (16, 32),
     "warps": (4, 8), "stages": (2, 3, 4)},
    Choice(constants={"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16}, warps=4, stages=2), _HELPERS,
    lambda sizes, c: 6 + -(-sizes["k"] // c.constants["BLOCK_K"]) / c.stages,
)  # fmt: skip

_rooms: dict[int, tuple[Any, int]] = {}


def room_of(where: torch.Tensor) -> int:
    """The largest rank that a layer's slots can have, which is read from the device once.

    Raises:
        RuntimeError: if that would be while a graph is captured.
    """
    if where.is_meta:
        return 64
    owner, room = _rooms.get(id(where), (None, 0))
    if owner is None or owner() is not where:
        if where.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("adapters of a layer met a graph's capture before any call")
        room = int(where[0, 3])
        key = id(where)
        _rooms[key] = weakref.ref(where, lambda _: _rooms.pop(key, None)), room
    return room


def add_adapters(outs: Sequence[torch.Tensor], x: torch.Tensor, lora: Lora) -> None:
    """Add to each of ``outs``, in place, what rows of ``x`` want of the layer that made it.

    Args:
        outs: ``[..., n_i]`` each, the layers' results; rows are contiguous.
        x: ``[..., k]``; rows are contiguous.
        lora: four operands (or four times None) for each of ``outs``, then table and gates.
    """
    if not adapters_wanted():
        return
    *_, table, gates = lora
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    of_form: dict[tuple[int, torch.dtype], list[tuple[torch.Tensor, Any]]] = {}  # packed or not, of one dtype
    for i, out in enumerate(outs):
        operands = lora[OPERANDS * i : OPERANDS * (i + 1)]
        if (a := operands[0]) is not None:
            of_form.setdefault((a.dim(), a.dtype), []).append((out.view(-1, out.shape[-1]), operands))
    for layers in of_form.values():
        for first in range(0, len(layers), SLICES):
            _launch(rows, layers[first : first + SLICES], table, gates)


def _launch(x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, Any]], table: Any, gates: Any) -> None:
    rows, k = x.shape
    widths = [out.shape[1] for out, _ in layers]
    sizes = {"rows": rows, "k": k, "n": sum(widths), "bits": 8 * x.element_size()}
    packed = layers[0][1][0].dim() == 1
    given: dict[str, Any] = {"x": x, "x_stride": x.stride(0), "rows": rows, "k": k, "table": table, "gates": gates}
    for i in range(SLICES):
        out, operands = layers[i] if i < len(layers) else layers[0]
        values = (out, out.stride(0), out.shape[1] if i < len(layers) else 0, *operands)
        names = ("out", "stride", "n", "a", "b", "where", "scales")
        given |= {f"{name}_{i}": value for name, value in zip(names, values, strict=True)}
    given |= {"PACKED": packed, "PACK": PACK, "BY_HAND": by_hand(x.dtype)}
    room = max(room_of(operands[2]) for _, operands in layers)
    different = min(rows, layers[0][1][2].shape[0])  # adapters, at most
    moved = x.element_size() * (x.numel() + different * room * sum(k + n for n in widths) + 2 * rows * sum(widths))
    measures: dict[str, Any] = {
        "sizes": sizes, "moved": moved, "operations": 2 * rows * room * sum(k + n for n in widths)
    }  # fmt: skip
    if rows > FEW:
        choice = pick(TILES, x, **sizes)
        block_m, block_n = choice.constants["BLOCK_M"], choice.constants["BLOCK_N"]
        grid = (sum(triton.cdiv(n, block_n) for n in widths), triton.cdiv(rows, block_m))
        given["WIDEN"] = widens(x.dtype) or x.dtype != layers[0][1][0].dtype
        launch(TILES, choice, grid, given, **measures)
        return
    choice = pick(ROWS, x, **sizes)
    split = choice.constants["SPLIT_K"]
    programs = rows * (len(layers) * split + sum(triton.cdiv(n, choice.constants["BLOCK_N"]) for n in widths))
    planes = torch.empty(max(split, 1) * rows * len(layers) * MOST * room, dtype=torch.float32, device=x.device)
    given |= {"planes": planes, "room": room, "sync": counters(x) if split else None, "SLICES": len(layers),
              "MOST": MOST}  # fmt: skip
    launch(ROWS, choice, (programs,), given, **measures)


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Launches as in models: q, k and v, o, gate and up, and down of SmolLM2-135M and of Llama 3 8B, for a few rows and
    for many."""
    shapes = {
        "smollm2": [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))],
        "llama3": [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))],
    }
    for model, layers in shapes.items():
        for rows in (1, 8, 512):
            for k, widths in layers:
                yield f"{model}, {rows} rows, {k} to {widths}", example(rows, k, widths, dtype)


def example(rows: int, k: int, widths: Sequence[int], dtype: torch.dtype) -> Callable[[str], Callable[[], object]]:
    """Layers of ``widths`` with an input of ``rows`` that take turns among eight adapters of rank 16."""
    return partial(_example, rows, k, widths, dtype)


def _example(rows: int, k: int, widths: Sequence[int], dtype: torch.dtype, device: str) -> Callable[[], object]:
    slots, rank = 8, 16
    lora: list[Any] = []
    for n in widths:
        places = [[rank, slot * rank * (k + n), slot * rank * (k + n) + rank * k, 64] for slot in range(slots)]
        memory = random(slots * rank * (k + n), dtype=dtype, device=device)
        lora += [memory, memory, torch.tensor(places, device=device), torch.ones(slots, device=device)]
    table = torch.tensor([rows, 1, *(row % slots for row in range(rows))], device=device)
    outs, x = [random(rows, n, dtype=dtype, device=device) for n in widths], random(rows, k, dtype=dtype, device=device)
    lora += [table, torch.ones(len(table), device=device)]
    return lambda: add_adapters(outs, x, lora)
