"""Linear layers of a few rows in one launch: ``rms_norm(x) @ w.T + b + residual``, unless a gate on the device is
closed (:mod:`skipc.kernels.gpu.gates`). Weights are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.gates import Gate
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.rounding import by_hand, rounded, widens
from skipc.kernels.linear import MOST_ROWS
from skipc.kernels.tables import Choice


@triton.jit
def factor_of(x, x_stride, rows, k, eps, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr):
    """What an RMS norm multiplies each row by: fp32 ``[BLOCK_M]``."""
    row = tl.arange(0, BLOCK_M)
    squares = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
    for begin in range(0, k, BLOCK_X):
        at = begin + tl.arange(0, BLOCK_X)
        inside = (row < rows)[:, None] & (at < k)[None, :]
        values = tl.load(x + (row * x_stride)[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, 1) / k + eps)


@triton.jit
def products(
    x, x_stride, rows, k, norm, factor, first, first_stride, second, second_stride, n, size,
    HAS_NORM: tl.constexpr, TWO: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of ``x``, normed, times rows ``n`` of one weight or two: two fp32 ``[BLOCK_M, BLOCK_N]``."""
    row = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        one = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    else:
        one = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        other = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, k, BLOCK_K):
        at = begin + tl.arange(0, BLOCK_K)
        there = at < k
        inputs = tl.load(
            x + (row * x_stride)[:, None] + at[None, :], mask=(row < rows)[:, None] & there[None, :], other=0.0
        )
        kind = inputs.dtype
        if HAS_NORM:
            scale = tl.load(norm + at, mask=there, other=0.0).to(tl.float32)
            inputs = inputs.to(tl.float32) * factor[:, None] * scale[None, :]
        inside = (n < size)[:, None] & there[None, :]
        ones = tl.load(first + (n.to(tl.int64) * first_stride)[:, None] + at[None, :], mask=inside, other=0.0)
        if TWO:
            others = tl.load(second + (n.to(tl.int64) * second_stride)[:, None] + at[None, :], mask=inside, other=0.0)
        if BLOCK_M == 1:
            one += ones.to(tl.float32) * inputs.to(tl.float32)
            if TWO:
                other += others.to(tl.float32) * inputs.to(tl.float32)
        else:
            if WIDEN:
                inputs, ones = inputs.to(tl.float32), ones.to(tl.float32)
            else:
                inputs = inputs.to(kind)
            one = tl.dot(inputs, tl.trans(ones), one, input_precision="ieee")
            if TWO:
                if WIDEN:
                    others = others.to(tl.float32)
                other = tl.dot(inputs, tl.trans(others), other, input_precision="ieee")
    if BLOCK_M == 1:
        one, other = tl.sum(one, 1)[None, :], tl.sum(other, 1)[None, :]
    return one, other


@triton.jit
def finished(
    total, bias, residual, residual_stride, out, out_stride, rows, n, n_size,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store ``total``, ``[BLOCK_M, len(n)]``, with what is added to it. Returns the residual, fp32, and what is
    stored."""
    row = tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & (n < n_size)[None, :]
    before = tl.zeros_like(total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_size, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        before = tl.load(residual + (row * residual_stride)[:, None] + n[None, :], mask=inside, other=0.0)
        before = before.to(tl.float32)
        total += before
    made = rounded(total, out.dtype.element_ty, BY_HAND)
    tl.store(out + (row * out_stride)[:, None] + n[None, :], made, mask=inside)
    return before, made


@triton.jit
def linear_rows(
    x, x_stride, rows, k, norm, eps, weight, weight_stride, n_size, bias, residual, residual_stride, out, out_stride,
    skipped,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    WIDEN: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    if GATED:
        if tl.load(skipped) != 0:
            return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.zeros([BLOCK_M], tl.float32)
    if HAS_NORM:
        factor = factor_of(x, x_stride, rows, k, eps, BLOCK_M, BLOCK_X)
    total, _ = products(
        x, x_stride, rows, k, norm, factor, weight, weight_stride, weight, weight_stride, n, n_size,
        HAS_NORM, False, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    finished(
        total, bias, residual, residual_stride, out, out_stride, rows, n, n_size, HAS_BIAS, HAS_RESIDUAL, BY_HAND,
        BLOCK_M,
    )  # fmt: skip


def steps(sizes: Mapping[str, int], choice: Choice) -> float:
    """Loads that a program waits for, one after the other."""
    k, c = sizes["k"], choice.constants
    blocks = -(-k // c["BLOCK_K"])
    return 2 + -(-k // c["BLOCK_X"]) + blocks / (choice.stages if sizes["rows"] > 1 else 1)


SPACE = {"BLOCK_N": (8, 16, 32), "BLOCK_K": (128, 256, 512), "BLOCK_X": (512, 1024), "warps": (2, 4, 8),
          "stages": (1, 2, 3)}  # fmt: skip
LINEAR = Kernel(
    "linear_rows", linear_rows, ("rows", "k", "n", "bits"), SPACE, Choice(constants={"BLOCK_N": 16, "BLOCK_K": 256,
    "BLOCK_X": 512}, warps=4, stages=2), (factor_of, products, finished, rounded), steps,
)  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    gate: Gate | None = None,
) -> torch.Tensor:
    """``rms_norm(x) @ weight.T + bias + residual``, or ``out`` as it was if ``gate`` says that the site is skipped.

    Args:
        x: ``[rows, k]``, at most 16, floating; rows are contiguous.
        weight, bias: ``[n, k]`` (rows contiguous) and ``[n]``.
        norm, eps: of an RMS norm of ``x``.
        residual: ``[rows, n]``.
        out: ``[rows, n]``; made, if None.
    """
    (rows, k), n = x.shape, weight.shape[0]
    if out is None:
        out = x.new_empty(rows, n)
    sizes = {"rows": rows, "k": k, "n": n, "bits": 8 * x.element_size()}
    choice = pick(LINEAR, x, **sizes)
    given = {
        "x": x, "x_stride": x.stride(0), "rows": rows, "k": k, "norm": norm, "eps": eps, "weight": weight,
        "weight_stride": weight.stride(0), "n_size": n, "bias": bias, "residual": residual,
        "residual_stride": 0 if residual is None else residual.stride(0), "out": out, "out_stride": out.stride(0),
        "skipped": None if gate is None else gate.skipped[gate.site :], "HAS_NORM": norm is not None,
        "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "GATED": gate is not None,
        "WIDEN": widens(x.dtype), "BY_HAND": by_hand(x.dtype), "BLOCK_M": tile_rows(rows),
    }  # fmt: skip
    moved = x.element_size() * (n * k + rows * (k + n * (2 if residual is not None else 1)))
    grid = (triton.cdiv(n, choice.constants["BLOCK_N"]),)
    launch(LINEAR, choice, grid, given, sizes=sizes, moved=moved, operations=2 * rows * n * k)
    return out


def tile_rows(rows: int) -> int:
    """Rows of a tile: one, or what tensor cores take."""
    if rows > MOST_ROWS:
        raise RuntimeError(f"a launch takes {MOST_ROWS} rows at most, not {rows}")
    return 1 if rows == 1 else MOST_ROWS


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Layers that may be skipped, of SmolLM2-135M and of Llama 3 8B."""
    for model, width, inner in (("smollm2", 576, 1536), ("llama3", 4096, 14336)):
        for rows in (1, 8):
            yield f"{model}, {rows} rows, linear", partial(_example, rows, width, inner, dtype)


def _example(rows: int, width: int, inner: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    x, norm = random(rows, width, dtype=dtype, device=device), random(width, dtype=dtype, device=device)
    weight, out = random(inner, width, dtype=dtype, device=device), random(rows, inner, dtype=dtype, device=device)
    gate = Gate(torch.zeros(60, dtype=torch.int8, device=device), 3)
    return lambda: linear(x, weight, None, norm, 1e-5, out=out, gate=gate)
