"""Rows are chosen before the head computes them, where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipc.passes.hoist_slices import HoistSlices
from skipc.passes.ops import op_name
from torch import fx, nn
from torch.nn import functional as F

import skipc
from tests.harness import STRICT, assert_no_further, check_pass, in_double

X, W, G, B = torch.randn(3, 7, 16), torch.randn(40, 16), torch.rand(16), torch.randn(40)


def spelled_norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return G * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


CHOSEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "last": (lambda x: F.linear(x, W)[:, -1], 3),
    "last, kept": (lambda x: F.linear(x, W, B)[:, -1:], 3),
    "ellipsis": (lambda x: F.linear(x, W)[..., 2:4, :], 6),
    "one row of one": (lambda x: F.linear(x, W)[0, 3], 1),
    "every second": (lambda x: F.linear(x, W)[:, ::2], 12),
    "negative": (lambda x: F.linear(x, W)[1:, -3:-1], 4),
    "select": (lambda x: F.linear(x, W).select(1, -2), 3),
    "narrow": (lambda x: torch.narrow(F.linear(x, W), 1, 2, 2), 6),
    "behind a soft cap": (lambda x: (torch.tanh(F.linear(x, W) / 30.0) * 30.0)[:, -1], 3),
    "behind a cast": (lambda x: F.linear(x, W).bfloat16()[:, -1], 3),
    "norm": (lambda x: F.linear(F.rms_norm(x, (16,), G), W)[:, -1], 3),
    "layer norm": (lambda x: F.linear(F.layer_norm(x, (16,), G), W)[:, -1], 3),
    "spelled norm": (lambda x: F.linear(spelled_norm(x), W)[:, -1], 3),
    "two layers": (lambda x: F.linear(F.gelu(F.linear(x, W[:16])), W)[:, -1], 3),
    "behind a sum": (lambda x: F.linear(x + F.silu(x), W)[:, -1], 3),
}


def rows(graph: fx.Graph) -> list[int]:
    """Rows of each linear layer."""
    values = [n.meta["example_value"] for n in graph.nodes if op_name(n) == "linear"]
    return [v.numel() // v.shape[-1] for v in values]


@pytest.mark.parametrize("name", CHOSEN)
def test_matches(name: str) -> None:
    model, count = CHOSEN[name]
    result = check_pass(HoistSlices, model, X, matches=1)
    assert set(rows(result.graph)) == {count}


def written(x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, W)
    last = y[:, -1]
    last.add_(1.0)
    return last


def input_written_between(x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, W)
    x.zero_()
    return y[:, -1]


OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "all rows": lambda x: F.linear(x, W)[:, 0:7],
    "columns": lambda x: F.linear(x, W)[:, -1, :4],
    "a new axis": lambda x: F.linear(x, W)[:, None, -1],
    "by a tensor": lambda x: F.linear(x, W)[torch.arange(3), torch.tensor([1, 2, 3])],
    "read by another": lambda x: (F.linear(x, W)[:, -1], F.linear(x, W).sum()),
    "returned too": lambda x: (lambda y: (y, y[:, -1]))(F.linear(x, W)),
    "rows mixed": lambda x: F.linear(x, W).cumsum(1)[:, -1],
    "rows turned": lambda x: F.linear(x, W).transpose(0, 1)[-1],
    "arguments by name": lambda x: F.linear(input=x, weight=W)[:, -1],
    "no layer": lambda x: (x * 2)[:, -1],
    "written": written,
    "input written between": input_written_between,
}


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_alone(name: str) -> None:
    matches = 1 if name == "read by another" else 0  # the two layers are two nodes
    check_pass(HoistSlices, OTHERS[name], X.clone(), matches=matches)


class HomeMade(nn.Module):
    """A decoder that returns the logits of the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 32)
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32), nn.RMSNorm(32)
        self.head = nn.Linear(32, 90, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        h = h + self.down(F.silu(self.up(h)))
        return self.head(self.norm(h))[:, -1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = HomeMade().eval()
    compiled = torch.compile(model, backend="skipc", fullgraph=True, dynamic=dynamic, options=STRICT)
    for tokens in (9, 5) if dynamic else (9,):
        ids = torch.randint(0, 90, (2, tokens))
        double, _ = in_double(model, {})
        with torch.no_grad():
            assert_no_further(double(ids), model(ids), compiled(ids))
    with torch.no_grad():
        matched = {p.name: p.matched for p in skipc.explain(model, ids).graphs[0].passes}
    assert matched["hoist_slices"] == 1
    assert skipc.find_sites(model, ids)
