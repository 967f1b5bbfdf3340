"""MLPs and linear layers on GPUs that may be told not to run, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skipc.kernels.gpu import linear, mlp
from skipc.kernels.gpu.gates import Gate
from skipc.kernels.gpu.kernel import forced, recorded
from skipc.kernels.similarity import RULE_CODES, reached, stream_moments
from skipc.kernels.tables import Choice

from tests.kernels.gpu import DTYPES, a_gpu, assert_close

SMALL = {
    "mlp_rows": Choice(constants={"BLOCK_I": 16, "BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_X": 32}),
    "linear_rows": Choice(constants={"BLOCK_N": 16, "BLOCK_K": 32, "BLOCK_X": 32}),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with a_gpu(), forced(SMALL):
        yield


class Weights:
    """Of a gated MLP."""

    def __init__(self, dtype: torch.dtype, k: int = 70, inner: int = 50):
        self.norm = (torch.rand(k) + 0.5).to(dtype)
        self.gate, self.up = (torch.randn(inner, k).div(8).to(dtype) for _ in range(2))
        self.down = torch.randn(k, inner).div(8).to(dtype)

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_dtype(x, x.dtype)

    def truth(self, x: torch.Tensor) -> torch.Tensor:
        return self.in_dtype(x, torch.float64)

    def in_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        x, norm, gate, up, down = (t.to(dtype) for t in (x, self.norm, self.gate, self.up, self.down))
        h = F.rms_norm(x, x.shape[-1:], norm, 1e-5)
        return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)

    def run(self, x: torch.Tensor, gate: mlp.Gate | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        return mlp.mlp(x, self.gate, self.up, self.down, 0, self.norm, 1e-5, residual=x, out=out, gate=gate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_gated_mlp(dtype: torch.dtype, rows: int) -> None:
    weights, x = Weights(dtype), torch.randn(rows, 70).to(dtype)
    assert_close(weights.run(x), weights.truth(x), weights.eager(x))


@pytest.mark.parametrize("activation", [mlp.NO_ACTIVATION, 0, 1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_activations_and_low_rank(activation: int, rows: int) -> None:
    x, a, b, bias = torch.randn(rows, 40), torch.randn(6, 40), torch.randn(33, 6), torch.randn(33)
    acts: dict[int, Any] = {-1: lambda t: t, 0: F.silu, 1: lambda t: F.gelu(t, approximate="tanh"), 2: F.relu}
    residual = torch.randn(rows, 33)
    made = mlp.mlp(x, a, None, b, activation, bias=bias, residual=residual)
    truth = F.linear(acts[activation](F.linear(x.double(), a.double())), b.double(), bias.double()) + residual.double()
    assert_close(made, truth, (F.linear(acts[activation](F.linear(x, a)), b, bias) + residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_linear(dtype: torch.dtype, rows: int) -> None:
    x, w, bias, norm = (torch.randn(*s).to(dtype) for s in ((rows, 70), (35, 70), (35,), (70,)))
    residual = torch.randn(rows, 35).to(dtype)
    made = linear.linear(x, w, bias, norm, 1e-5, residual)

    def torchs(
        x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, norm: torch.Tensor, r: torch.Tensor
    ) -> torch.Tensor:
        return F.linear(F.rms_norm(x, (70,), norm, 1e-5), w, bias) + r

    values = (x, w, bias, norm, residual)
    assert_close(made, torchs(*(t.double() for t in values)), torchs(*values))


def test_rows_of_a_larger_tensor() -> None:
    weights, wide = Weights(torch.float32), torch.randn(4, 200)
    x = wide[:, 30:100]
    truth, eager = weights.truth(x), weights.eager(x)
    assert_close(weights.run(x, out=x), truth, eager)
    assert wide[:, :30].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_skipped_site_touches_nothing(rows: int) -> None:
    weights, x = Weights(torch.float32), torch.randn(rows, 70)
    weights.down.fill_(torch.nan)  # not even read
    flags, moments = torch.tensor([0, 1, 0], dtype=torch.int8), torch.full((rows, 3), 7.0)
    before = x.clone()
    with recorded() as launches:
        weights.run(x, Gate(flags, 1, moments, torch.ones(3, dtype=torch.int8), -2.0), out=x)
    assert len(launches) == 1
    assert torch.equal(x, before)
    assert (moments == 7).all()
    assert flags.tolist() == [0, 1, 0]
    assert torch.equal(weights.run(x, Gate(flags, 1)), before)  # elsewhere, the stream goes on
    out = torch.full((rows, 70), 5.0)
    linear.linear(x[:, :50], weights.down, out=out, gate=Gate(flags, 1))
    assert (out == 5).all()


@pytest.mark.parametrize("rule", list(RULE_CODES))
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_gates_close_as_on_the_host(rule: Any, rows: int, padded: bool) -> None:
    weights, x = Weights(torch.float32), torch.randn(rows, 70)
    valid = torch.arange(rows) != 0 if padded else None
    closes = torch.zeros(70, dtype=torch.int8)
    closes[[2, 69]] = 1
    after = weights.run(x)
    found = stream_moments(x, after)
    cosines = (found[:, 0] / (found[:, 1] * found[:, 2]).sqrt()).tolist()
    for threshold in (min(cosines) - 1e-3, sorted(cosines)[len(cosines) // 2] + 1e-4, max(cosines) + 1e-3):
        flags, moments = torch.zeros(70, dtype=torch.int8), torch.full((rows, 3), torch.nan)
        stream = x.clone()
        weights.run(stream, Gate(flags, 0, moments, closes, threshold, RULE_CODES[rule], valid), out=stream)
        assert torch.equal(stream, after)
        torch.testing.assert_close(moments, found, rtol=1e-5, atol=1e-5)
        assert bool(flags.any()) == reached(found, threshold, rule, valid)
        assert flags.nonzero().flatten().tolist() in ([], [2, 69])


def test_more_rows_than_a_launch_takes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="16 rows at most"):
        Weights(torch.float32).run(torch.randn(17, 70))
