"""Replacements: linear maps and scales in the place of sites, compiled and in eager."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import skipc
from skipc.calibration.batches import batches_of, call_on
from skipc.ir.replacement import Affine, LowRank, Replacement
from skipc.ir.site import Site, Source
from tests.harness import STRICT, assert_equal_bits, assert_no_further, in_double, run_regions_uncompiled
from tests.models.zoo import ZOO, ids


def some_of(sites: list[Site], kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Replacement]:
    """Random replacements of this kind for all sites that can have one."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    made: dict[str, Replacement] = {}
    for site in sites:
        if (s := site.source) is None:
            continue
        if kind == "lowrank":
            made[site.name] = LowRank(s, random(5, s.width), random(s.width, 5), random(s.width))
        else:
            width = s.width if kind == "affine" else 1
            made[site.name] = Affine(s, random(width), random(width))
    return made


def widened(plan: skipc.Plan) -> skipc.Plan:
    return plan.with_tensors({n: t.double() for n, t in plan.trained.items()})


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "lowrank") for n in ("llama", "bert", "gpt2", "gemma2", "bart", "hand_written")]
    + [(n, "affine") for n in ("llama", "bert", "gpt_neox")],
)
@torch.no_grad()
def test_compiled_replacements_are_what_eager_has(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    if (name, kind) not in (("llama", "lowrank"), ("bert", "affine")):
        run_regions_uncompiled(monkeypatch)  # what is at stake is the graph
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    sites = list(skipc.find_sites(model, **inputs).sites)
    replace = some_of(sites, kind)
    assert len(replace) == len(sites)
    some = {n: r for i, (n, r) in enumerate(replace.items()) if i % 3 != 1}
    skip = [n for i, n in enumerate(replace) if i == 1]
    double, doubled = in_double(model, inputs)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    before = compiled(**inputs)
    plan = skipc.Plan(skip, replace=some)
    (batch,), (wide,) = batches_of(model, [inputs]), batches_of(double, [doubled])
    truth, eager = call_on(double, wide, widened(plan)), call_on(model, batch, plan)
    with compiled.session(plan=plan) as session:
        for _ in range(2):
            assert_no_further(truth, eager, compiled(**batch.inputs))
    assert session.stats().skipped.keys() == plan.skip
    other = skipc.Plan(skip, replace={n: r for n, r in some_of(sites, kind, 1).items() if n in some})
    with compiled.session(plan=other) as session:  # the same program with other numbers
        found = compiled(**batch.inputs)
    assert_no_further(call_on(double, wide, widened(other)), call_on(model, batch, other), found)
    assert session.stats().recompiles == 0
    assert_equal_bits(before, compiled(**inputs))


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "llama"])
@torch.no_grad()
def test_sites_beside_replaced_ones_keep_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of branches that share a sum, one is replaced and the other left out; replaced sites can be left out, too."""
    torch._dynamo.reset()
    run_regions_uncompiled(monkeypatch)
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    sites = list(skipc.find_sites(model, **inputs).sites)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    (batch,) = batches_of(model, [inputs])
    for kind, other in (("attention", "mlp"), ("mlp", "attention")):
        for way in ("affine", "lowrank"):
            replace = {
                n: r for n, r in some_of(sites, way).items() if kind in next(s.kind for s in sites if s.name == n)
            }
            skip = {s.name for s in sites if s.kind == other}
            for gone in (skip, {*skip, min(replace)}):
                with compiled.session(plan=skipc.Plan(replace=replace), skip=gone) as session:
                    found = compiled(**batch.inputs).logits
                kept = {n: r for n, r in replace.items() if n not in gone}
                expected = call_on(model, batch, skipc.Plan(gone, replace=kept)).logits
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
                assert session.stats().skipped.keys() == gone
                assert session.stats().ran.keys() == {s.name for s in sites} - gone


@torch.no_grad()
def test_maps_in_half_precision(decoder: Any) -> None:
    """Of maps in fp32: they take the dtype of the stream, in whatever the program reads first."""
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.model.rotary_emb.inv_freq = half.model.rotary_emb.inv_freq.float()
    sites = list(skipc.find_sites(model, ids(), use_cache=False).sites)
    plan = skipc.Plan(replace=some_of(sites, "lowrank"), kv="none")
    compiled = skipc.compile(half, fullgraph=True, **STRICT)
    for embeds in (torch.randn(2, 7, 64), torch.randn(1, 1, 64)):
        (wide,) = batches_of(model, [{"inputs_embeds": embeds}])
        with compiled.session(plan=plan):
            found = compiled(inputs_embeds=embeds.to(torch.bfloat16), use_cache=False).logits
        expected = call_on(model, wide, plan).logits
        torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def in_chunks(call: Any, cache: Any, chunks: list[int]) -> list[torch.Tensor]:
    at, found = 0, []
    text = ids(2, sum(chunks))
    for size in chunks:
        found.append(call(text[:, at : at + size], cache))
        at += size
    return found


@pytest.mark.parametrize("kv", ["project", "none"])
@torch.no_grad()
def test_prefill_and_decode_with_replaced_attentions(decoder: Any, kv: Any) -> None:
    """In the regions of a prompt and in the chains of decoding; keys are written if they are to be, and only then."""
    model, compiled, sites = decoder
    maps = some_of(sites, "lowrank")
    plan = skipc.Plan(replace={n: maps[n] for n in ("model.layers.0.self_attn", "model.layers.1.mlp")}, kv=kv)
    double, chunks = in_double(model, {})[0], [5, 1, 1, 3, 1]

    def eager(module: Any, plan: skipc.Plan) -> Any:
        def call(text: torch.Tensor, cache: Any) -> torch.Tensor:
            (batch,) = batches_of(module, [{"input_ids": text, "past_key_values": cache, "use_cache": True}])
            return call_on(module, batch, plan).logits

        return call

    truth = in_chunks(eager(double, widened(plan)), StaticCache(config=model.config, max_cache_len=24), chunks)
    plain = in_chunks(eager(model, plan), StaticCache(config=model.config, max_cache_len=24), chunks)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with compiled.session(plan=plan) as session:
        ours = in_chunks(lambda text, c: compiled(input_ids=text, past_key_values=c).logits, cache, chunks)
    for a, b, c in zip(truth, plain, ours, strict=True):
        assert_no_further(a, b, c)
    later = slice(chunks[0], sum(chunks))  # the first call makes the cache, and returns it with its keys
    assert bool(cache.layers[0].keys[:, :, later].any()) == (kv == "project")
    assert bool(cache.layers[1].keys[:, :, later].any())
    with compiled.session(plan=plan, policy=skipc.Observe()) as session:
        again = in_chunks(lambda text, c: compiled(input_ids=text, past_key_values=c).logits,
                          StaticCache(config=model.config, max_cache_len=24), chunks)  # fmt: skip
    for a, b in zip(ours, again, strict=True):
        torch.testing.assert_close(a, b)
    assert session.stats().recompiles == 0


@torch.no_grad()
def test_growing_caches_keep_their_keys(decoder: Any) -> None:
    """The caller counts tokens by them."""
    model, compiled, sites = decoder
    plan = skipc.Plan(replace=some_of(sites, "lowrank"), kv="none")
    cache = DynamicCache(config=model.config)
    with compiled.session(plan=plan):
        compiled(input_ids=ids(2, 6), past_key_values=cache)
        found = compiled(input_ids=ids(2, 1), past_key_values=cache).logits
    assert cache.get_seq_length() == 7
    (batch,) = batches_of(model, [torch.cat([ids(2, 6), ids(2, 1)], 1)])
    torch.testing.assert_close(found, call_on(model, batch, plan).logits[:, -1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_under_replacements_joins_chains(decoder: Any) -> None:
    """A map of low rank is two links of a chain: no host code between it and its neighbours."""
    model, compiled, sites = decoder
    plan = skipc.Plan(replace={n: r for n, r in some_of(sites, "lowrank").items() if "attn" in n}, kv="none")
    with compiled.session(plan=plan):
        tokens = skipc.generate(compiled, ids(1, 6), max_new_tokens=8, eos_token_id=None)
    expected = ids(1, 6)
    for _ in range(8):
        (batch,) = batches_of(model, [expected])
        expected = torch.cat([expected, call_on(model, batch, plan).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, expected)
    from skipc.runtime import registry
    from skipc.runtime.chaining import chains_of

    joined = [
        chain.last - chain.first + 1
        for program in list(registry._programs)
        for variant, _ in program.variants._compiled.values()
        if any(r.name.startswith("attention") for r in variant.spec.regions)
        for chain in chains_of(variant.spec, variant.exact)
    ]
    assert max(joined, default=0) >= 4


def test_what_does_not_fit_is_refused_by_name(decoder: Any) -> None:
    model, compiled, sites = decoder
    other = Source("model.layers.1.input_layernorm", True, 64)
    moved = some_of([dataclasses.replace(sites[0], source=other)], "affine")
    with (
        torch.no_grad(),
        compiled.session(plan=skipc.Plan(replace=moved)),
        pytest.raises(skipc.PlanError, match="its replacement was made for"),
    ):
        compiled(ids(), use_cache=False)
    name = sites[0].name
    good = some_of(sites, "lowrank")[name]
    assert isinstance(good, LowRank)
    with pytest.raises(skipc.PlanError, match=r"replacement for .*self_attn has up of shape \[64, 3\]"):
        skipc.Plan(replace={name: LowRank(good.source, good.down, torch.zeros(64, 3), good.shift)})
    with pytest.raises(skipc.PlanError, match="both skips and replaces"):
        skipc.Plan([name], replace={name: good})
    with pytest.raises(skipc.UnknownSiteError, match="did you mean"):
        compiled.session(plan=skipc.Plan(replace={"model.layers.0.self_atn": good}))
    static = skipc.compile(model, lowering="cond", fullgraph=True, **STRICT)
    with (
        torch.no_grad(),
        static.session(plan=skipc.Plan(replace={name: good})),
        pytest.raises(skipc.PlanError, match="need lowering='outline'"),
    ):
        static(ids(), use_cache=False)
