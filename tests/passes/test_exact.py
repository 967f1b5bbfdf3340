"""The exact passes: what they rewrite, what they must leave, and that nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.passes.fold_grouped_queries import FoldGroupedQueries
from skipc.passes.lower_attention import LowerAttention
from skipc.passes.lower_gated_mlp import LowerGatedMLP
from skipc.passes.lower_linears import LowerLinears
from skipc.passes.narrow_kv_cache import NarrowKVCache
from skipc.passes.remove_noops import RemoveNoops
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, check_pass, in_double, ops
from tests.models.zoo import ZOO

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
Q, K, V = torch.randn(2, 6, 3, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
MASK = torch.rand(2, 1, 3, 9) > 0.3
MASK[..., 0] = True


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, groups, n, d).reshape(b, h * groups, n, d)


def spelled_out(q: Any, k: Any, v: Any, mask: Any, softcap: float | None, by: float = 0.25) -> torch.Tensor:
    k, v = repeat_kv(k, 3), repeat_kv(v, 3)
    scores = torch.matmul(q, k.transpose(2, 3)) * by
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.0, False), v).transpose(1, 2).contiguous()


ADDITIVE = torch.where(MASK, 0.0, torch.finfo(torch.float32).min)
FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "repeat_kv": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3)),
    "masked": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3), attn_mask=MASK),
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3), ADDITIVE, 0.0),
    "repeat_interleave": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, dim=1), torch.repeat_interleave(v, 3, 1), is_causal=True
    ),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5),
    "spelled out": lambda q, k, v: spelled_out(q, k, v, ADDITIVE, None),
    "soft cap": lambda q, k, v: spelled_out(q, k, v, ADDITIVE, 3.0),
    "soft cap without a mask": lambda q, k, v: spelled_out(q, k, v, None, 3.0),
}
OTHERS: dict[str, Callable[..., Any]] = {
    "not repeated": lambda q, k, v: F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=MASK),
    "only keys repeated": lambda q, k, v: F.scaled_dot_product_attention(
        q, repeat_kv(k, 3), v.repeat(1, 3, 1, 1), attn_mask=MASK
    ),
    "tiled, not interleaved": lambda q, k, v: F.scaled_dot_product_attention(
        q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)
    ),
    "another axis": lambda q, k, v: F.scaled_dot_product_attention(
        q[:, :2], k.repeat_interleave(3, 2), v.repeat_interleave(3, 2)
    ),
    "softmax over queries": lambda q, k, v: torch.softmax(q @ repeat_kv(k, 3).transpose(2, 3), 2) @ repeat_kv(v, 3),
    "another cap": lambda q, k, v: (
        torch.softmax(torch.tanh(q @ repeat_kv(k, 3).transpose(2, 3) / 3.0) * 2.0, -1) @ repeat_kv(v, 3)
    ),
    "double": lambda q, k, v: F.scaled_dot_product_attention(
        q.double(), repeat_kv(k.double(), 3), repeat_kv(v.double(), 3)
    ),
}


def overwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    repeated = repeat_kv(k, 3)
    k.mul_(2)  # the copy must not see it
    return F.scaled_dot_product_attention(q, repeated, repeat_kv(v, 3))


OTHERS["keys are written after they were repeated"] = overwritten
OTHERS["a boolean added as a number"] = lambda q, k, v: spelled_out(q, k, v, MASK, None)


class TestFoldGroupedQueries:
    @pytest.mark.parametrize("form", FORMS)
    def test_matches(self, form: str) -> None:
        class Clean(FoldGroupedQueries):
            """After the passes before it."""

            def run(self, gm: Any, ctx: Any) -> Any:
                RemoveNoops().run(gm, ctx)
                return super().run(gm, ctx)

        check_pass(
            Clean, FORMS[form], Q, K, V, matches=1, there=["grouped_attention"],
            gone=["expand", "repeat_interleave", "scaled_dot_product_attention", "softmax", "tanh"],
        )  # fmt: skip

    @pytest.mark.parametrize("form", OTHERS)
    def test_leaves(self, form: str) -> None:
        check_pass(FoldGroupedQueries, OTHERS[form], Q, K, V, matches=0)

    def test_weights_that_are_returned_stay_right(self) -> None:
        def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = torch.softmax(q @ repeat_kv(k, 3).transpose(2, 3), -1)
            return weights @ repeat_kv(v, 3), weights

        check_pass(FoldGroupedQueries, model, Q, K, V, matches=1, there=["softmax"])


def with_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> Any:
    cache[0].index_copy_(2, at, k)
    cache[1].index_copy_(2, at, v)
    mask = torch.arange(cache.shape[3]) <= at[:, None]
    mask = mask.expand(2, 1, 3, -1)
    return F.scaled_dot_product_attention(q, repeat_kv(cache[0], 3), repeat_kv(cache[1], 3), attn_mask=mask)


class TestNarrowKVCache:
    ARGS = (Q, K[:, :, :3], V[:, :, :3], torch.randn(2, 2, 2, 40, 16), torch.arange(3) + 4)

    def test_matches_behind_folding(self) -> None:
        class Both(NarrowKVCache):
            """Folds first."""

            def run(self, gm: Any, ctx: Any) -> Any:
                FoldGroupedQueries().run(gm, ctx)
                return super().run(gm, ctx)

        check_pass(Both, with_cache, *self.ARGS, matches=1, there=["grouped_attention", "amin", "amax"])

    @pytest.mark.parametrize("additive", [False, True])
    def test_matches_alone_with_a_mask_from_outside(self, additive: bool) -> None:
        def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask)

        check_pass(
            NarrowKVCache, model, Q, K, V, ADDITIVE if additive else MASK, matches=1, there=["grouped_attention"]
        )

    def test_leaves(self) -> None:
        def growing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q[:, :2], torch.cat([k, k[:, :, :0]], 2), v, attn_mask=mask)

        def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q[:, :2], k, v)

        def one_for_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask[..., :1])

        def mask_is_written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            mask[:, :, :, 5:] = True
            return F.scaled_dot_product_attention(q[:, :2], k, v, attn_mask=mask)

        for model in (growing, unmasked, one_for_all, mask_is_written):
            check_pass(NarrowKVCache, model, Q, K, V, MASK, matches=0)


@needs_compiler
class TestLowerings:
    def test_linears_that_share_an_input_become_one_call(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.o = nn.Linear(16, 12), nn.Linear(16, 4, bias=False), nn.Linear(12, 16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.o(self.q(x) * torch.cat([self.k(x)] * 3, -1))

        result = check_pass(LowerLinears, Block(), torch.randn(2, 3, 16), matches=3, gone=["linear"])
        assert ops(result)["skinny_linear"] == 2

    @pytest.mark.parametrize(
        "x",
        [
            torch.randn(17, 16),
            torch.randn(2, 16, dtype=torch.float64),
            torch.randn(16, 5).t(),
        ],
        ids=["many rows", "double", "strided"],
    )
    def test_linears_are_left(self, x: torch.Tensor) -> None:
        check_pass(LowerLinears, nn.Linear(16, 4).to(x.dtype), x, matches=0, there=["linear"])

    def test_many_rows_of_bf16_are_left(self) -> None:
        """More than vectors are good for, where there are no tile registers."""
        layer, x = nn.Linear(16, 4).bfloat16(), torch.randn(17, 16).bfloat16()
        check_pass(LowerLinears, layer, x, matches=0, there=["linear"])
        check_pass(LowerLinears, layer, x[:9], matches=int(native.tiles()))
        with native.without_tiles():
            check_pass(LowerLinears, layer, x[:9], matches=0, there=["linear"])
            check_pass(LowerLinears, layer, x[:8], matches=1, gone=["linear"])

    def test_computed_and_transposed_weights_are_left(self) -> None:
        def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w * 2) + F.linear(x, w.t())

        check_pass(LowerLinears, model, torch.randn(2, 16), torch.randn(16, 16), matches=0)

    def test_attention_of_few_queries(self) -> None:
        def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.ops.skipc.grouped_attention.default(q, k, v, None, None, False, 0.25, 0.0)

        check_pass(LowerAttention, model, Q, K, V, matches=1, there=["decode_attention"])
        check_pass(LowerAttention, model, torch.randn(2, 6, 50, 16), K, V, matches=0, there=["grouped_attention"])


def rms(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class GatedBlock(nn.Module):
    """A gated MLP with its norm and residual sum; ``form`` bends it."""

    def __init__(self, form: str = ""):
        super().__init__()
        self.form = form
        self.w = nn.Parameter(torch.rand(16) + 0.5)
        self.gate, self.up = nn.Linear(16, 40, bias=form == "bias"), nn.Linear(16, 40, bias=False)
        self.down = nn.Linear(40, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(x, (16,), self.w, 1e-5) if self.form == "fused norm" else rms(x, self.w)
        g, u = self.gate(h), self.up(h)
        act = {"gelu": F.gelu, "tanh": lambda v: F.gelu(v, approximate="tanh"), "relu": torch.relu}.get(
            self.form, F.silu
        )
        y = self.down(u * act(g) if self.form == "turned" else act(g) * u)
        if self.form == "norm read twice":
            y = y + h
        if self.form == "gate read twice":
            y = y + g[..., :16]
        if self.form == "alpha":
            return torch.add(x, y, alpha=2)
        return y * 2 + x if self.form == "scaled" else x + y


@needs_compiler
class TestLowerGatedMLP:
    @pytest.mark.parametrize("form", ["", "fused norm", "tanh", "relu", "turned", "scaled", "alpha", "norm read twice"])
    def test_matches(self, form: str) -> None:
        result = check_pass(
            LowerGatedMLP,
            GatedBlock(form),
            torch.randn(2, 3, 16),
            matches=1,
            there=["gated_mlp"],
            gone=["linear", "silu"],
        )
        fused = next(n for n in result.graph.nodes if n.target is torch.ops.skipc.gated_mlp.default)
        assert (fused.args[1] is None) == (form == "norm read twice"), "norm"
        assert (fused.args[7] is None) == (form in ("scaled", "alpha")), "residual"

    def test_one_feeds_the_next(self) -> None:
        class Chain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(6)])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for i in (0, 3):
                    x = F.linear(F.silu(F.linear(x, self.w[i])) * F.linear(x, self.w[i + 1]), self.w[i + 2])
                return x

        check_pass(LowerGatedMLP, Chain(), torch.randn(2, 16) * 0.1, matches=2, gone=["linear"])

    @pytest.mark.parametrize("form", ["chunk", "split", "slices", "up first", "bias", "quarters", "halves read twice"])
    def test_one_layer_for_both(self, form: str) -> None:
        """Phi-3's form, and what must not be taken for it."""
        both, down = nn.Linear(16, 80, bias=form == "bias"), nn.Linear(20 if form == "quarters" else 40, 16, bias=False)

        def model(x: torch.Tensor) -> torch.Tensor:
            made = both(x)
            if form == "slices":
                gate, up = made[..., :40], made[..., 40:]
            elif form == "quarters":
                gate, up = made[..., :20], made[..., 20:40]
            elif form == "split":
                gate, up = made.split([40, 40], dim=-1)
            else:
                gate, up = made.chunk(2, dim=-1)
            if form == "up first":
                gate, up = up, gate
            y = down(up * F.silu(gate))
            return y + made[..., :16] if form == "halves read twice" else y

        matches = form in ("chunk", "split", "slices")
        result = check_pass(LowerGatedMLP, model, torch.randn(2, 3, 16), matches=int(matches))
        assert ops(result)["gated_mlp"] == matches

    @pytest.mark.parametrize("form", ["bias", "gelu", "gate read twice"])
    def test_leaves(self, form: str) -> None:
        check_pass(LowerGatedMLP, GatedBlock(form), torch.randn(2, 3, 16), matches=0, there=["linear"])

    def test_leaves_many_rows_and_written_inputs(self) -> None:
        check_pass(LowerGatedMLP, GatedBlock(), torch.randn(20, 16), matches=0)

        class Writes(GatedBlock):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                h = rms(x, self.w)
                g, u = self.gate(h), self.up(h)
                h.mul_(2)
                return self.down(F.silu(g) * u) + h

        check_pass(LowerGatedMLP, Writes(), torch.randn(2, 16), matches=0)
        check_pass(LowerLinears, Writes(), torch.randn(2, 16), matches=3)


@needs_compiler
def test_a_norm_whose_input_is_written_later_is_not_moved() -> None:
    class Writes(GatedBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = rms(x, self.w)
            x.mul_(3)
            return self.gate(h)

    result = check_pass(LowerLinears, Writes(), torch.randn(2, 16), matches=1)
    assert next(n for n in result.graph.nodes if n.target is torch.ops.skipc.skinny_linear.default).args[3] is None
    result = check_pass(
        LowerLinears, nn.Sequential(nn.RMSNorm(16, 1e-5), nn.Linear(16, 4)), torch.randn(2, 16), matches=1
    )
    assert next(n for n in result.graph.nodes if n.target is torch.ops.skipc.skinny_linear.default).args[3] is not None


MODELS = {  # which passes must match in a decode step with a static cache
    "llama": {
        "fold_grouped_queries": 2,
        "narrow_kv_cache": 2,
        "lower_linears": 1,
        "lower_attention": 1,
        "lower_attention_block": 1,
    },
    "qwen3": {
        "fold_grouped_queries": 2,
        "narrow_kv_cache": 2,
        "lower_linears": 1,
        "lower_attention": 1,
        "lower_attention_block": 1,
    },
    "gemma2": {"fold_grouped_queries": 2, "narrow_kv_cache": 2, "lower_linears": 1, "lower_attention": 1},
    "phi3": {
        "fold_grouped_queries": 2,
        "narrow_kv_cache": 2,
        "lower_linears": 1,
        "lower_gated_mlp": 1,
        "lower_attention": 1,
        "lower_attention_block": 1,
    },
    "mixtral": {
        "fold_grouped_queries": 2,
        "narrow_kv_cache": 2,
        "lower_linears": 1,
        "lower_attention": 1,
        "lower_attention_block": 1,
    },
    "gpt2": {"fold_grouped_queries": 0, "narrow_kv_cache": 2, "lower_linears": 1, "lower_attention": 1},
}


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    """On real architectures: the passes match, and prefill and decode stay as close to fp64 as eager."""
    torch._dynamo.reset()  # transformers wraps all models in one function, whose sizes Dynamo would take for variable
    model = ZOO[name].build()
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0

    def run(call: Any, config: Any) -> list[torch.Tensor]:
        cache, seen = StaticCache(config=config, max_cache_len=64), mask
        logits = [call(input_ids=tokens[:, :8], attention_mask=mask, past_key_values=cache).logits[:, -1]]
        for i in range(8, 12):
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], 1)
            logits.append(call(input_ids=tokens[:, i : i + 1], attention_mask=seen, past_key_values=cache).logits[:, 0])
        return logits

    with torch.no_grad():
        double, _ = in_double(model, {})
        ours = run(skipc.compile(model, fullgraph=True, **STRICT), model.config)
        assert_no_further(run(double, model.config), run(model, model.config), ours)
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens[:, :8], past_key_values=cache)
        explanation = skipc.explain(model, tokens[:, 8:9], past_key_values=cache)
    assert {s.kind for s in explanation.sites} <= {"attention", "mlp", "moe"}
    matched = {p.name: p.matched for p in explanation.graphs[0].passes}
    for kind, count in MODELS[name].items():
        assert matched[kind] == count if not kind.startswith("lower") else matched[kind] >= count, matched
