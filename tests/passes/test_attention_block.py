"""Attention sublayers as one kernel: recognised by what they compute, and left alone if that is anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.passes.base import PassContext
from skipc.passes.fold_grouped_queries import FoldGroupedQueries
from skipc.passes.lower_attention import LowerAttention
from skipc.passes.lower_attention_block import LowerAttentionBlock
from skipc.passes.lower_copied_keys import LowerCopiedKeys
from skipc.passes.lower_linears import LowerLinears
from skipc.passes.manager import PassManager
from skipc.passes.ops import written_arguments
from torch import nn
from torch.nn import functional as F

from tests.harness import capture, ops

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
HEADS, KV, D, WIDTH, LENGTH = 4, 2, 8, 24, 20
PASSES = (FoldGroupedQueries, LowerAttention, LowerLinears, LowerAttentionBlock)


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Sublayer(nn.Module):
    """Attention over a static cache, with one thing done differently."""

    def __init__(self, form: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * D, bias=form == "biases") for n in (HEADS, KV, KV))
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV) * D, bias=False)
        self.o = nn.Linear(HEADS * D, WIDTH, bias=False)
        self.q_norm, self.k_norm = (nn.Parameter(torch.rand(D) + 0.5) for _ in range(2))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if "qkv" in self.form:
            made = self.qkv(x)
            if self.form == "qkv in groups":
                made = made.view(*x.shape[:2], KV, -1)
                parts = made.split([HEADS // KV * D, D, D], -1)
            else:
                parts = made.split([HEADS * D, KV * D, KV * D], -1)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        return tuple(p.reshape(*x.shape[:2], -1, D).transpose(1, 2) for p in parts)

    def forward(self, x: torch.Tensor, cos: Any, sin: Any, keys: Any, values: Any, count: Any, mask: Any) -> Any:
        form = self.form
        q, k, v = self.heads(self.norm(x))
        if form == "head norms":
            q = self.q_norm * (q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6))
            k = self.k_norm * (k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6))
        if form == "clipped":
            q, k = q.clamp(-50, 50), k.clamp(-50, 50)
        if form != "no rotation":
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        if "partly turned" in form:
            q, k = (
                torch.cat([t[..., :4] * cos[..., :4] + turned(t[..., :4]) * sin[..., :4], t[..., 4:]], -1)
                for t in (q, k)
            )
        elif form == "pairs":
            q, k = (t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k))
        elif form == "turned the other way":
            q, k = (t * cos - turned(t) * sin for t in (q, k))
        elif form == "keys not turned":
            q = q * cos + turned(q) * sin
        elif form != "no rotation":
            q, k = (t * cos + turned(t) * sin for t in (q, k))
        if form == "rounded keys":
            k = k.to(torch.bfloat16).to(k.dtype)
        if form == "scaled keys":
            k = k * 2
        if form == "counts first":
            count.add_(x.shape[1])
        at = torch.arange(x.shape[1]) + count
        if form == "one place on":
            at = at + 1
        if form != "counts first":
            count.add_(x.shape[1])
        if form == "attends first":
            mixed = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        if form == "cache alone":
            return ()
        if form != "attends first":
            mixed = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        if form == "heads side by side in another order":
            mixed = mixed.flip(1)
        out = self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        if form == "keys are read":
            return x + out, keys.sum()
        return x + out, count * 2 if form == "count is read" else None


def inputs(batch: int, tokens: int, width: int = D) -> list[Any]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.rand(batch, 1, tokens, LENGTH, generator=generator) > 0.3
    angles = torch.rand(batch, tokens, width, generator=generator)
    cache = [torch.randn(batch, KV, LENGTH, D, generator=generator) for _ in range(2)]
    x = torch.randn(batch, tokens, WIDTH, generator=generator)
    return [x, angles.cos(), angles.sin(), *cache, torch.tensor(7), mask]


def rewritten(form: str, batch: int = 1, tokens: int = 1) -> tuple[Any, list[Any], Any]:
    model = Sublayer(form).eval()
    with torch.no_grad():
        gm, given = capture(model, *inputs(batch, tokens, 4 if form == "partly turned" else D))
    for node in reversed(list(gm.graph.nodes)):  # an arm holds what it needs alone
        if node.op.startswith("call") and not node.users and not written_arguments(node):
            gm.graph.erase_node(node)
    with torch.no_grad():
        return gm, given, PassManager(PassContext(), PASSES).run(gm)


MATCHING = ["", "biases", "head norms", "qkv in one", "no rotation", "partly turned"]
OTHERS = [
    "qkv in groups",
    "clipped",
    "partly turned by a part of the table",
    "pairs",
    "turned the other way",
    "keys not turned",
    "scaled keys",
    "rounded keys",
    "one place on",
    "counts first",
    "attends first",
    "heads side by side in another order",
    "keys are read",
    "count is read",
]


@pytest.mark.parametrize("form", MATCHING)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
def test_matches(form: str, batch: int, tokens: int) -> None:
    gm, given, result = rewritten(form, batch, tokens)
    assert ops(result)["attention_block"] == 1
    assert not {"linear", "skinny_linear", "index_copy_", "decode_attention", "cat"} & set(ops(result))
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    with torch.no_grad():
        expected, found = gm(*theirs), result(*ours)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
def test_what_a_skipped_attention_leaves(batch: int, tokens: int) -> None:
    gm, given, result = rewritten("cache alone", batch, tokens)
    assert ops(result) == {"cache_block": 1, "add_": 1}
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    with torch.no_grad():
        gm(*theirs)
        result(*ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["", "other places", "one cache", "rows are scaled"])
def test_copied_keys(form: str) -> None:
    """What an attention that is skipped under ``kv="copy"`` leaves."""

    def copied(lower: Any, keys: Any, values: Any, count: Any) -> Any:
        places = count + torch.arange(2)
        for source, target in ((lower[0], keys), (keys if form == "one cache" else lower[1], values)):
            rows = source.index_select(2, places + 1 if form == "other places" else places)
            target.index_copy_(2, places, rows * 2 if form == "rows are scaled" else rows)
        count.add_(2)

    def caches() -> tuple[Any, ...]:
        return tuple(torch.randn(1, KV, LENGTH, D) for _ in range(2))

    gm, given = capture(copied, caches(), *caches(), torch.tensor(4))
    result = PassManager(PassContext(), (LowerCopiedKeys,)).run(gm)
    assert ("copy_rows" in ops(result)) == (form == "")
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    with torch.no_grad():
        gm(*theirs)
        result(*ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("form", OTHERS)
def test_leaves(form: str) -> None:
    gm, given, result = rewritten(form)
    assert "attention_block" not in ops(result)
    ours, theirs = ([t.clone() for t in given] for _ in range(2))
    with torch.no_grad():
        for a, b in zip(result(*ours), gm(*theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
