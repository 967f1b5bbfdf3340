"""Decode and prefill with static and growing caches, one row and four with left padding, skipping and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.runtime.policies.base import Call, Policy
from transformers import DynamicCache, StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, eager_skip, in_double, seldom
from tests.models.zoo import ZOO

STEPS = 4


def request(model: Any, call: Any, cache: str, batch: int) -> torch.Tensor:
    """Logits of a prefill and of some decode steps, given tokens: float [batch, 1 + STEPS, vocabulary]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 90, (batch, 6 + STEPS), generator=generator)
    mask = torch.ones(batch, 6, dtype=torch.long)
    if batch > 1:
        mask[0, :3] = 0
        mask[1, :1] = 0
    kv = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else DynamicCache(config=model.config)
    logits = call(input_ids=tokens[:, :6], attention_mask=mask, past_key_values=kv).logits[:, -1:]
    seen = [logits]
    for step in range(STEPS):
        mask = torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], 1)
        token = tokens[:, 6 + step : 7 + step]
        seen.append(call(input_ids=token, attention_mask=mask, past_key_values=kv).logits)
    return torch.cat(seen, 1)


@pytest.fixture(scope="module", params=["llama", "gemma2", seldom("falcon")])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    model = ZOO[request.param].build()
    return model, in_double(model, {})[0], skipc.compile(model, fullgraph=True, **STRICT)


def skip_sets(names: list[str], kinds: dict[str, str]) -> dict[str, set[str]]:
    return {
        "nothing": set(),
        "layer 0": {n for n in names if ".0." in n},
        "last layer": {n for n in names if ".1." in n},
        "all attentions": {n for n in names if kinds[n] == "attention"},
        "all sites": set(names),
    }


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 4])
def test_prefill_and_decode(models: tuple[Any, Any, Any], cache: str, batch: int) -> None:
    model, double, compiled = models
    request(model, compiled, cache, batch)  # compiles
    sites = skipc.find_sites(model, torch.randint(3, 90, (1, 5)), use_cache=False)
    for label, skip in skip_sets(sites.names, {s.name: s.kind for s in sites}).items():
        with eager_skip(double, skip):
            truth = request(double, double, cache, batch)
        with eager_skip(model, skip):
            eager = request(model, model, cache, batch)
        with compiled.session(skip=skip) as session:
            ours = request(model, compiled, cache, batch)
            assert session.stats().recompiles == 0, label
        assert_no_further(truth, eager, ours)


class Measured(Policy):
    def __init__(self, skip: set[str]):
        self.skip = skip

    def decide(self, call: Call) -> skipc.GateTable:
        return skipc.GateTable.of(call.names, skip=self.skip, measures=True)


def deeper_llama() -> Any:
    """Four layers, so that there are attentions between others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_kv_none_leaves_the_cache_alone() -> None:
    """With a set that is fixed for the request, dropped keys are never read: same logits, nothing written."""
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    skip = {"model.layers.0.self_attn"}
    caches = {}
    logits = {}
    for kv in ("project", "none"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with compiled.session(skip=skip, kv=kv):
            compiled(torch.arange(3, 9)[None], past_key_values=cache)
            logits[kv] = compiled(torch.tensor([[9]]), past_key_values=cache).logits
        caches[kv] = cache
    torch.testing.assert_close(logits["none"], logits["project"], rtol=0, atol=0)
    assert caches["project"].layers[0].keys[:, :, :7].abs().sum() > 0
    assert caches["none"].layers[0].keys.abs().sum() == 0
    assert int(caches["none"].layers[0].cumulative_length) == 7  # counters are kept


def copied(model: Any, kv: Any, skip: set[str], tokens: int) -> None:
    """What ``kv="copy"`` means, after a call in eager: the rows of skipped attentions are those of the one below."""
    below = None
    for i, layer in enumerate(kv.layers):
        if below is not None and f"model.layers.{i}.self_attn" in skip:
            end = int(layer.get_seq_length())
            for mine, lower in ((layer.keys, below.keys), (layer.values, below.values)):
                mine[:, :, end - tokens : end] = lower[:, :, end - tokens : end]
        below = layer


@pytest.mark.parametrize(
    ("lowering", "cache", "batch"),
    [("outline", "static", 1), seldom("outline", "static", 3), ("outline", "dynamic", 3), seldom("cond", "static", 1)],
)
def test_kv_copy_keeps_what_the_attention_below_keeps(lowering: str, cache: str, batch: int) -> None:
    """Another set at each call, so that copied rows are read; chunks of 6, 3 and 1 tokens."""
    torch._dynamo.reset()  # forget sizes that earlier tests made dynamic
    model = deeper_llama()
    double = in_double(model, {})[0]
    compiled = skipc.compile(model, fullgraph=True, lowering=lowering, kv="copy", **STRICT)
    attentions = [f"model.layers.{i}.self_attn" for i in range(4)]
    tokens = torch.randint(3, 90, (batch, 32), generator=torch.Generator().manual_seed(2))
    chunks = [6, 3, 1, 1, 1, 1]
    sets = [{*attentions[1:3]}, {attentions[3]}, {*attentions}, set(), {attentions[1], attentions[3]}, set()]

    def make(of: Any) -> Any:
        config = model.config
        return StaticCache(config=config, max_cache_len=32) if cache == "static" else DynamicCache(config=config)

    ours_kv, eager_kv, double_kv = make(model), make(model), make(double)
    at = 0
    for count, skip in zip(chunks, sets, strict=True):
        now = tokens[:, at : at + count]
        found = []
        for reference, kv in ((model, eager_kv), (double, double_kv)):
            with eager_skip(reference, skip):
                found.append(reference(now, past_key_values=kv).logits)
            copied(reference, kv, skip, count)
        how: Any = {"policy": Measured(skip)} if at % 2 else {"skip": skip}  # gates that are open until they are asked
        with compiled.session(**how):
            ours = compiled(now, past_key_values=ours_kv).logits
        assert_no_further(found[1], found[0], ours)
        at += count
    for mine, theirs in zip(ours_kv.layers, eager_kv.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_kv_copy_of_embeddings_into_growing_caches() -> None:
    """The stream is an input: the lowest attention projects, the next copies from it."""
    torch._dynamo.reset()
    model = deeper_llama()
    compiled = skipc.compile(model, fullgraph=True, kv="copy", **STRICT)
    skip = {f"model.layers.{i}.self_attn" for i in range(2)}
    mine, theirs = (DynamicCache(config=model.config) for _ in range(2))
    for count in (5, 2, 1):
        x = torch.randn(1, count, 64)
        with eager_skip(model, skip):
            expected = model(inputs_embeds=x, past_key_values=theirs).logits
        copied(model, theirs, skip, count)
        with compiled.session(skip=skip):
            torch.testing.assert_close(compiled(inputs_embeds=x, past_key_values=mine).logits, expected)
    torch.testing.assert_close(mine.layers[1].keys, theirs.layers[1].keys)
    torch.testing.assert_close(mine.layers[1].keys, mine.layers[0].keys)


class CachingLayer(torch.nn.Module):
    """Attention that writes two tokens to its cache, in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.o = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        k = self.k(x)
        if self.form == "scatter_":
            cache.scatter_(1, at[None, :, None].expand_as(k), k)
        elif self.form == "setitem":
            cache[:, at] = k
        elif self.form == "index_put_":
            cache.index_put_((torch.arange(1)[:, None], at[None]), k)
        elif self.form == "copy_":
            cache[:, 4:6].copy_(k)
        else:
            cache[:, 4:6] = k
        return x + self.o(torch.nn.functional.scaled_dot_product_attention(self.q(x), cache, cache))


class CachingStack(torch.nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(CachingLayer(form) for _ in range(3))

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, at)
        return x


def caching(form: str) -> tuple[torch.nn.Module, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    return (
        CachingStack(form).eval(),
        torch.randn(1, 2, 16),
        [torch.randn(1, 8, 16) for _ in range(3)],
        torch.tensor([4, 5]),
    )


@pytest.mark.parametrize("form", ["setitem", "index_put_", "copy_", "slice"])
def test_kv_copy_reads_rows_where_they_are_written(form: str) -> None:
    model, x, caches, at = caching(form)
    compiled = skipc.compile(model, fullgraph=True, kv="copy", **STRICT)
    expected = [c.clone() for c in caches]
    for skip in ({"layers.1.o", "layers.2.o"}, {"layers.2.o"}):
        with eager_skip(model, skip):
            y = model(x, expected, at)
        for i in (1, 2):
            if f"layers.{i}.o" in skip:
                expected[i][:, at] = expected[i - 1][:, at]
        with compiled.session(skip=skip):
            torch.testing.assert_close(compiled(x, caches, at), y)
        for mine, theirs in zip(caches, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_kv_copy_is_refused_where_keys_cannot_be_read_back() -> None:
    model, *inputs = caching("scatter_")
    compiled = skipc.compile(model, fullgraph=True, kv="copy", **STRICT)
    compiled(*inputs)
    with pytest.raises(skipc.PlanError, match="cannot be read back"), compiled.session(skip={"layers.1.o"}):
        compiled(*inputs)


def test_kv_none_is_refused_where_the_caller_keeps_keys() -> None:
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    with (
        pytest.raises(skipc.PlanError, match="keeps its keys"),
        compiled.session(skip={"model.layers.0.self_attn"}, kv="none"),
    ):
        compiled(torch.arange(3, 9)[None], past_key_values=DynamicCache(config=model.config))


def test_one_compilation_serves_all_prompt_lengths() -> None:
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    with compiled.session() as session:
        for length in (5, 9, 3, 12, 7):
            tokens = torch.randint(3, 90, (1, length))
            torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
        assert session.stats().recompiles == 1


def test_hidden_states_of_skipped_sites_are_tensors_of_their_own() -> None:
    model = ZOO["llama"].build()
    tokens = torch.randint(3, 90, (1, 6))
    model(tokens, output_hidden_states=True)  # transformers installs its recording hooks at first use, under a lock
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    names = skipc.find_sites(model, tokens, use_cache=False).names
    with compiled.session(skip=names):
        hidden = compiled(tokens, use_cache=False, output_hidden_states=True).hidden_states
    with eager_skip(model, names):
        expected = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    for a, b in zip(hidden, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len({t.data_ptr() for t in hidden}) == len(hidden)


def test_skipping_inputs_embeds_returns_no_alias_of_it() -> None:
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Stack().eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    x = torch.randn(2, 3, 16)
    with compiled.session(skip=["layers.0", "layers.1", "layers.2"]):
        y = compiled(x)
    torch.testing.assert_close(y, x)
    y.add_(1)
    assert not torch.equal(x, y)
