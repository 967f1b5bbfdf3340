"""Every architecture: all sublayers found, exact without a session, equal to eager hooks with any subset skipped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import skipc
from tests.harness import STRICT, assert_equal_bits, assert_no_further, eager_skip, in_double, seldom
from tests.models.zoo import BEYOND, ZOO, Architecture

ALL = {**ZOO, **BEYOND}


@dataclass
class Case:
    """One compiled architecture, shared by the tests of this module."""

    architecture: Architecture
    model: torch.nn.Module
    inputs: dict[str, Any]
    compiled: Any
    double: torch.nn.Module
    double_inputs: dict[str, Any]


# The others have no form of a sublayer that one of these does not have.
OFTEN = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "mixtral", "bert", "vit", "t5", "whisper", "torch_encoder",
         "hand_written", "mamba")  # fmt: skip


@pytest.fixture(scope="module", params=[*OFTEN, *(seldom(name) for name in ALL if name not in OFTEN)])
def case(request: pytest.FixtureRequest) -> Case:
    architecture = ALL[request.param]
    model, inputs = architecture.build(), architecture.inputs()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    return Case(architecture, model, inputs, compiled, *in_double(model, inputs))


def test_finds_every_sublayer(case: Case) -> None:
    report = skipc.find_sites(case.model, **case.inputs)
    assert sorted((s.name, s.kind, s.layer) for s in report) == sorted(case.architecture.expected())
    assert not report.graph_breaks
    streams = {s.name: s.stream for s in report}
    assert len(set(streams.values())) == len(case.architecture.streams)


def test_exact_without_a_session(case: Case) -> None:
    truth, eager = case.double(**case.double_inputs), case.model(**case.inputs)
    assert_no_further(truth, eager, case.compiled(**case.inputs))


def test_random_subsets_equal_hooks(case: Case) -> None:
    names = [name for name, _, _ in case.architecture.expected()]
    rng = random.Random(7)
    subsets = [set(names), *({n for n in names if rng.random() < 0.5} for _ in range(5))]
    case.compiled(**case.inputs)
    for skip in subsets:
        with eager_skip(case.double, skip):
            truth = case.double(**case.double_inputs)
        with eager_skip(case.model, skip):
            eager = case.model(**case.inputs)
        with case.compiled.session(skip=skip) as session:
            ours = case.compiled(**case.inputs)
        assert_no_further(truth, eager, ours)
        assert session.stats().recompiles == 0
        assert set(session.stats().skipped) == skip


def test_gates_choose_what_plans_choose(case: Case) -> None:
    """With its gates open a program gives the bits of the plan that they choose, first step by step, then in one piece;
    a route gives them again."""
    names = [name for name, _, _ in case.architecture.expected()]
    rng = random.Random(11)
    exact = case.compiled(**case.inputs)
    with case.compiled.session(measure=True) as measuring:
        case.compiled(**case.inputs)
    for _ in range(2):
        with case.compiled.session(policy=skipc.Observe()) as session:
            assert_equal_bits(case.compiled(**case.inputs), exact)
        found, expected = session.stats().similarity, measuring.stats().similarity
        assert set(found) == set(expected)
        if "attention_mask" not in case.inputs:  # padding has no say in what gates see
            assert all(abs(found[n] - expected[n]) < 1e-5 for n in names if n in found)
    for skip in (set(names), {n for n in names if rng.random() < 0.5}):
        with case.compiled.session(skip=skip):
            plan = case.compiled(**case.inputs)
        with case.compiled.session(policy=skipc.Static(skip, measures=True), record=True) as session:
            assert_equal_bits(case.compiled(**case.inputs), plan)
        assert set(session.stats().skipped) == skip
        with case.compiled.session(route=session.route) as replay:
            assert_equal_bits(case.compiled(**case.inputs), plan)
        assert replay.stats().recompiles == 0


def test_batch_of_one_and_other_length(case: Case) -> None:
    inputs = {
        k: v[:1, ..., :-1]
        if isinstance(v, torch.Tensor) and v.dim() == 2
        else v[:1]
        if isinstance(v, torch.Tensor)
        else v
        for k, v in case.inputs.items()
    }
    double_inputs = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    assert_no_further(case.double(**double_inputs), case.model(**inputs), case.compiled(**inputs))


def test_shared_module_counts_its_runs() -> None:
    """ALBERT runs one module for all layers: later sites are numbered."""
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                          vocab_size=96,
                          embedding_size=32)  # fmt: skip
    model = AlbertModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 96, (2, 7))}
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    base = "encoder.albert_layer_groups.0.albert_layers.0"
    names = [
        f"{base}.attention.dense",
        f"{base}.ffn_output",
        f"{base}.attention.dense#2",
        f"{base}.ffn_output#2",
    ]
    assert skipc.find_sites(model, **inputs).names == names
    double, double_inputs = in_double(model, inputs)
    compiled(**inputs)
    for skip in ({names[2]}, {names[0], names[3]}):
        with eager_skip(double, skip):
            truth = double(**double_inputs)
        with eager_skip(model, skip):
            eager = model(**inputs)
        with compiled.session(skip=skip):
            assert_no_further(truth, eager, compiled(**inputs))
