"""Tokens are followed through a graph only where each is treated by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skipc.passes.fx_edit import copy_graph
from skipc.passes.token_wise import token_dims
from skipc.runtime import registry

import skipc
from tests.harness import STRICT

W, WIDE = torch.randn(16, 16), torch.randn(48, 16)
KEYS = torch.randn(1, 2, 11, 8)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], -1, 2, 8).transpose(1, 2)


def turned(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q = heads(F.linear(x, WIDE)[..., 16:32])
    first, second = q.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1) + q * 2


def whole(x: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    h = F.rms_norm(x, (16,)) * x.pow(2).mean(-1, keepdim=True).rsqrt()
    out = F.scaled_dot_product_attention(turned(h, mask), KEYS, KEYS, attn_mask=mask, **options)
    return x + F.linear(out.transpose(1, 2).reshape(1, -1, 16), W)


def spelled_out(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = heads(x) @ KEYS.transpose(-1, -2) / 3 + torch.where(mask, 0.0, -1e9)
    return x + (scores.softmax(-1) @ KEYS).permute(0, 2, 1, 3).flatten(2)


WISE: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "heads": (lambda x, mask: heads(x), 2),
    "rotation": (turned, 2),
    "attention": (whole, 1),
    "attention, spelled out": (spelled_out, 1),
    "a view without the batch": (lambda x, mask: x.view(-1, 16) * 2, 0),
    "a mask for all heads": (lambda x, mask: mask.expand(1, 2, -1, -1) + x.sum(-1)[:, None, :, None], 2),
    "one more dimension": (lambda x, mask: x[:, :, None] + x.unsqueeze(2), 1),
}
MIXING: dict[str, Callable[..., torch.Tensor]] = {
    "sum over tokens": lambda x, mask: x + x.sum(1, keepdim=True),
    "softmax over tokens": lambda x, mask: x.softmax(1),
    "norm over tokens": lambda x, mask: F.layer_norm(x.transpose(1, 2).contiguous(), (x.shape[1],)),
    "cumulative sum": lambda x, mask: x.cumsum(1),
    "turned round": lambda x, mask: x.flip(1),
    "the next token": lambda x, mask: torch.cat([x[:, 1:], x[:, :1]], 1),
    "positions": lambda x, mask: x * torch.arange(x.shape[1])[None, :, None],
    "number of tokens": lambda x, mask: x + torch.ones(1, x.shape[1], 1),
    "self-attention": lambda x, mask: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
    "causal": lambda x, mask: F.scaled_dot_product_attention(heads(x), KEYS, KEYS, is_causal=True),
    "keys of the tokens": lambda x, mask: heads(x) @ heads(x).transpose(-1, -2),
    "tokens in front": lambda x, mask: x.view(2, -1, 16),
    "tokens and channels swapped": lambda x, mask: x.transpose(1, 2).reshape(1, x.shape[1], 16),
    "written": lambda x, mask: x.clone().add_(1),
    "scaled by their number": lambda x, mask: x / x.shape[1],
    "a row of a table": lambda x, mask: x + WIDE[x.shape[1]],
    "a limit": lambda x, mask: x.masked_fill(torch.arange(16) < x.shape[1], 0.0),
    "unusual arguments": lambda x, mask: x.transpose(dim0=1, dim1=2),
    "sorted": lambda x, mask: x.sort(1).values,
    "convolution": lambda x, mask: F.conv1d(x.transpose(1, 2), torch.ones(16, 16, 1)),
    "an index": lambda x, mask: x[:, torch.tensor([0, 1])],
}


def followed(function: Callable[..., torch.Tensor]) -> tuple[Any, Any]:
    caught: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        caught.append(copy_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    x, mask = torch.randn(1, 6, 16), torch.rand(1, 1, 6, 11) > 0.3
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(mask, 2)

    def call(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[1] == mask.shape[2])
        return function(x, mask)

    torch.compile(call, backend=backend, fullgraph=True)(x, mask)
    (gm,) = caught
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call")]
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    size = next(v.shape[1] for v in values if isinstance(v, torch.Tensor) and v.dim() == 3)
    output = next(iter(reversed(gm.graph.nodes))).args[0][0]
    wanted = [n for n in nodes if n is output or _leads_to(n, output)]
    return token_dims(wanted, size), output


def _leads_to(node: torch.fx.Node, output: torch.fx.Node) -> bool:
    return any(u is output or _leads_to(u, output) for u in node.users)


@pytest.mark.parametrize("name", WISE)
def test_followed(name: str) -> None:
    function, dim = WISE[name]
    dims, output = followed(function)
    assert dims is not None
    assert dims[output] == dim


@pytest.mark.parametrize("name", MIXING)
def test_left_alone(name: str) -> None:
    assert followed(MIXING[name])[0] is None


class Attending(torch.nn.Module):
    """Attention over a static cache, one thing of which may be done differently."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.o = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, count: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, count + torch.arange(x.shape[1]), self.k(x))
        if self.form == "the counter is read before it is counted":
            mask = mask & (torch.arange(cache.shape[1]) <= count + 20)
        count.add_(x.shape[1])
        q = self.q(x).cumsum(1) if self.form == "tokens meet" else self.q(x)
        return x + self.o(F.scaled_dot_product_attention(q, cache, cache, attn_mask=mask))


@pytest.mark.parametrize("form", ["", "the counter is read before it is counted", "tokens meet"])
def test_an_attention_is_split_where_its_keys_are_written(form: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Attending(form)
    compiled = skipc.compile(layer.eval(), fullgraph=True, compact_queries=True, **STRICT)
    runs = torch.rand(1, 9) > 0.5

    class Some(skipc.Policy):
        def decide(self, call: skipc.Call) -> skipc.GateTable:
            return skipc.GateTable.of(call.names, routed=call.names, measures=False)

        def route(self, call: skipc.Call, site: str, stream: torch.Tensor) -> torch.Tensor:
            return runs

    x, cache, count, mask = torch.randn(1, 9, 16), torch.randn(1, 32, 16), torch.tensor(4), torch.rand(1, 9, 32) > 0.3
    kept, counted = cache.clone(), count.clone()
    full = layer(x, kept, counted, mask)
    with compiled.session(policy=Some()):
        found = compiled(x, cache, count, mask)
    torch.testing.assert_close(found, torch.where(runs[..., None], full, x))
    torch.testing.assert_close(cache, kept)
    assert count == counted
    (program,) = (p for p in registry._programs if p.site_names == {"o"})
    assert any(s.queries is not None for s in program.spec.steps) == (form == "")
