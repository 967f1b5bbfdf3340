"""Linear layers and MLPs of a few rows in one launch, which may be told on the device not to run.

``linear_rows`` is ``rms_norm(x) @ w.T + b + residual``; ``mlp_rows`` is ``act(h @ gate.T) * (h @ up.T)`` with ``h =
rms_norm(x)``, then ``@ down.T + b + residual``, the neurons in a first phase and the outputs in a second. Without
activation and ``up`` it is a low-rank map (an arm that a plan puts in the place of a sublayer); with fewer neurons, a
thin MLP. Weights are read once.

Both look at a number in memory first, ``skipped``: where it is not zero, they return before they read anything else.
Their output is then what it was, so a site that may be skipped works in place, on the residual stream. ``mlp_rows`` can
also take the moments of the stream before and after it, and close the gates of later sites where their cosine reaches a
threshold (:class:`skipc.kernels.chain.Gates`): the program that leaves last adds up and decides, so that a similarity
costs no launch and the host never waits for a decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.phases import arrive, is_last, reset, take_ticket, wait
from skipc.kernels.gpu.rounding import by_hand, rounded
from skipc.kernels.gpu.workspace import counters
from skipc.kernels.tables import Choice

MOST_ROWS = 16  # that a launch takes
NO_ACTIVATION = -1


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """By number: see :data:`skipc.kernels.linear.ACTIVATIONS`."""
    if ACTIVATION == 0:
        g = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == 1:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        e = tl.exp(-2.0 * tl.abs(z))
        t = (1.0 - e) / (1.0 + e)
        g = 0.5 * g * (1.0 + tl.where(z < 0, -t, t))
    elif ACTIVATION == 2:
        g = tl.maximum(g, 0.0)
    return g


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
    row = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.zeros([BLOCK_M], tl.float32)
    if HAS_NORM:
        factor = factor_of(x, x_stride, rows, k, eps, BLOCK_M, BLOCK_X)
    total, _ = products(
        x, x_stride, rows, k, norm, factor, weight, weight_stride, weight, weight_stride, n, n_size,
        HAS_NORM, False, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (n < n_size)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_size, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        before = residual + (row * residual_stride)[:, None] + n[None, :]
        total += tl.load(before, mask=inside, other=0.0).to(tl.float32)
    made = rounded(total, out.dtype.element_ty, BY_HAND)
    tl.store(out + (row * out_stride)[:, None] + n[None, :], made, mask=inside)


@triton.jit
def decide(
    moments, skipped, closes, threshold, rule, sites, valid, rows,
    HAS_VALID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Close the gates that a site decides about, if the tokens of a call are similar enough (see
    :func:`skipc.kernels.similarity.reached`)."""
    row = tl.arange(0, BLOCK_M)
    there = row < rows
    if HAS_VALID:
        there = there & (tl.load(valid + row, mask=there, other=0) != 0)
    dot = tl.load(moments + 3 * row, mask=there, other=0.0)
    before = tl.load(moments + 3 * row + 1, mask=there, other=0.0)
    after = tl.load(moments + 3 * row + 2, mask=there, other=0.0)
    cosine = dot / tl.maximum(tl.sqrt_rn(before) * tl.sqrt_rn(after), 1e-12)
    count = tl.sum(there.to(tl.int32), 0)
    above = tl.sum((there & (cosine >= threshold)).to(tl.int32), 0)
    mean = tl.sum(tl.where(there, cosine, 0.0), 0) / tl.maximum(count, 1)
    # 0: all tokens; 1: most; 2: their mean (RULE_CODES).
    met = tl.where(rule == 0, above == count, tl.where(rule == 1, 2 * above > count, mean >= threshold))
    if met & (count > 0):
        for begin in range(0, sites, BLOCK_S):
            at = begin + tl.arange(0, BLOCK_S)
            closing = tl.load(closes + at, mask=at < sites, other=0)
            kept = tl.load(skipped + at, mask=at < sites, other=0)
            tl.store(skipped + at, tl.where(closing != 0, 1, kept).to(kept.dtype), mask=at < sites)


@triton.jit
def mlp_rows(
    x, x_stride, rows, k, norm, eps, gate, gate_stride, up, up_stride, inner, down, down_stride, n_size, bias,
    residual, residual_stride, out, out_stride, hidden, sync,
    skipped, site, sites, planes, moments, closes, threshold, rule, valid,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, MEASURES: tl.constexpr, DECIDES: tl.constexpr,
    HAS_VALID: tl.constexpr, WIDEN: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    if GATED:
        if tl.load(skipped + site) != 0:
            return  # before a ticket is taken: all programs see the same, and leave nothing behind
    row = tl.arange(0, BLOCK_M)
    firsts = tl.cdiv(inner, BLOCK_I)
    seconds = tl.cdiv(n_size, BLOCK_N)
    program = take_ticket(sync)
    factor = tl.zeros([BLOCK_M], tl.float32)
    if program < firsts:
        i = program * BLOCK_I + tl.arange(0, BLOCK_I)
        if HAS_NORM:
            factor = factor_of(x, x_stride, rows, k, eps, BLOCK_M, BLOCK_X)
        g, u = products(
            x, x_stride, rows, k, norm, factor, gate, gate_stride, up, up_stride, i, inner,
            HAS_NORM, HAS_UP, WIDEN, BLOCK_M, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        g = activate(g, ACTIVATION)
        if HAS_UP:
            g = g * u
        inside = (row < rows)[:, None] & (i < inner)[None, :]
        g = rounded(g, hidden.dtype.element_ty, BY_HAND)
        tl.store(hidden + (row * inner)[:, None] + i[None, :], g, mask=inside)
        arrive(sync, 0)
    else:
        tile = program - firsts
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        wait(sync, 0, firsts)
        total, _ = products(
            hidden, inner, rows, inner, norm, factor, down, down_stride, down, down_stride, n, n_size,
            False, False, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        inside = (row < rows)[:, None] & (n < n_size)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < n_size, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            before = tl.load(residual + (row * residual_stride)[:, None] + n[None, :], mask=inside, other=0.0)
            before = before.to(tl.float32)
            total += before
        made = rounded(total, out.dtype.element_ty, BY_HAND)
        tl.store(out + (row * out_stride)[:, None] + n[None, :], made, mask=inside)
        if MEASURES:
            after = tl.where(inside, made.to(tl.float32), 0.0)
            plane = planes + (tile * rows + row) * 3
            tl.store(plane, tl.sum(before * after, 1), mask=row < rows)
            tl.store(plane + 1, tl.sum(before * before, 1), mask=row < rows)
            tl.store(plane + 2, tl.sum(after * after, 1), mask=row < rows)
    if is_last(sync, firsts + seconds):
        if MEASURES:
            sums = moments + 3 * row
            dot = tl.zeros([BLOCK_M], tl.float32)
            squares = tl.zeros([BLOCK_M], tl.float32)
            later = tl.zeros([BLOCK_M], tl.float32)
            for tile in range(seconds):
                plane = planes + (tile * rows + row) * 3
                dot += tl.load(plane, mask=row < rows, other=0.0)
                squares += tl.load(plane + 1, mask=row < rows, other=0.0)
                later += tl.load(plane + 2, mask=row < rows, other=0.0)
            tl.store(sums, dot, mask=row < rows)
            tl.store(sums + 1, squares, mask=row < rows)
            tl.store(sums + 2, later, mask=row < rows)
            if DECIDES:
                tl.debug_barrier()
                decide(moments, skipped, closes, threshold, rule, sites, valid, rows, HAS_VALID, BLOCK_M, 64)
        reset(sync, 1)


def _linear_steps(sizes: Mapping[str, int], choice: Choice) -> float:
    k, c = sizes["k"], choice.constants
    blocks = -(-k // c["BLOCK_K"])
    return 2 + -(-k // c["BLOCK_X"]) + blocks / (choice.stages if sizes["rows"] > 1 else 1)


def _mlp_steps(sizes: Mapping[str, int], choice: Choice) -> float:
    """Of both phases."""
    second = -(-sizes["inner"] // choice.constants["BLOCK_K"]) / (choice.stages if sizes["rows"] > 1 else 1)
    return _linear_steps(sizes, choice) + 4 + second


_SPACE = {"BLOCK_N": (8, 16, 32), "BLOCK_K": (128, 256, 512), "BLOCK_X": (512, 1024), "warps": (2, 4, 8),
          "stages": (1, 2, 3)}  # fmt: skip
LINEAR = Kernel(
    "linear_rows", linear_rows, ("rows", "k", "n", "bits"), _SPACE, Choice(constants={"BLOCK_N": 16, "BLOCK_K": 256,
    "BLOCK_X": 512}, warps=4, stages=2), (factor_of, products, rounded), _linear_steps,
)  # fmt: skip
MLP = Kernel(
    "mlp_rows", mlp_rows, ("rows", "k", "inner", "n", "bits"), {"BLOCK_I": (8, 16, 32), **_SPACE},
    Choice(constants={"BLOCK_I": 16, "BLOCK_N": 16, "BLOCK_K": 256, "BLOCK_X": 512}, warps=4, stages=2),
    (factor_of, products, activate, decide, rounded, arrive, is_last, reset, take_ticket, wait), _mlp_steps,
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """What a site does about gates on the device.

    Attributes:
        skipped: int8 ``[sites]``: sites that are skipped, not zero; what this one decides is added.
        site: which one this is.
        moments: fp32 ``[rows, 3]``, written where the site runs; None if nobody wants them.
        closes: int8 ``[sites]``: gates that it closes, not zero; None if it decides nothing.
        threshold, rule: of :func:`skipc.kernels.similarity.reached`, as numbers.
        valid: bool ``[rows]``, False for padding; None if there is none.
    """

    skipped: torch.Tensor
    site: int
    moments: torch.Tensor | None = None
    closes: torch.Tensor | None = None
    threshold: float = 2.0
    rule: int = 0
    valid: torch.Tensor | None = None


def _widen(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 or by_hand(x.dtype)


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
        "WIDEN": _widen(x), "BY_HAND": by_hand(x.dtype), "BLOCK_M": _rows(rows),
    }  # fmt: skip
    moved = x.element_size() * (n * k + rows * (k + n * (2 if residual is not None else 1)))
    grid = (triton.cdiv(n, choice.constants["BLOCK_N"]),)
    launch(LINEAR, choice, grid, given, sizes=sizes, moved=moved, operations=2 * rows * n * k)
    return out


def _rows(rows: int) -> int:
    """Rows of a tile: one, or what tensor cores take."""
    if rows > MOST_ROWS:
        raise RuntimeError(f"a launch takes {MOST_ROWS} rows at most, not {rows}")
    return 1 if rows == 1 else MOST_ROWS


def mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up: torch.Tensor | None,
    down: torch.Tensor,
    activation: int,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    gate: Gate | None = None,
) -> torch.Tensor:
    """``(act(h @ gate_weight.T) * (h @ up.T)) @ down.T + bias + residual`` with ``h = rms_norm(x)``, or ``out`` as it
    was if ``gate`` says that the site is skipped.

    Args:
        x: ``[rows, k]``, at most 16, floating; rows are contiguous.
        gate_weight, up: ``[inner, k]``; without ``up`` there is no product.
        down, bias: ``[n, inner]`` and ``[n]``.
        activation: a value of :data:`skipc.kernels.linear.ACTIVATIONS`, or :data:`NO_ACTIVATION`.
        norm, eps: of an RMS norm of ``x``.
        residual: ``[rows, n]``; may be ``x``.
        out: ``[rows, n]``; may be ``residual`` and ``x``, in place. Made, if None.
        gate: with moments, ``residual`` is the stream before and ``out`` the one after.
    """
    (rows, k), (n, inner) = x.shape, down.shape
    if out is None:
        out = x.new_empty(rows, n)
    sizes = {"rows": rows, "k": k, "inner": inner, "n": n, "bits": 8 * x.element_size()}
    choice = pick(MLP, x, **sizes)
    firsts, seconds = triton.cdiv(inner, choice.constants["BLOCK_I"]), triton.cdiv(n, choice.constants["BLOCK_N"])
    measures = gate is not None and gate.moments is not None
    given: dict[str, Any] = {
        "x": x, "x_stride": x.stride(0), "rows": rows, "k": k, "norm": norm, "eps": eps, "gate": gate_weight,
        "gate_stride": gate_weight.stride(0), "up": up, "up_stride": 0 if up is None else up.stride(0), "inner": inner,
        "down": down, "down_stride": down.stride(0), "n_size": n, "bias": bias, "residual": residual, "residual_stride":
        0 if residual is None else residual.stride(0), "out": out, "out_stride": out.stride(0), "hidden":
        x.new_empty(rows, inner), "sync": counters(x), "skipped": None if gate is None else gate.skipped, "site": 0 if
        gate is None else gate.site, "sites": 0 if gate is None else len(gate.skipped), "planes": x.new_empty(seconds *
        rows * 3, dtype=torch.float32) if measures else None, "moments": None if gate is None else gate.moments,
        "closes": None if gate is None else gate.closes, "threshold": 0.0 if gate is None else gate.threshold, "rule": 0
        if gate is None else gate.rule, "valid": None if gate is None else gate.valid, "ACTIVATION": activation,
        "HAS_UP": up is not None, "HAS_NORM": norm is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual
        is not None, "GATED": gate is not None, "MEASURES": measures, "DECIDES": measures and gate is not None and
        gate.closes is not None, "HAS_VALID": gate is not None and gate.valid is not None, "WIDEN": _widen(x),
        "BY_HAND": by_hand(x.dtype), "BLOCK_M": _rows(rows),
    }  # fmt: skip
    weights = inner * k * (1 if up is None else 2) + n * inner
    moved = x.element_size() * (weights + rows * (k + n * (2 if residual is not None else 1)))
    launch(MLP, choice, (firsts + seconds,), given, sizes=sizes, moved=moved, operations=2 * rows * weights)
    return out


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Gated MLPs that may be skipped and that decide, whole and thin; low-rank maps; and linear layers, of SmolLM2-135M
    and of Llama 3 8B."""
    for model, width, inner in (("smollm2", 576, 1536), ("llama3", 4096, 14336)):
        for rows in (1, 8):
            yield f"{model}, {rows} rows, MLP", partial(_example, rows, width, inner, True, dtype)
            yield f"{model}, {rows} rows, thin MLP", partial(_example, rows, width, inner // 4, True, dtype)
            yield f"{model}, {rows} rows, low rank", partial(_example, rows, width, 64, False, dtype)
            yield f"{model}, {rows} rows, linear", partial(_linear_example, rows, width, inner, dtype)


def _example(rows: int, width: int, inner: int, gated: bool, dtype: torch.dtype, device: str) -> Callable[[], object]:
    x, norm = random(rows, width, dtype=dtype, device=device), random(width, dtype=dtype, device=device)
    first, up = (random(inner, width, dtype=dtype, device=device) for _ in range(2))
    down, out = random(width, inner, dtype=dtype, device=device), torch.empty_like(x)
    flags, moments = torch.zeros(60, dtype=torch.int8, device=device), torch.zeros(rows, 3, device=device)
    gate = Gate(flags, 3, moments, torch.zeros_like(flags), 2.0)
    if gated:
        return lambda: mlp(x, first, up, down, 0, norm, 1e-5, None, x, out, gate)
    return lambda: mlp(x, first, None, down, NO_ACTIVATION, norm, 1e-5, norm, x, out)


def _linear_example(rows: int, width: int, inner: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    x, norm = random(rows, width, dtype=dtype, device=device), random(width, dtype=dtype, device=device)
    weight, out = random(inner, width, dtype=dtype, device=device), random(rows, inner, dtype=dtype, device=device)
    gate = Gate(torch.zeros(60, dtype=torch.int8, device=device), 3)
    return lambda: linear(x, weight, None, norm, 1e-5, out=out, gate=gate)
