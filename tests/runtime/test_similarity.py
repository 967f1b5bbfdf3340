"""Similarities that regions take themselves are those of the stream around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.kernels.similarity import reached
from skipc.runtime import gating, registry

import skipc
from tests.harness import STRICT
from tests.models.zoo import ZOO


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
@torch.no_grad()
def test_regions_take_the_similarity_of_their_stream(name: str, monkeypatch: Any) -> None:
    torch._dynamo.reset()
    before = set(registry._programs)  # of other tests, as long as something holds them
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    inputs.pop("attention_mask", None)  # the measuring session counts padding, too
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    compiled(**inputs)
    with compiled.session(measure=True) as apart:  # step by step, from the points of the stream
        compiled(**inputs)

    def refuse(*args: Any) -> None:
        raise AssertionError("the stream was read once more")

    monkeypatch.setattr(gating, "moments", refuse)
    for _ in range(2):  # step by step at first, then joined
        with compiled.session(policy=skipc.Observe()) as session:
            compiled(**inputs)
        found, truth = session.stats().similarity, apart.stats().similarity
        assert found.keys() == truth.keys()
        assert found == pytest.approx(truth, abs=1e-6)
    assert session.stats().recompiles == 0
    (program,) = {p for p in registry._programs if p.site_names == frozenset(truth)} - before
    assert all(step.moments in step.arms[0].outputs for step in program.spec.steps if step.sites)


@pytest.mark.parametrize("rule", ["all", "majority", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_rules_agree_with_their_definition(rule: Any, masked: bool) -> None:
    """Natively and in torch: random rows, a threshold between any two of them, no valid row."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 7):
        x, y = torch.randn(2, rows, 8, generator=generator)
        found = torch.stack([(x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)], -1)
        similar = torch.nn.functional.cosine_similarity(x, y, dim=-1)
        valid = torch.rand(rows, generator=generator) > 0.5 if masked else None
        there = similar if valid is None else similar[valid]
        for threshold in [*(similar.sort().values + 1e-4).tolist(), -2.0, 2.0]:
            above = there >= threshold
            truth = {"all": above.all(), "majority": 2 * above.sum() > above.numel(), "mean": there.mean() >= threshold}
            expected = bool(truth[rule]) and there.numel() > 0
            assert reached(found, threshold, rule, valid) == expected
            assert reached(found.double(), threshold, rule, valid) == expected
