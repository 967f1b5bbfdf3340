"""The canonical gated graph, run as it is in eager; and the lowerings that keep it one graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from skipc.passes.base import PassContext
from skipc.passes.insert_gates import GATE_INPUTS, GatedGraph, insert_gates
from skipc.passes.manager import PassManager
from skipc.passes.ops import op_name
from torch import nn
from transformers import StaticCache

import skipc
from skipc.ir.gating import GateTable
from tests.harness import STRICT, assert_no_further, capture, eager_skip, floats, in_double, seldom
from tests.models.zoo import BEYOND, ZOO

KINDS = ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "bert", "vit", "t5", "torch_encoder", "hand_written"]


class Keywords(nn.Module):
    """A model called by keywords, for tracing helpers that take positions."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]):
        super().__init__()
        self.model, self.names = model, list(inputs)

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def gated(model: nn.Module, *args: Any) -> tuple[GatedGraph, list[Any], Any]:
    """The gated graph of a call, its inputs, and Dynamo's own graph."""
    with torch.no_grad():
        gm, inputs = capture(model, *args)
        manager = PassManager(PassContext())
        made = insert_gates(manager.run(gm), manager.ctx.streams)  # type: ignore[arg-type]
    return made, inputs, gm


def gates(graph: GatedGraph, rule: int = 0, **fields: Any) -> list[torch.Tensor]:
    table = GateTable.of(graph.sites, **fields)
    valid = [n for n in graph.gm.graph.nodes if n.op == "placeholder"][-1].meta["example_value"]
    return [table.skip, table.threshold, table.closes, table.scale, table.since, torch.tensor(rule),
            torch.ones(tuple(valid.shape), dtype=torch.bool)]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_every_architecture_runs_in_eager(name: str) -> None:
    architecture = {**ZOO, **BEYOND}[name]
    model, inputs = architecture.build(), architecture.inputs()
    graph, given, dynamo = gated(Keywords(model, inputs), *inputs.values())
    assert [n.name for n in graph.gm.graph.nodes if n.op == "placeholder"][-7:] == [f"gate_{n}" for n in GATE_INPUTS]
    branches = sum(op_name(n) == "cond" for n in graph.gm.graph.nodes)
    assert branches == len({s.rpartition(".")[0] for s in graph.sites}) or branches == len(graph.sites)
    expected = dynamo(*copy.deepcopy(given))
    out = graph.gm(*copy.deepcopy(given), *gates(graph))
    for a, b in zip(floats(expected), floats(out[: graph.outputs]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert not out[graph.outputs].any()
    assert not any(m.isnan().any() for m in out[graph.outputs + 1 :])
    skip = set(graph.sites[::2])
    with eager_skip(model, {s.partition(".")[2] for s in skip}):
        expected = model(**copy.deepcopy(inputs))
    out = graph.gm(*copy.deepcopy(given), *gates(graph, skip=skip))
    for a, b in zip(floats(expected), floats(out[: graph.outputs]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    for site, moments in zip(graph.measured, out[graph.outputs + 1 :], strict=True):
        assert moments.isnan().all() == (graph.sites[site] in skip)


class Cached(nn.Module):
    """A Llama whose static cache comes in as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ZOO["llama"].build()
        self.cache = StaticCache(config=self.model.config, max_cache_len=8)
        with torch.no_grad():
            self.model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), past_key_values=self.cache)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, past_key_values=self.cache).logits


@torch.no_grad()
def test_writes_stay_and_thresholds_close_gates() -> None:
    model = Cached()
    graph, given, _ = gated(model, torch.tensor([[9], [10]]))
    written = [i for i, v in enumerate(given) if any(v is t for k in model.cache.layers for t in (k.keys, k.values))]
    counters = [i for i, v in enumerate(given) if any(v is k.cumulative_length for k in model.cache.layers)]
    assert len(written) == 4
    exact = copy.deepcopy(given)
    graph.gm(*exact, *gates(graph))
    skipped = copy.deepcopy(given)
    out = graph.gm(*skipped, *gates(graph, skip=graph.sites))
    assert out[graph.outputs].all()
    for before, ran, gone in ((given[i], exact[i], skipped[i]) for i in written):
        assert not torch.equal(ran, before)
        assert (gone != before).any(dim=-1).sum() == (ran != before).any(dim=-1).sum(), "one row per position and head"
    assert all(int(skipped[i]) == int(exact[i]) == int(given[i]) + 1 for i in counters)
    first = graph.sites[0]
    closes = {first: graph.sites[2:]}
    for rule in range(3):
        for threshold, closed in ((-1.0, True), (1.1, False)):
            table = gates(graph, rule, threshold={first: threshold}, closes=closes)
            out = graph.gm(*copy.deepcopy(given), *table)
            assert out[graph.outputs].tolist() == [False, False, closed, closed]


LOWERED = ["llama", *map(seldom, ("gpt_neox", "mixtral", "t5", "bert"))]


@pytest.mark.parametrize("name", LOWERED)
def test_cond_and_static_equal_eager(name: str) -> None:
    architecture = ZOO[name]
    model, inputs = architecture.build(), architecture.inputs()
    double, double_inputs = in_double(model, inputs)
    names = [n for n, _, _ in architecture.expected()]
    skip = set(names[::2])
    compiled = skipc.compile(model, fullgraph=True, lowering="cond", **STRICT)
    static = skipc.compile(model, fullgraph=True, lowering="static", plan=skip, **STRICT)
    assert_no_further(double(**double_inputs), model(**inputs), compiled(**inputs))
    for gone in (skip, set(names)):
        with eager_skip(double, gone):
            truth = double(**double_inputs)
        with eager_skip(model, gone):
            eager = model(**inputs)
        with compiled.session(skip=gone) as session:
            assert_no_further(truth, eager, compiled(**inputs))
        assert set(session.stats().skipped) == gone
        assert session.stats().recompiles == 0
        if gone == skip:
            assert_no_further(truth, eager, static(**inputs))
    with static.session(skip=skip) as session:
        static(**inputs)
    assert set(session.stats().skipped) == skip
    with pytest.raises(skipc.PlanError, match="was compiled to skip"), static.session(skip=names[:1]):
        static(**inputs)
    for one in (static, compiled):
        with pytest.raises(skipc.PlanError, match="cannot use kv='none'"), one.session(skip=skip, kv="none"):
            one(**inputs)
    with (
        pytest.raises(skipc.PlanError, match="cannot use kv='none'"),
        compiled.session(policy=skipc.Static(skip, measures=True), kv="none"),
    ):
        compiled(**inputs)
    with pytest.raises(skipc.SessionError, match="takes no similarities"), static.session(policy=skipc.Observe()):
        static(**inputs)
    with pytest.raises(skipc.SessionError, match="measure=True needs"), compiled.session(measure=True):
        compiled(**inputs)


def test_a_static_plan_of_unknown_sites_is_refused() -> None:
    model, inputs = ZOO["llama"].build(), ZOO["llama"].inputs()
    compiled = skipc.compile(model, lowering="static", plan=["model.layers.0.mlpp"])
    with pytest.raises(Exception, match=r"did you mean 'model\.layers\.0\.mlp'"):
        compiled(**inputs)
    with pytest.raises(skipc.ConfigError, match="lowering='static'"):
        skipc.Config(plan=("model.layers.0.mlp",))
