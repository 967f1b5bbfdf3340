"""Norms of rows, with the residual addition before them and the moments of the stream, in one launch and one pass.
Semantics: :mod:`skipc.kernels.norms`.

A program has one row. What fits into one block is read once, and everything is made of registers; a longer row is read
block by block twice, the second time out of a cache, and the variances of its blocks are joined as Chan et al. have it
(Updating formulae and a pairwise algorithm for computing sample variances, 1979), which needs no mean in advance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.rounding import by_hand, rounded
from skipc.kernels.norms import KINDS
from skipc.kernels.tables import Choice


@triton.jit
def points(x, branch, at, there, scale, BY_HAND: tl.constexpr):
    """The stream before and after the addition, as it is rounded: fp32."""
    before = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    after = before
    if branch is not None:
        added = before + scale * tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        after = rounded(added, x.dtype.element_ty, BY_HAND).to(tl.float32)
    return before, after


@triton.jit
def normed(centered, factor, weight, bias, at, there, weight_offset):
    """The norm of a part of a row."""
    made = centered * factor
    if weight is not None:
        made *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32) + weight_offset
    if bias is not None:
        made += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
    return made


@triton.jit
def add_norm_rows(
    x, x_stride, branch, branch_stride, weight, bias, total, out, moments, width, eps, scale, weight_offset,
    LAYER: tl.constexpr, WHOLE: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * width
    if branch is not None:
        branch += row * branch_stride
        total += row * width
    if WHOLE:
        at = tl.arange(0, BLOCK)
        there = at < width
        before, after = points(x, branch, at, there, scale, BY_HAND)
        dot, first, second = tl.sum(before * after), tl.sum(before * before), tl.sum(after * after)
        centered = after
        square = second
        if LAYER:
            centered = tl.where(there, after - tl.sum(after) / width, 0.0)
            square = tl.sum(centered * centered)
        made = normed(centered, tl.rsqrt(square / width + eps), weight, bias, at, there, weight_offset)
        tl.store(out + at, rounded(made, out.dtype.element_ty, BY_HAND), mask=there)
        if branch is not None:
            tl.store(total + at, rounded(after, total.dtype.element_ty, BY_HAND), mask=there)
    else:
        dots = tl.zeros([BLOCK], tl.float32)
        firsts = tl.zeros([BLOCK], tl.float32)
        seconds = tl.zeros([BLOCK], tl.float32)
        mean, square = 0.0, 0.0
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            there = at < width
            before, after = points(x, branch, at, there, scale, BY_HAND)
            dots += before * after
            firsts += before * before
            seconds += after * after
            if branch is not None:
                tl.store(total + at, rounded(after, total.dtype.element_ty, BY_HAND), mask=there)
            if LAYER:
                count = tl.minimum(width - begin, BLOCK)
                theirs = tl.sum(after) / count
                apart = tl.where(there, after - theirs, 0.0)
                further = theirs - mean
                square += tl.sum(apart * apart) + further * further * (begin / (begin + count) * count)
                mean += further * (count / (begin + count))
        dot, first, second = tl.sum(dots), tl.sum(firsts), tl.sum(seconds)
        if not LAYER:
            square = second
        factor = tl.rsqrt(square / width + eps)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            there = at < width
            _, after = points(x, branch, at, there, scale, BY_HAND)
            made = normed(after - mean, factor, weight, bias, at, there, weight_offset)
            tl.store(out + at, rounded(made, out.dtype.element_ty, BY_HAND), mask=there)
    if branch is not None:
        tl.store(moments + 3 * row, dot)
        tl.store(moments + 3 * row + 1, first)
        tl.store(moments + 3 * row + 2, second)


def _steps(sizes: Mapping[str, int], choice: Choice) -> float:
    blocks = triton.cdiv(sizes["width"], choice.constants["BLOCK"])
    return 4 if blocks == 1 else 4 + 3 * blocks


NORM = Kernel(
    "add_norm", add_norm_rows, ("rows", "width", "bits"),
    {"BLOCK": (512, 1024, 2048, 4096, 8192), "warps": (1, 2, 4, 8, 16), "stages": (1, 2)},
    Choice(constants={"BLOCK": 4096}, warps=8, stages=1), (points, normed, rounded), _steps,
)  # fmt: skip


@functools.lru_cache(256)
def _fitted(choice: Choice, width: int, most_warps: int) -> Choice:
    block = min(choice.constants["BLOCK"], max(16, triton.next_power_of_2(width)))
    return Choice(constants={"BLOCK": block}, warps=min(choice.warps, most_warps), stages=choice.stages)


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    weight_offset: float = 0.0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`skipc.kernels.norms.add_norm`; without ``branch``, :func:`skipc.kernels.norms.norm_rows` of ``x``, which
    is then itself the first of what is returned, and None the last.

    Raises:
        ValueError: for another kind of norm.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {KINDS}")
    width, size = x.shape[-1], x.element_size()
    rows = _rows(x)
    count = rows.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branches = total = moments = None
    if branch is not None:
        branches = _rows(branch)
        total = torch.empty_like(out)
        moments = torch.empty((*x.shape[:-1], 3), dtype=torch.float32, device=x.device)
    sizes = {"rows": count, "width": width, "bits": 8 * size}
    choice = pick(NORM, x, **sizes)
    most_warps = 32
    if choice == NORM.default:  # few enough for loads of 16 bytes, whether a warp is 32 threads or 64
        most_warps = max(1, triton.next_power_of_2(width) * size // (64 * 16))
    choice = _fitted(choice, width, most_warps)
    parameters = [None if p is None else p.contiguous() for p in (weight, bias)]
    given = {
        "x": rows, "x_stride": rows.stride(0), "branch": branches,
        "branch_stride": 0 if branches is None else branches.stride(0), "weight": parameters[0], "bias": parameters[1],
        "total": total, "out": out, "moments": moments, "width": width, "eps": eps, "scale": scale,
        "weight_offset": weight_offset, "LAYER": kind == "layer", "WHOLE": width <= choice.constants["BLOCK"],
        "BY_HAND": by_hand(x.dtype),
    }  # fmt: skip
    moved = size * count * width * (2 if branch is None else 4) + (0 if moments is None else 4 * moments.numel())
    moved += sum(p.numel() * p.element_size() for p in parameters if p is not None)
    work = (6 if branch is None else 12) * count * width
    launch(NORM, choice, (count,), given, sizes=sizes, moved=moved, operations=work)
    return (x if total is None else total), out, moments


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Streams of SmolLM2-135M, Llama 3 8B and GPT-2 XL, and of a model wider than a block."""
    for model, width, kind in (("SmolLM2-135M", 576, "rms"), ("Llama 3 8B", 4096, "rms"), ("GPT-2 XL", 1600, "layer"),
                               ("Llama 3 405B", 16384, "rms"), ("GPT-3", 12288, "layer")):  # fmt: skip
        for rows in (1, 8, 512):
            for adds in (True, False):
                yield (
                    f"{model}, {rows} rows, {kind}, {'added' if adds else 'alone'}",
                    example(rows, width, kind, adds, dtype),
                )


def example(rows: int, width: int, kind: str, adds: bool, dtype: torch.dtype) -> Callable[[str], Callable[[], object]]:
    """A norm of rows, with the addition of as many before it or without."""

    def prepare(device: str) -> Callable[[], object]:
        x, branch = (random(1, rows, width, dtype=dtype, device=device) for _ in range(2))
        weight, bias = (random(width, dtype=dtype, device=device) for _ in range(2))
        given = (branch if adds else None, weight, bias if kind == "layer" else None)
        return lambda: add_norm(x, *given, 1e-5, kind)

    return prepare
