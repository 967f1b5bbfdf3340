"""Norms on GPUs, with and without the residual addition, under Triton's interpreter, beside the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skipc.kernels import norms as reference
from skipc.kernels.device import simulated
from skipc.kernels.gpu import norms
from skipc.kernels.gpu.kernel import forced, recorded
from skipc.kernels.similarity import stream_moments
from skipc.kernels.tables import Choice

from tests.kernels.gpu import DTYPES, assert_close

WIDTHS = (1, 2, 7, 16, 17, 80, 96, 576, 1000)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with nullcontext() if request.function is test_ops_on_the_cpu else simulated():
        yield


def blocks_of(size: int) -> dict[str, Choice]:
    return {"add_norm": Choice(constants={"BLOCK": size})}


def double(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.double()


def check(
    x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    kind: str, block: int, eps: float = 1e-5, offset: float = 0.0, scale: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    with forced(blocks_of(block)), recorded() as launches:
        made = norms.add_norm(x, branch, weight, bias, eps, kind, offset, scale)
    assert len(launches) == bool(x.numel())
    total, out, moments = made
    if branch is None:
        assert total is x
        assert moments is None
        total = x
    else:
        exact = x.double() + scale * branch.double()
        assert total.shape == x.shape
        assert_close(total, exact, (x.float() + scale * branch.float()).to(x.dtype))
        mine = torch.stack(
            [(x.double() * total.double()).sum(-1), x.double().square().sum(-1), total.double().square().sum(-1)], -1
        )
        assert moments.dtype == torch.float32
        sizes = torch.stack([mine[..., 1:].prod(-1).sqrt(), mine[..., 1], mine[..., 2]], -1)
        assert ((moments.double() - mine).abs() <= 1e-6 * sizes + 1e-12).all()
    # The norm is of the sum as it was rounded.
    truth = reference.norm_rows(total.double(), double(weight), double(bias), eps, kind, offset)
    assert_close(out, truth, reference.norm_rows(total, weight, bias, eps, kind, offset))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_sum_norm_and_moments(width: int, kind: str, dtype: torch.dtype) -> None:
    x, branch = (torch.randn(2, 3, width).to(dtype) for _ in range(2))
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if kind == "layer" else None
    for block in (16 if width < 100 else 256, 1024):
        check(x, branch, weight, bias, kind, block, scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.KINDS)
def test_norm_alone_with_and_without_parameters(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 100).to(dtype)
    for weight, bias, offset in ((None, None, 0.0), (torch.randn(100), None, 1.0), (None, torch.randn(100), 0.0)):
        for block in (32, 128):  # parameters in fp32, whatever the stream is in
            check(x, None, weight, bias, kind, block, offset=offset)


def test_sums_are_rounded_like_torch() -> None:
    """The stream is what eager makes of it, bit for bit, in every dtype."""
    for dtype in DTYPES:
        x, branch = torch.randn(4, 200).to(dtype), torch.randn(4, 200).to(dtype)
        total, _, _ = check(x, branch, None, None, "rms", 64)
        assert torch.equal(total, x + branch)


def test_rows_far_from_zero() -> None:
    """The variance of a row whose mean is large, in blocks and in one. (Of the mean there are 7 digits.)"""
    x = 1000 + torch.randn(2, 1000)
    truth = reference.norm_rows(x.double(), None, None, 1e-5, "layer")
    for block in (1024, 64):
        with forced(blocks_of(block)):
            _, out, _ = norms.add_norm(x, None, None, None, 1e-5, "layer")
        assert (out - truth).abs().max() < 1000 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("block", [64, 512])
def test_rows_apart_in_memory(block: int) -> None:
    x, branch = torch.randn(5, 700)[:, 100:400], torch.randn(300, 5).T
    check(x, branch, torch.randn(600)[::2], None, "rms", block)
    check(torch.randn(2, 5, 400)[:, ::2, :300], torch.randn(5, 2, 3, 300)[..., 0, :].transpose(0, 1)[:, :3], None, None,
          "layer", block)  # fmt: skip


def test_no_rows_and_zeros() -> None:
    check(torch.randn(0, 64), torch.randn(0, 64), torch.randn(64), None, "rms", 64)
    for kind in reference.KINDS:
        check(torch.zeros(2, 50), torch.zeros(2, 50), torch.randn(50), None, kind, 16)


def test_same_bits_twice_and_beside_other_rows() -> None:
    x, branch = torch.randn(4, 300), torch.randn(4, 300)
    for block in (64, 512):
        first, again = (check(x, branch, None, None, "layer", block) for _ in range(2))
        alone = check(x[2:3], branch[2:3], None, None, "layer", block)
        for a, b, c in zip(first, again, alone, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[2:3], c)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, branch = torch.randn(3, 40), torch.randn(3, 40)
    branch[1, 7] = torch.nan
    with forced(blocks_of(16)):
        total, out, moments = norms.add_norm(x, branch, None, None, 1e-5, "rms")
    assert moments is not None
    for t in (total, out, moments):
        assert torch.isfinite(t[[0, 2]]).all()
    assert out[1].isnan().all()
    assert moments[1, [0, 2]].isnan().all()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3), width=st.integers(1, 130), kind=st.sampled_from(reference.KINDS),
    block=st.sampled_from([16, 32, 128]), dtype=st.sampled_from(DTYPES), adds=st.booleans(),
    weighted=st.booleans(), offset=st.sampled_from([0.0, 1.0]), scale=st.sampled_from([1.0, -0.5]),
)  # fmt: skip
def test_any_shape(
    rows: int, width: int, kind: str, block: int, dtype: torch.dtype, adds: bool, weighted: bool, offset: float,
    scale: float,
) -> None:  # fmt: skip
    x, branch = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype) if adds else None
    check(x, branch, torch.randn(width).to(dtype) if weighted else None, None, kind, block, 1e-3, offset, scale)


def test_refused() -> None:
    with pytest.raises(ValueError, match="none of"):
        norms.add_norm(torch.randn(2, 4), None, None, None, 1e-5, "group")


def test_ops_on_the_cpu() -> None:
    x, branch, weight = torch.randn(2, 3, 64), torch.randn(2, 3, 64), torch.randn(64)
    ops = torch.ops.skipc
    given = (weight, None, 1e-5, "rms", 0.0)
    torch.library.opcheck(ops.norm_rows.default, (x, *given))
    torch.library.opcheck(ops.add_norm.default, (x, branch, *given, 1.0))
    total, out, moments = ops.add_norm(x, branch, *given, 1.0)
    assert torch.equal(out, ops.norm_rows(total, *given))
    torch.testing.assert_close(out, torch.rms_norm(x + branch, (64,), weight, 1e-5))
    torch.testing.assert_close(
        ops.norm_rows(x, weight, weight, 1e-5, "layer", 0.0), torch.layer_norm(x, (64,), weight, weight, 1e-5)
    )
    assert torch.equal(moments, stream_moments(x, total))
