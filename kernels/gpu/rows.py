"""Some rows of a tensor, chosen on the device: a list of them, a copy, and back, in one launch each. Semantics:
:mod:`skipc.kernels.rows`.

``compact_rows`` needs no second phase: each program counts all of the mask, which is a few KB in a cache, and so knows
where its part of the list begins. Programs of the other two have places in the list; those behind its end read the
count and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.rounding import by_hand, rounded
from skipc.kernels.rows import MOST_ROWS
from skipc.kernels.tables import Choice


@triton.jit
def compacted(mask, mask_stride, rows, index, count, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    counts = tl.zeros([BLOCK], tl.int32)
    earlier = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        chosen = tl.load(mask + at * mask_stride, mask=at < rows, other=0).to(tl.int32)
        counts += chosen
        earlier += tl.where(begin < first, chosen, 0)
    total = tl.sum(counts)
    at = first + tl.arange(0, BLOCK)
    chosen = tl.load(mask + at * mask_stride, mask=at < rows, other=0).to(tl.int32)
    place = tl.sum(earlier) + tl.cumsum(chosen, 0) - 1
    tl.store(index + place, at, mask=chosen > 0)
    tl.store(index + at, tl.zeros([BLOCK], tl.int32), mask=(at >= total) & (at < rows))
    if first == 0:
        tl.store(count, total)


@triton.jit
def gathered(
    x, x_stride, index, count, out, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    chosen = tl.load(count)
    first = tl.program_id(0) * BLOCK_M
    if first < chosen:
        row = first + tl.arange(0, BLOCK_M)
        at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < chosen)[:, None] & (at < width)[None, :]
        source = tl.load(index + row, mask=row < chosen, other=0).to(tl.int64) * x_stride
        values = tl.load(x + source[:, None] + at[None, :], mask=inside)
        tl.store(out + (row.to(tl.int64) * width)[:, None] + at[None, :], values, mask=inside)


@triton.jit
def scattered(
    base, base_stride, rows, rows_stride, index, count, width,
    ADD: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chosen = tl.load(count)
    first = tl.program_id(0) * BLOCK_M
    if first < chosen:
        row = first + tl.arange(0, BLOCK_M)
        at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < chosen)[:, None] & (at < width)[None, :]
        target = tl.load(index + row, mask=row < chosen, other=0).to(tl.int64) * base_stride
        values = tl.load(rows + (row.to(tl.int64) * rows_stride)[:, None] + at[None, :], mask=inside)
        target = base + target[:, None] + at[None, :]
        if ADD:
            made = tl.load(target, mask=inside).to(tl.float32) + values.to(tl.float32)
            values = rounded(made, base.dtype.element_ty, BY_HAND)
        tl.store(target, values, mask=inside)


_SPACE = {"BLOCK_M": (1, 2, 4, 8, 16), "BLOCK_N": (256, 512, 1024, 2048, 4096), "warps": (2, 4, 8), "stages": (1,)}
_DEFAULT = Choice(constants={"BLOCK_M": 4, "BLOCK_N": 1024}, warps=4, stages=1)
COMPACT = Kernel(
    "compact_rows", compacted, ("rows", "bits"),
    {"BLOCK": (1024, 2048, 4096, 8192), "warps": (2, 4, 8), "stages": (1, 2)},
    Choice(constants={"BLOCK": 4096}, warps=8, stages=1), (),
    lambda sizes, choice: 5 + triton.cdiv(sizes["rows"], choice.constants["BLOCK"]) / 4,
)  # fmt: skip
GATHER = Kernel("gather_rows", gathered, ("rows", "width", "bits"), _SPACE, _DEFAULT)
SCATTER = Kernel("scatter_rows", scattered, ("rows", "width", "bits"), _SPACE, _DEFAULT, (rounded,))


def compact(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`skipc.kernels.rows.compact_rows`.

    Raises:
        RuntimeError: for more rows than can be chosen among.
    """
    flat = mask.reshape(-1)
    rows = len(flat)
    if rows > MOST_ROWS:
        raise RuntimeError(f"{rows} rows are more than the {MOST_ROWS} that can be chosen among")
    index = torch.empty(rows, dtype=torch.int32, device=mask.device)
    count = torch.empty(1, dtype=torch.int32, device=mask.device)
    sizes = {"rows": rows, "bits": 8}
    choice = _fitted(pick(COMPACT, mask, **sizes), "BLOCK", rows)
    given = {"mask": flat, "mask_stride": flat.stride(0), "rows": rows, "index": index, "count": count}
    grid = (max(triton.cdiv(rows, choice.constants["BLOCK"]), 1),)  # the count is there even if there are no rows
    launch(COMPACT, choice, grid, given, sizes=sizes, moved=5 * rows + 4)
    return index, count


def gather_rows(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """:func:`skipc.kernels.rows.gather_rows`."""
    width, room = x.shape[-1], len(index)
    rows = _rows(x.reshape(-1, width))
    out = torch.empty(room, width, dtype=x.dtype, device=x.device)
    given = {"x": rows, "x_stride": rows.stride(0), "index": index, "count": count, "out": out, "width": width}
    _launch(GATHER, x, room, 2, given)
    return out


def scatter_rows(base: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, count: torch.Tensor, add: bool) -> None:
    """:func:`skipc.kernels.rows.scatter_rows_`."""
    width = base.shape[-1]
    flat, rows = base.view(-1, width), _rows(rows)
    if width > 1 and flat.stride(1) != 1:
        raise RuntimeError("rows that are written must be contiguous")
    given = {
        "base": flat, "base_stride": flat.stride(0), "rows": rows, "rows_stride": rows.stride(0), "index": index,
        "count": count, "width": width, "ADD": add, "BY_HAND": by_hand(base.dtype),
    }  # fmt: skip
    _launch(SCATTER, base, len(index), 3 if add else 2, given)


def _launch(kernel: Kernel, x: torch.Tensor, room: int, times: int, given: dict[str, Any]) -> None:
    width, size = x.shape[-1], x.element_size()
    sizes = {"rows": room, "width": width, "bits": 8 * size}
    choice = _fitted(pick(kernel, x, **sizes), "BLOCK_N", width)
    grid = (triton.cdiv(room, choice.constants["BLOCK_M"]), triton.cdiv(width, choice.constants["BLOCK_N"]))
    # If all rows are chosen: how many are is known on the device alone.
    moved = times * size * room * width + 4 * room + 4
    launch(kernel, choice, grid, given, sizes=sizes, moved=moved, operations=room * width if times == 3 else 0)


@functools.lru_cache(256)
def _fitted(choice: Choice, name: str, most: int) -> Choice:
    """``choice`` with a block no larger than what there is."""
    block = min(choice.constants[name], max(16, triton.next_power_of_2(most)))
    return Choice(constants={**choice.constants, name: block}, warps=choice.warps, stages=choice.stages)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Tokens of a batch and of prompts that a sublayer of SmolLM2-135M and of Llama 3 8B takes."""
    for tokens in (8, 512, 8192):
        yield f"{tokens} tokens", example("compact", tokens, 1, dtype)
        for model, width in (("SmolLM2-135M", 576), ("Llama 3 8B", 4096)):
            for what in ("gather", "scatter", "add"):
                yield f"{model}, {tokens} tokens, {what}", example(what, tokens, width, dtype)


def example(what: str, tokens: int, width: int, dtype: torch.dtype) -> Callable[[str], Callable[[], object]]:
    """One of the three on all of some tokens."""

    def prepare(device: str) -> Callable[[], object]:
        if what == "compact":
            mask = torch.ones(tokens, dtype=torch.bool, device=device)
            return lambda: compact(mask)
        x, rows = (random(tokens, width, dtype=dtype, device=device) for _ in range(2))
        index = torch.arange(tokens, dtype=torch.int32, device=device)
        count = torch.full((1,), tokens, dtype=torch.int32, device=device)
        if what == "gather":
            return lambda: gather_rows(x, index, count)
        return lambda: scatter_rows(x, rows, index, count, what == "add")

    return prepare
