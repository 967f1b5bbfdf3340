"""Plans: other weights in the place of the model's, of the same and of other shapes, under one compiled model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from skipc.passes.lowering import outline
from skipc.runtime.variants import SizeGuards
from transformers import StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, eager_skip, in_double
from tests.models.zoo import ZOO, ids

MLP = {
    "llama": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "vit": ("layers.{}.mlp.fc1", "layers.{}.mlp.fc2"),
}


def thin(model: Any, name: str, layer: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of an MLP with ``width`` random neurons of the model's, and a random last layer."""
    *first, last = (model.get_submodule(path.format(layer)) for path in MLP[name])
    *names, end = (path.format(layer) for path in MLP[name])
    generator = torch.Generator().manual_seed(seed)
    keep = torch.randperm(first[0].weight.shape[0], generator=generator)[:width].sort().values
    weights = {f"{path}.weight": module.weight.detach()[keep] for path, module in zip(names, first, strict=True)}
    weights |= {
        f"{path}.bias": module.bias.detach()[keep]
        for path, module in zip(names, first, strict=True)
        if module.bias is not None
    }
    noise = torch.randn(last.weight.shape[0], width, generator=generator) * 0.05
    weights[f"{end}.weight"] = last.weight.detach()[:, keep] + noise
    return weights


def with_weights(model: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A copy of ``model`` in eager that has them."""
    made = copy.deepcopy(model)
    for name, value in weights.items():
        path, _, last = name.rpartition(".")
        dtype = next(made.parameters()).dtype
        setattr(made.get_submodule(path), last, torch.nn.Parameter(value.to(dtype), requires_grad=False))
    return made


@pytest.mark.parametrize("name", list(MLP))
@torch.no_grad()
def test_a_plan_runs_other_weights_and_leaves_the_model_alone(name: str) -> None:
    torch._dynamo.reset()
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    double, doubled = in_double(model, inputs)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    expected = compiled(**inputs)
    weights = thin(model, name, 1, 40)
    skip = {ZOO[name].expected()[0][0]}
    for plan in (skipc.Plan(weights=weights), skipc.Plan(skip, weights)):
        truth, eager = with_weights(double, weights), with_weights(model, weights)
        with eager_skip(truth, plan.skip), eager_skip(eager, plan.skip):
            a, b = truth(**doubled), eager(**inputs)
        with compiled.session(plan=plan) as session:
            for _ in range(2):
                assert_no_further(a, b, compiled(**inputs))
        assert session.stats().skipped.keys() == plan.skip
    with compiled.session(plan=plan) as session:
        compiled(**inputs)
    assert session.stats().recompiles == 0
    again = compiled(**inputs)
    first = [v for v in (expected if isinstance(expected, torch.Tensor) else expected.to_tuple()) if v is not None]
    second = [v for v in (again if isinstance(again, torch.Tensor) else again.to_tuple()) if v is not None]
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if isinstance(x, torch.Tensor))


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    return model, skipc.compile(model, fullgraph=True, **STRICT)


def in_chunks(model: Any, call: Any, chunks: list[int]) -> list[torch.Tensor]:
    cache, at, found = StaticCache(config=model.config, max_cache_len=24), 0, []
    text = ids(2, sum(chunks))
    for size in chunks:
        found.append(call(input_ids=text[:, at : at + size], past_key_values=cache).logits)
        at += size
    return found


@torch.no_grad()
def test_prefill_and_decode_under_a_plan_and_a_policy(llama: Any) -> None:
    """Thin MLPs of two widths, in the regions of a prompt and in the chains of decoding; gates work on top."""
    model, compiled = llama
    weights = thin(model, "llama", 0, 48) | thin(model, "llama", 1, 17, seed=1)
    plan, chunks = skipc.Plan(weights=weights), [5, 1, 1, 3, 1]
    truth = in_chunks(
        with_weights(in_double(model, {})[0], weights), with_weights(in_double(model, {})[0], weights), chunks
    )
    student = with_weights(model, weights)
    eager = in_chunks(student, student, chunks)
    with compiled.session(plan=plan):
        ours = in_chunks(model, compiled, chunks)
    for a, b, c in zip(truth, eager, ours, strict=True):
        assert_no_further(a, b, c)
    with compiled.session(plan=plan, policy=skipc.FFNSkip(-1.0, 0, 0, warmup=0), record=True) as session:
        in_chunks(model, compiled, chunks)
    assert any(step.skipped for step in session.route.steps)
    with compiled.session(plan=plan, policy=skipc.Observe()) as session:
        again = in_chunks(model, compiled, chunks)
    for a, b in zip(ours, again, strict=True):
        torch.testing.assert_close(a, b)
    assert session.stats().recompiles == 0


@torch.no_grad()
def test_generate_under_plans_that_take_turns(llama: Any) -> None:
    """Each request gets the tokens that its weights give; the model's own are what they were."""
    model, compiled = llama
    prompt = ids(2, 6)
    plans = [None, *(skipc.Plan(weights=thin(model, "llama", 0, width, seed=width)) for width in (33, 64, 33))]
    expected = []
    for plan in plans:
        student = with_weights(model, plan.weights) if plan is not None else model
        expected.append(skipc.generate(skipc.compile(student, **STRICT), prompt, max_new_tokens=8))
    for _ in range(2):
        for plan, tokens in zip(plans, expected, strict=True):
            with compiled.session(plan=plan):
                assert torch.equal(skipc.generate(compiled, prompt, max_new_tokens=8), tokens)


@torch.no_grad()
def test_equal_shapes_share_a_program_and_new_ones_are_announced(llama: Any, caplog: Any) -> None:
    model, compiled = llama
    x = ids(2, 6)
    with caplog.at_level(logging.WARNING, "skipc"):
        for seed in range(3):
            with compiled.session(plan=skipc.Plan(weights=thin(model, "llama", 1, 21, seed))):
                compiled(x, use_cache=False)
    assert sum("compiled once for a plan" in r.message for r in caplog.records) == 1
    same = {"model.layers.0.mlp.down_proj.weight": torch.zeros_like(model.model.layers[0].mlp.down_proj.weight)}
    with compiled.session(skip={"model.layers.0.mlp"}):
        without = compiled(x, use_cache=False).logits
    with compiled.session(plan=skipc.Plan(weights=same)) as session:
        torch.testing.assert_close(compiled(x, use_cache=False).logits, without)
    assert session.stats().recompiles == 0


@torch.no_grad()
def test_what_does_not_fit_is_refused_by_name(llama: Any) -> None:
    model, compiled = llama
    x = ids(2, 6)
    with pytest.raises(skipc.PlanError, match=r"no_proj.weight, which the model does not have \(did you mean"):
        compiled.session(plan=skipc.Plan(weights={"model.layers.0.mlp.no_proj.weight": torch.zeros(2, 2)}))
    half = thin(model, "llama", 0, 20)
    del half["model.layers.0.mlp.up_proj.weight"]
    with compiled.session(plan=skipc.Plan(weights=half)), pytest.raises(skipc.PlanError, match="does not fit"):
        compiled(x, use_cache=False)
    head = {"lm_head.weight": torch.zeros(10, model.config.hidden_size)}
    with (
        compiled.session(plan=skipc.Plan(weights=head)),
        pytest.raises(skipc.PlanError, match="what the model returns"),
    ):
        compiled(x, use_cache=False)
    with pytest.raises(TypeError, match="no floating tensor"):
        skipc.Plan(weights={"model.layers.0.mlp.up_proj.weight": torch.zeros(2, dtype=torch.long)})
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(skipc.PlanError, match=r"tied to model\.embed_tokens\.weight"):
        skipc.compile(tied).session(plan=skipc.Plan(weights={"lm_head.weight": torch.zeros(2, 2)}))
    static = skipc.compile(model, lowering="cond", fullgraph=True, **STRICT)
    with (
        static.session(plan=skipc.Plan(weights=thin(model, "llama", 0, 20))),
        pytest.raises(skipc.PlanError, match="need lowering='outline'"),
    ):
        static(x, use_cache=False)


@torch.no_grad()
def test_what_compiling_a_plan_assumed_is_checked_at_each_call(llama: Any, monkeypatch: Any) -> None:
    """Dynamo, which is done with the graph, would not."""
    model, compiled = llama
    plan = skipc.Plan(weights=thin(model, "llama", 0, 27))
    noted: list[SizeGuards] = []
    hold = SizeGuards.hold

    def note(self: SizeGuards, inputs: Any) -> bool:
        noted.append(self)
        return hold(self, inputs)

    monkeypatch.setattr(SizeGuards, "hold", note)
    original = outline.compile_region

    def assuming(gm: Any, config: Any, checked: bool = True) -> Any:
        sizes = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        assert all(size < 9 for size in sizes if isinstance(size, torch.SymInt))
        return original(gm, config, checked)

    compiled(ids(2, 6), use_cache=False)
    monkeypatch.setattr(outline, "compile_region", assuming)
    with compiled.session(plan=plan) as session:
        for tokens in (6, 8):
            compiled(ids(2, tokens), use_cache=False)
        with pytest.raises(skipc.PlanError, match="holds only where"):
            compiled(ids(2, 9), use_cache=False)
    assert len(noted) == 3
    assert session.stats().recompiles == 1


@torch.no_grad()
def test_weights_that_no_call_used_are_told() -> None:
    """Of an encoder alone, under a plan for the decoder."""
    torch._dynamo.reset()
    model = ZOO["t5"].build()
    compiled = skipc.compile(model.encoder, fullgraph=True, **STRICT)
    weights = {"block.0.layer.1.DenseReluDense.wo.weight": torch.zeros(64, 128)}
    with compiled.session(plan=skipc.Plan(weights=weights)):
        compiled(input_ids=ids(2, 6))
    function = torch.compile(model.encoder, backend="skipc", fullgraph=True)
    session = skipc.session(lambda: None, plan=skipc.Plan(weights=weights | {"decoder.x.weight": torch.zeros(2)}))
    with pytest.raises(skipc.SessionError, match=r"no call had a use for: decoder\.x\.weight$"), session:
        function(input_ids=ids(2, 6))


@torch.no_grad()
def test_a_plan_in_a_model_with_graph_breaks_is_refused() -> None:
    """What runs between the graphs would not see its weights."""
    torch._dynamo.reset()

    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ZOO["hand_written"].build()

        def forward(self, x: torch.Tensor) -> Any:
            y = self.model(x)
            torch._dynamo.graph_break()
            return self.model(x), y

    model = Broken()
    compiled = skipc.compile(model)
    name = next(n for n, _ in model.named_parameters() if n.endswith("mlp.2.weight"))
    plan = skipc.Plan(weights={name: torch.zeros_like(model.get_parameter(name))})
    (x,) = ZOO["hand_written"].inputs().values()
    with pytest.raises(skipc.FallbackError, match="graph breaks"), compiled.session(plan=plan):
        compiled(x)


class Alternating(skipc.Policy):
    """Every second call without the attentions."""

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        skip = [s.name for s in call.sites if s.effects] if call.phase == "decode" and call.position % 2 else []
        return skipc.GateTable.of(call.names, skip=skip, measures=False)


@torch.no_grad()
def test_what_backfill_runs_again_runs_in_the_weights_of_the_plan(llama: Any) -> None:
    """As in a model that has these weights."""
    model, compiled = llama
    weights = thin(model, "llama", 0, 33, seed=2)
    weights["model.layers.0.mlp.down_proj.weight"] *= 50  # so that the keys above are others
    student = skipc.compile(with_weights(model, weights), **STRICT)
    prompt, found = ids(2, 6), []
    for call, plan in ((student, None), (compiled, skipc.Plan(weights=weights))):
        with call.session(policy=Alternating(), kv="backfill", plan=plan) as session:
            found.append(skipc.generate(call, prompt, max_new_tokens=16))
        assert session.stats().backfilled
    assert torch.equal(*found)
