"""The skinny linear kernel against fp64, and against itself with other company."""

from __future__ import annotations

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.linear import skinny_linear
from torch.nn import functional as F

from tests.harness import assert_no_further

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _built() -> None:
    assert native.available() is None


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
    found = torch.ops.skipc.skinny_linear(x, weights, biases)
    wide = [None if b is None else b.double() for b in biases]
    assert_no_further(
        skinny_linear(x.double(), [w.double() for w in weights], wide), skinny_linear(x, weights, biases), found
    )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    x, weights, biases = case(16, 100, [37, 64], dtype)
    alone = torch.cat([torch.ops.skipc.skinny_linear(x[i : i + 1], weights, biases) for i in range(16)])
    for rows in range(1, 17):
        assert torch.equal(torch.ops.skipc.skinny_linear(x[:rows].contiguous(), weights, biases), alone[:rows])
    one_by_one = [torch.ops.skipc.skinny_linear(x, [w], [b]) for w, b in zip(weights, biases, strict=True)]
    assert torch.equal(torch.cat(one_by_one, -1), torch.ops.skipc.skinny_linear(x, weights, biases))


@needs_compiler
def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weights, biases = case(3, 576, [576, 192], torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(torch.ops.skipc.skinny_linear(x, weights, biases))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


@needs_compiler
def test_leading_dimensions_strided_weights_and_special_values() -> None:
    x = torch.randn(2, 3, 40)
    w = torch.randn(6, 80)[:, :40]  # rows are contiguous, the matrix is not
    torch.testing.assert_close(torch.ops.skipc.skinny_linear(x, [w], [None]), F.linear(x, w))
    x[0, 0, 0], x[1, 0, 0] = float("nan"), float("inf")
    found = torch.ops.skipc.skinny_linear(x.bfloat16(), [w.bfloat16().clone()], [None])
    assert found[0, 0].isnan().all()
    assert found[1, 0].isinf().all()
    assert torch.ops.skipc.skinny_linear(torch.randn(0, 40), [w], [None]).shape == (0, 6)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.skipc.skinny_linear(torch.randn(40, 3).t(), [w], [None])


@needs_compiler
def test_registration() -> None:
    args = (torch.randn(2, 1, 16), [torch.randn(4, 16), torch.randn(3, 16)], [None, torch.randn(3)])
    torch.library.opcheck(torch.ops.skipc.skinny_linear.default, args, test_utils=("test_schema", "test_faketensor"))
