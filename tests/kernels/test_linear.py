"""The skinny linear kernel against fp64, and against itself with other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.linear import ACTIVATIONS, gated_mlp, skinny_linear
from torch.nn import functional as F

from tests.harness import assert_no_further

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _built(products: None) -> None:
    assert native.available() is None


def linears(
    x: torch.Tensor, weights: list, biases: list, norm: Any = None, eps: float = 0.0, residual: Any = None
) -> Any:
    return torch.ops.skipc.skinny_linear(x, weights, biases, norm, eps, residual, [])


def case(rows: int, width: int, heights: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, list, list]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    weights = [torch.randn(n, width, generator=generator).to(dtype) for n in heights]
    biases = [torch.randn(n, generator=generator).to(dtype) if i % 2 == 0 else None for i, n in enumerate(heights)]
    return x, weights, biases


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 16])
@pytest.mark.parametrize(("width", "heights"), [(576, [576, 192, 192]), (33, [3, 9]), (7, [1]), (1, [5]), (160, [8])])
def test_against_fp64(rows: int, width: int, heights: list[int], dtype: torch.dtype) -> None:
    x, weights, biases = case(rows, width, heights, dtype)
    found = linears(x, weights, biases)
    wide = [None if b is None else b.double() for b in biases]
    exact = torch.cat([F.linear(x.double(), w.double(), b) for w, b in zip(weights, wide, strict=True)], -1)
    eager = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    assert_no_further(exact, eager, found)
    assert_no_further(exact, eager, skinny_linear(x, weights, biases))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    x, weights, biases = case(35, 100, [37, 64], dtype)
    alone = torch.cat([linears(x[i : i + 1], weights, biases) for i in range(35)])
    for rows in (*range(1, 18), 32, 35):
        assert torch.equal(linears(x[:rows].contiguous(), weights, biases), alone[:rows])
    one_by_one = [linears(x, [w], [b]) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(torch.cat(one_by_one, -1), linears(x, weights, biases))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    x, weights, biases = case(3, 576, [576, 190], dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(linears(x, weights, biases))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


@needs_compiler
def test_leading_dimensions_strided_weights_and_special_values() -> None:
    x = torch.randn(2, 3, 40)
    w = torch.randn(6, 80)[:, :40]  # rows are contiguous, the matrix is not
    torch.testing.assert_close(linears(x, [w], [None]), F.linear(x, w))
    x[0, 0, 0], x[1, 0, 0] = float("nan"), float("inf")
    found = linears(x.bfloat16(), [w.bfloat16().clone()], [None])
    assert found[0, 0].isnan().all()
    assert found[1, 0].isinf().all()
    assert linears(torch.randn(0, 40), [w], [None]).shape == (0, 6)
    with pytest.raises(RuntimeError, match="contiguous"):
        linears(torch.randn(40, 3).t(), [w], [None])


@needs_compiler
def test_a_value_that_is_no_number_stays_where_it_is() -> None:
    x, (w,), _ = case(5, 97, [37], torch.bfloat16)
    clean = linears(x, [w], [None])
    x[2, 40], w[20, 3], w[20, 96] = float("nan"), float("inf"), float("nan")
    found = linears(x, [w], [None])
    assert found[2].isnan().all()
    assert found[:, 20].isnan().all()
    others = torch.ones(5, 37, dtype=torch.bool)
    others[2], others[:, 20] = False, False
    assert torch.equal(found[others], clean[others])


@needs_compiler
@pytest.mark.parametrize("count", [5, 16, 31])
def test_weights_end_where_memory_does(count: int) -> None:
    x, (w,), _ = case(3, 64, [count], torch.bfloat16)
    room = torch.full((count + 64, 64), float("nan"), dtype=torch.bfloat16)
    room[:count] = w
    assert torch.equal(linears(x, [room[:count]], [None]), linears(x, [w], [None]))


@needs_compiler
def test_registration() -> None:
    args = (
        torch.randn(2, 1, 16),
        [torch.randn(4, 16), torch.randn(3, 16)],
        [None, torch.randn(3)],
        None,
        0.0,
        None,
        [],
    )
    torch.library.opcheck(torch.ops.skipc.skinny_linear.default, args, test_utils=("test_schema", "test_faketensor"))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("width", [96, 33])
def test_norm_and_residual(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weights, biases = case(rows, width, [40, 7], dtype)
    norm, residual = torch.rand(width).to(dtype) + 0.5, torch.randn(rows, 47).to(dtype)
    wide = [None if b is None else b.double() for b in biases]
    rows64 = F.rms_norm(x.double(), (width,), norm.double(), 1e-5)
    exact = (
        torch.cat([F.linear(rows64, w.double(), b) for w, b in zip(weights, wide, strict=True)], -1) + residual.double()
    )
    eager = F.rms_norm(x, (width,), norm, 1e-5)
    eager = torch.cat([F.linear(eager, w, b) for w, b in zip(weights, biases, strict=True)], -1) + residual
    assert_no_further(exact, eager, linears(x, weights, biases, norm, 1e-5, residual))
    assert_no_further(exact, eager, skinny_linear(x, weights, biases, norm, 1e-5, residual))
    alone = [linears(x[i : i + 1], weights, biases, norm, 1e-5, residual[i : i + 1]) for i in range(rows)]
    assert torch.equal(torch.cat(alone), linears(x, weights, biases, norm, 1e-5, residual))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 576, 1536), (5, 33, 45), (16, 64, 8), (2, 7, 3)])
@pytest.mark.parametrize("fused", [False, True])
def test_gated_mlp(rows: int, width: int, inner: int, activation: str, fused: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, width, generator=generator).to(dtype) * 2 for _ in range(2))
    gate, up = (torch.randn(inner, width, generator=generator).to(dtype) for _ in range(2))
    down = torch.randn(width, inner, generator=generator).to(dtype)
    norm = torch.rand(width, generator=generator).to(dtype) if fused else None

    def plain(x: Any, norm: Any, gate: Any, up: Any, down: Any, residual: Any) -> Any:
        h = x if norm is None else F.rms_norm(x, (width,), norm, 1e-5)
        g = F.linear(h, gate)
        act = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[activation]
        return F.linear(act(g) * F.linear(h, up), down) + (residual if fused else 0)

    args = (x, norm, gate, up, down, residual)
    exact = plain(*(None if a is None else a.double() for a in args))

    def ours(op: Any, i: slice = slice(None)) -> Any:
        code = ACTIVATIONS[activation]
        return op(x[i], norm, 1e-5, gate, up, down, code, residual[i] if fused else None, [])

    found = ours(torch.ops.skipc.gated_mlp)
    assert_no_further(exact, plain(*args), found)
    assert_no_further(exact, plain(*args), ours(gated_mlp))
    assert torch.equal(torch.cat([ours(torch.ops.skipc.gated_mlp, slice(i, i + 1)) for i in range(rows)]), found)
    merged = (
        x,
        norm,
        1e-5,
        torch.cat([gate, up]),
        None,
        down,
        ACTIVATIONS[activation],
        residual if fused else None,
        [],
    )
    assert torch.equal(torch.ops.skipc.gated_mlp(*merged), found)
    assert torch.equal(gated_mlp(*merged), ours(gated_mlp))
    torch.library.opcheck(
        torch.ops.skipc.gated_mlp.default,
        (x, norm, 1e-5, gate, up, down, 0, residual, []),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_compiler
@pytest.mark.parametrize(("gate", "up", "down"), [(8, 8, 9), (8, 7, 8), (8, None, 8), (8, None, 5)])
def test_gated_mlp_of_weights_that_do_not_fit(gate: int, up: int | None, down: int) -> None:
    x, last = torch.randn(2, 16), torch.randn(16, down)
    second = None if up is None else torch.randn(up, 16)
    with pytest.raises(RuntimeError, match="neurons before one of"):
        torch.ops.skipc.gated_mlp(x, None, 0.0, torch.randn(gate, 16), second, last, 0, None, [])
    with pytest.raises(RuntimeError, match="15 columns for rows of 16"):
        torch.ops.skipc.gated_mlp(x, None, 0.0, torch.randn(8, 15), torch.randn(8, 15), torch.randn(16, 8), 0, None, [])
