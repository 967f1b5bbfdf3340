"""Attentions without some of their groups of heads: the same as with all of them, where the layer behind makes nothing
of those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import skipc
from skipc.calibration.batches import batches_of, call_on, result_of
from skipc.calibration.thinning import drops_groups, thin_weights
from skipc.ir.site import HiddenLayer
from tests.harness import STRICT, assert_equal_bits, run_regions_uncompiled, seldom
from tests.models.zoo import ZOO, ids


def groups_of(sites: Any) -> dict[str, HiddenLayer]:
    return {s.name: s.hidden for s in sites if s.hidden is not None and s.hidden.size > 1}


def without_groups(
    model: torch.nn.Module, layers: dict[str, HiddenLayer], gone: int, **settings: Any
) -> tuple[skipc.Plan, skipc.Plan]:
    """A plan without one group of each attention, and one in whose weights nothing is made of it."""
    thin: dict[str, torch.Tensor] = {}
    deaf: dict[str, torch.Tensor] = {}
    for layer in layers.values():
        kept = torch.tensor([i for i in range(layer.width) if i != gone % layer.width])
        thin |= thin_weights(model, layer, kept)
        deaf[layer.columns] = model.get_parameter(layer.columns).detach().clone()
        deaf[layer.columns][:, layer.channels(torch.tensor([gone % layer.width]))] = 0
    return skipc.Plan(weights=thin, **settings), skipc.Plan(weights=deaf, **settings)


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("llama", 2, 32),
        ("gemma2", 2, 32),
        ("bert", 4, 16),
        *(seldom(name, 2, 32) for name in ("qwen3", "mistral", "mixtral")),
        *(seldom(name, 4, 16) for name in ("vit", "bart")),
    ],
)
@torch.no_grad()
def test_compiled_is_what_eager_has(name: str, width: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    if name not in ("llama", "bert"):
        run_regions_uncompiled(monkeypatch)  # what is at stake is the graph
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    layers = groups_of(skipc.find_sites(model, **inputs).sites)
    assert layers
    assert {(layer.width, layer.size) for layer in layers.values()} == {(width, size)}
    (batch,) = batches_of(model, [inputs])
    assert drops_groups(model, batch, layers)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    before = result_of(compiled(**inputs))
    for gone in (0, 1):
        thin, deaf = without_groups(model, layers, gone)
        truth = result_of(call_on(model, batch, deaf))
        torch.testing.assert_close(result_of(call_on(model, batch, thin)), truth, atol=1e-4, rtol=1e-4)
        with compiled.session(plan=thin) as session:
            found = result_of(compiled(**inputs))
        torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, before, atol=1e-3)
    assert session.stats().recompiles == 0  # other groups, the same program
    assert_equal_bits(before, result_of(compiled(**inputs)))


@torch.no_grad()
def test_heads_that_are_joined_side_by_side_are_no_cache() -> None:
    class Two(torch.nn.Module):
        """Heads of two layers, side by side."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = torch.nn.Linear(64, 32), torch.nn.Linear(64, 48), torch.nn.Linear(16, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = [layer(x).view(2, 7, -1, 16).transpose(1, 2) for layer in (self.a, self.b)]
            return x + self.o(torch.cat(heads, 1).mean(1))

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 7, 64)
    plan = skipc.Plan(weights={"a.weight": model.a.weight.detach()[:16], "a.bias": model.a.bias.detach()[:16]})
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    with compiled.session(plan=plan):
        found = compiled(x)
    torch.testing.assert_close(found, call_on(model, batches_of(model, [x])[0], plan))


@pytest.mark.parametrize("name", ["t5", "gpt2", "phi3", "gpt_neox", "falcon", "opt"])
def test_heads_of_these_lie_otherwise(name: str) -> None:
    """In one layer with others, beside biases for each of them, or where the code has their number."""
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    layers = groups_of(skipc.find_sites(model, **inputs).sites)
    assert not layers or not drops_groups(model, batches_of(model, [inputs])[0], layers)


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("skip", [(), ("model.layers.1.self_attn",)])
@torch.no_grad()
def test_prefill_and_decode(decoder: Any, kind: Any, skip: tuple[str, ...]) -> None:
    """Caches keep their shape, whoever made them, and whether they are read or not."""
    model, compiled, sites = decoder
    thin, deaf = without_groups(model, groups_of(sites), 1, skip=skip)
    settings = {"max_cache_len": 24} if kind is StaticCache else {}
    cache, text = kind(config=model.config, **settings), ids(2, 11)
    (batch,) = batches_of(model, [text])
    truth, at = call_on(model, batch, deaf).logits, 0
    with compiled.session(plan=thin):
        for size in (5, 1, 1, 3, 1):
            found = compiled(input_ids=text[:, at : at + size], past_key_values=cache).logits
            torch.testing.assert_close(found, truth[:, at : at + size], atol=1e-4, rtol=1e-4)
            at += size
    heads = model.config.num_key_value_heads
    assert all(layer.keys.shape[1] == layer.values.shape[1] == heads for layer in cache.layers)


@torch.no_grad()
def test_generation_runs_attention_as_one_kernel(decoder: Any) -> None:
    model, compiled, sites = decoder
    thin, deaf = without_groups(model, groups_of(sites), 0, kv="none")
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    found = []
    for plan in (thin, deaf):
        with compiled.session(plan=plan) as session:
            found.append(skipc.generate(compiled, ids(2, 6), attention_mask=mask, max_new_tokens=8, eos_token_id=None))
    assert torch.equal(*found)
    assert session.stats().recompiles == 0
    from skipc.runtime import registry

    kernels = [
        {call.name for region in variant.spec.regions for call in region.kernels}
        for program in list(registry._programs)
        for (shapes, _), (variant, _) in program.variants._compiled.items()
        if any("self_attn" in name for name, _ in shapes)
    ]
    assert any("attention_block" in some for some in kernels)
