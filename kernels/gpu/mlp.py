"""MLPs of a few rows in one launch: ``act(h @ gate.T) * (h @ up.T)`` with ``h = rms_norm(x)``, then ``@ down.T + b +
residual``, the neurons in a first phase and the outputs in a second, unless a gate on the device is closed
(:mod:`skipc.kernels.gpu.gates`). Without activation and ``up`` it is a low-rank map (an arm that a plan puts in the
place of a sublayer); with fewer neurons, a thin MLP. Weights are read once.

A site can also take the moments of the stream before and after it, and close the gates of later ones where their cosine
reaches a threshold: the program that leaves last adds up and decides, so that a similarity costs no launch and the host
never waits for a decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu import linear
from skipc.kernels.gpu.gates import Gate, decide
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.gpu.linear import factor_of, finished, products, tile_rows
from skipc.kernels.gpu.phases import arrive, is_last, reset, take_ticket, wait
from skipc.kernels.gpu.rounding import by_hand, rounded, widens
from skipc.kernels.gpu.workspace import counters
from skipc.kernels.tables import Choice

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
def pass_on(residual, residual_stride, out, out_stride, rows, n, n_size, BLOCK_M: tl.constexpr):
    """``out = residual`` in columns ``n``; negative ones are nobody's."""
    row = tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None] & ((n >= 0) & (n < n_size))[None, :]
    kept = tl.load(residual + (row * residual_stride)[:, None] + n[None, :], mask=inside)
    tl.store(out + (row * out_stride)[:, None] + n[None, :], kept, mask=inside)


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
    row = tl.arange(0, BLOCK_M)
    firsts = tl.cdiv(inner, BLOCK_I)
    seconds = tl.cdiv(n_size, BLOCK_N)
    if GATED:
        if tl.load(skipped + site) != 0:
            if HAS_RESIDUAL:
                n = (tl.program_id(0) - firsts) * BLOCK_N + tl.arange(0, BLOCK_N)
                pass_on(residual, residual_stride, out, out_stride, rows, n, n_size, BLOCK_M)
            return  # before a ticket is taken: all programs see the same, and leave nothing behind
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
        before, made = finished(
            total, bias, residual, residual_stride, out, out_stride, rows, n, n_size, HAS_BIAS, HAS_RESIDUAL, BY_HAND,
            BLOCK_M,
        )  # fmt: skip
        if MEASURES:
            after = tl.where((n < n_size)[None, :], made.to(tl.float32), 0.0)
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


def _steps(sizes: Mapping[str, int], choice: Choice) -> float:
    """Of both phases."""
    second = -(-sizes["inner"] // choice.constants["BLOCK_K"]) / (choice.stages if sizes["rows"] > 1 else 1)
    return linear.steps(sizes, choice) + 4 + second


MLP = Kernel(
    "mlp_rows", mlp_rows, ("rows", "k", "inner", "n", "bits"), {"BLOCK_I": (8, 16, 32), **linear.SPACE},
    Choice(constants={"BLOCK_I": 16, "BLOCK_N": 16, "BLOCK_K": 256, "BLOCK_X": 512}, warps=4, stages=2),
    (factor_of, products, finished, activate, decide, pass_on, rounded, arrive, is_last, reset, take_ticket, wait),
    _steps,
)  # fmt: skip


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
    """``(act(h @ gate_weight.T) * (h @ up.T)) @ down.T + bias + residual`` with ``h = rms_norm(x)``; if ``gate`` says
    that the site is skipped, ``residual``, or without one ``out`` as it was.

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
        gate.closes is not None, "HAS_VALID": gate is not None and gate.valid is not None, "WIDEN": widens(x.dtype),
        "BY_HAND": by_hand(x.dtype), "BLOCK_M": tile_rows(rows),
    }  # fmt: skip
    weights = inner * k * (1 if up is None else 2) + n * inner
    moved = x.element_size() * (weights + rows * (k + n * (2 if residual is not None else 1)))
    launch(MLP, choice, (firsts + seconds,), given, sizes=sizes, moved=moved, operations=2 * rows * weights)
    return out


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """Gated MLPs that may be skipped and that decide, whole and thin, and low-rank maps, of SmolLM2-135M and of
    Llama 3 8B."""
    for model, width, inner in (("smollm2", 576, 1536), ("llama3", 4096, 14336)):
        for rows in (1, 8):
            yield f"{model}, {rows} rows, MLP", partial(_example, rows, width, inner, True, dtype)
            yield f"{model}, {rows} rows, thin MLP", partial(_example, rows, width, inner // 4, True, dtype)
            yield f"{model}, {rows} rows, low rank", partial(_example, rows, width, 64, False, dtype)


def _example(rows: int, width: int, inner: int, gated: bool, dtype: torch.dtype, device: str) -> Callable[[], object]:
    x, norm = random(rows, width, dtype=dtype, device=device), random(width, dtype=dtype, device=device)
    first, up = (random(inner, width, dtype=dtype, device=device) for _ in range(2))
    down, out = random(width, inner, dtype=dtype, device=device), torch.empty_like(x)
    flags, moments = torch.zeros(60, dtype=torch.int8, device=device), torch.zeros(rows, 3, device=device)
    gate = Gate(flags, 3, moments, torch.zeros_like(flags), 2.0)
    if gated:
        return lambda: mlp(x, first, up, down, 0, norm, 1e-5, None, x, out, gate)
    return lambda: mlp(x, first, None, down, NO_ACTIVATION, norm, 1e-5, norm, x, out)
