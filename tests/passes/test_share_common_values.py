"""What layers compute alike is computed once, where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipc.passes.base import PassContext
from skipc.passes.manager import PassManager
from skipc.passes.share_common_values import ShareCommonValues
from torch import nn
from torch.nn import functional as F

import skipc
from tests.harness import STRICT, assert_no_further, capture, check_pass, in_double, ops

X, W = torch.randn(2, 7, 16), torch.randn(16, 16)


def causal(n: int) -> torch.Tensor:
    places = torch.arange(n)
    return places[:, None] >= places


def test_matches() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(causal(7)[:, :1], 0.0) + x.masked_fill(causal(7)[:, :1], 1.0)

    result = check_pass(ShareCommonValues, model, X, matches=1)
    assert ops(result)["arange"] == 1
    assert ops(result)["masked_fill"] == 2


def written(x: torch.Tensor) -> torch.Tensor:
    a, b = torch.ones(16), torch.ones(16)
    a.add_(1)
    return x * a + x * b


def read_before_and_after(x: torch.Tensor) -> torch.Tensor:
    a = x.sum()
    x.mul_(2)
    return a + x.sum()


OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "written": written,
    "read before and after a write": read_before_and_after,
    "returned": lambda x: (x.cos(), x.cos()),
    "returned as a view": lambda x: (x.cos()[0], x.cos()[1]),
    "other numbers": lambda x: (x * 1).sin() + (x * 1.0).cos() + (x * True).tan(),
    "signs of zero": lambda x: torch.full((16,), 0.0) / x + torch.full((16,), -0.0) / x,
    "hidden states": lambda x: F.silu(F.linear(x, W)) * F.silu(F.linear(x, W)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_alone(name: str) -> None:
    check_pass(ShareCommonValues, OTHERS[name], X.clone(), matches=0)


@pytest.mark.parametrize("make", [torch.rand, torch.empty])
def test_leaves_what_differs_each_time(make: Callable[..., torch.Tensor]) -> None:
    gm, _ = capture(lambda x: make(16) * x + make(16) * x, X)
    manager = PassManager(PassContext(), (ShareCommonValues,))
    manager.run(gm)
    assert manager.records[0].matched == 0


class Layer(nn.Module):
    """Attention that makes its own mask and rotary table, as home-made ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        angles = torch.outer(torch.arange(t, device=x.device).float(), 0.1 ** torch.arange(0, 8).float())
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, 16).permute(2, 0, 3, 1, 4)

        def turn(h: torch.Tensor) -> torch.Tensor:
            return h * cos + torch.cat([-h[..., 8:], h[..., :8]], -1) * sin

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, attn_mask=causal(t))
        return x + self.out(y.transpose(1, 2).reshape(b, t, 32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_home_made_layers_share_mask_and_table(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), *(Layer() for _ in range(3))).eval()
    compiled = skipc.compile(model, fullgraph=True, dynamic=dynamic, **STRICT)
    double, _ = in_double(model, {})
    with torch.no_grad():
        sites = [s.name for s in skipc.find_sites(model, torch.randn(2, 7, 32))]
        for tokens in (7, 9) if dynamic else (7,):
            x = torch.randn(2, tokens, 32)
            assert_no_further(double(x.double()), model(x), compiled(x))
            with compiled.session(skip=set(sites[:1])):  # the first of those that share: the others need them still
                skipped = compiled(x)
            kept = nn.Sequential(model[0], *model[2:])
            assert_no_further(in_double(kept, {})[0](x.double()), kept(x), skipped)
        graph = skipc.explain(model, x).graphs[0]
    assert len(sites) == 3
    assert {p.name: p.matched for p in graph.passes}["share_common_values"] >= 8
