"""Whole models on a GPU that is simulated: compiled as for one, its kernels interpreted, and the launches of a step
counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from skipc.kernels.device import simulated
from skipc.kernels.gpu.kernel import forced
from skipc.kernels.tables import Choice
from skipc.runtime.gating import GatedCall
from skipc.runtime.graphs import Graphs

import skipc
from tests.adapters.test_adapter import ids, trained
from tests.harness import STRICT, assert_no_further, seldom
from tests.kernels.gpu import DEVICE
from tests.models.zoo import ZOO

NEW = 5  # two steps that are proven alike, one that is looked at, one that is captured
# Few programs, since they run one after the other.
FEW = {
    "lora_rows": Choice(constants={"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_R": 16, "SPLIT_K": 0}),
    "decode_attention": Choice(constants={"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT": 1}),
}
LAYERS = 2


def a_gpu() -> AbstractContextManager[None]:
    """One that is simulated, if there is none."""
    return simulated() if DEVICE == "cpu" else nullcontext()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Case:
    """A small llama with a bank, its eager twins, and the tokens that these make."""

    def __init__(self) -> None:
        self.base = ZOO["llama"].build().to(DEVICE)
        self.bank = skipc.AdapterBank(self.base, slots=4, max_rank=8)
        self.eager = {f"r{rank}": trained("llama", rank, torch.float32, r=rank).to(DEVICE) for rank in (4, 7)}
        for name, model in self.eager.items():
            self.bank.load(name, model)
        self.compiled = skipc.compile(self.base, adapters=self.bank, fullgraph=True, **STRICT)

    def generate(self, rows: int = 2, **session: Any) -> torch.Tensor:
        with self.compiled.session(**session) as opened:
            made = skipc.generate(self.compiled, ids(rows, 5).to(DEVICE), max_new_tokens=NEW, eos_token_id=None)
            self.recompiles = opened.stats().recompiles
        return made

    def expected(self, names: list[str | None]) -> torch.Tensor:
        rows = []
        for row, name in zip(ids(len(names), 5).to(DEVICE), names, strict=True):
            tokens = row[None]
            for _ in range(NEW):
                model = self.base if name is None else self.eager[name]
                tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1].argmax(-1)[:, None]], 1)
            rows.append(tokens)
        return torch.cat(rows)

    @property
    def graphs(self) -> Graphs:
        return self.compiled._decoder.replay._repeated.graphs  # type: ignore[no-any-return]

    def launches(self) -> Counter[str]:
        """Of the graph that was captured last."""
        last = list(self.graphs._captured.values())[-1]
        return Counter(launch.kernel.name for launch in last.launches)


@pytest.fixture(scope="module")
def llama() -> Iterator[Case]:
    with a_gpu(), forced(FEW), torch.no_grad():
        yield Case()


def test_adapters_add_four_launches_a_layer(llama: Case) -> None:
    names = ["r4", "r7"]
    assert torch.equal(llama.generate(adapters=names), llama.expected(names))
    found = llama.launches()
    assert found.pop("lora_rows") == 4 * LAYERS
    assert found == {"decode_attention": LAYERS, "route": 1}


def test_rows_without_adapters_have_a_graph_of_their_own(llama: Case) -> None:
    assert torch.equal(llama.generate(adapters=[None, None]), llama.expected([None, None]))
    assert llama.launches() == {"decode_attention": LAYERS}
    assert torch.equal(llama.generate(adapters=["r7", None]), llama.expected(["r7", None]))
    assert llama.recompiles == 0


def test_a_skipped_site_adds_none(llama: Case) -> None:
    llama.generate(adapters=["r4", "r7"], skip={"model.layers.1.mlp"})
    assert llama.launches() == {"decode_attention": LAYERS, "route": 1, "lora_rows": 4 * LAYERS - 2}
    llama.generate(adapters=["r4", "r7"], skip={"model.layers.0.self_attn"})
    # what is left of the attention are keys and values, and what adapters add to these
    assert llama.launches() == {"decode_attention": LAYERS - 1, "route": 1, "lora_rows": 4 * LAYERS - 1}
    llama.generate(adapters=[None, None], skip={"model.layers.0.self_attn", "model.layers.0.mlp"})
    assert llama.launches() == {"decode_attention": LAYERS - 1}


def test_each_plan_is_captured_once(llama: Case) -> None:
    sessions: list[dict[str, Any]] = [{"adapters": ["r4", "r4"]}, {"skip": {"model.layers.1.mlp"}}]
    first = [llama.generate(**s) for s in sessions]
    before = dict(llama.graphs._captured)
    assert all(torch.equal(llama.generate(**s), f) for s, f in zip(sessions, first, strict=True))
    assert llama.recompiles == 0
    assert dict(llama.graphs._captured) == before


def test_what_lies_in_a_slot_is_read_at_each_replay(llama: Case) -> None:
    names: list[str | None] = ["r7", "r4"]
    llama.generate(adapters=names)
    llama.bank.load("again", llama.eager["r7"])  # goes to another slot
    try:
        assert torch.equal(llama.generate(adapters=["again", "r4"]), llama.expected(names))
    finally:
        llama.bank.unload("again")


def test_weights_that_moved_are_noticed(llama: Case) -> None:
    weight = llama.base.model.layers[0].mlp.down_proj.weight
    kept = weight.data
    llama.generate(adapters=[None, None])
    try:
        weight.data = kept.clone().mul_(0.5)
        assert torch.equal(llama.generate(adapters=[None, None]), llama.expected([None, None]))
    finally:
        weight.data = kept
    assert torch.equal(llama.generate(adapters=[None, None]), llama.expected([None, None]))


def test_routers_decide_on_the_device(llama: Case) -> None:
    torch.manual_seed(3)
    router = skipc.AdapterRouter(torch.randn(2, 64), ["r4", "r7"], top_k=1)
    one = llama.generate(rows=1, adapters=router)
    assert one.shape == (1, 5 + NEW)
    found = llama.launches()
    assert found["route"] == 1
    assert found["lora_rows"] == 4 * LAYERS


class TestPolicies:
    """Steps whose stream is measured, and about which a policy decides before they run."""

    def run(self, llama: Case, policy: Any, **session: Any) -> Any:
        with llama.compiled.session(policy=policy, record=True, **session) as opened:
            made = skipc.generate(llama.compiled, ids(2, 5).to(DEVICE), max_new_tokens=2 * NEW, eos_token_id=None)
        return made, opened

    def test_measuring_adds_no_launch_and_changes_no_token(self, llama: Case) -> None:
        skip = {"model.layers.1.mlp"}
        with llama.compiled.session(skip=skip):
            expected = skipc.generate(llama.compiled, ids(2, 5).to(DEVICE), max_new_tokens=2 * NEW, eos_token_id=None)
        made, session = self.run(llama, skipc.Static(skip, measures=True))
        assert torch.equal(made, expected)
        assert llama.launches() == {"decode_attention": LAYERS}
        assert set(session.stats().similarity) == set(session.stats().ran) - skip
        assert llama.graphs.refused is None

    def test_what_is_seen_is_what_each_step_did(self, llama: Case) -> None:
        """Similarities of captured steps are those of steps that ran one launch at a time."""
        _, captured = self.run(llama, skipc.Observe())
        assert any(len(key) == 3 for key in llama.graphs._captured)
        with a_gpu(), forced(FEW):
            plain = skipc.compile(llama.base, fullgraph=True, graphs=False, **STRICT)
            with plain.session(policy=skipc.Observe()) as session:
                skipc.generate(plain, ids(2, 5).to(DEVICE), max_new_tokens=2 * NEW, eos_token_id=None)
        ours, theirs = captured.stats(), session.stats()
        assert ours.similarity.keys() == theirs.similarity.keys()
        assert all(abs(v - theirs.similarity[n]) < 1e-5 for n, v in ours.similarity.items())
        assert ours.histogram == theirs.histogram

    def test_decisions_made_between_steps_are_captured(self, llama: Case) -> None:
        """One that skips after a warm-up and lets sites run again: each choice has a graph, and a route replays it."""
        policy = skipc.Lagged(-1.0, warmup=3, refresh=2)
        made, session = self.run(llama, policy)
        skipped = [step.skipped for step in session.route.steps]
        mlps = frozenset(f"model.layers.{i}.mlp" for i in range(LAYERS))
        assert skipped[:4] == [frozenset()] * 4
        assert set(skipped[4:]) == {mlps, frozenset()}
        with llama.compiled.session(route=session.route) as replay:
            again = skipc.generate(llama.compiled, ids(2, 5).to(DEVICE), max_new_tokens=2 * NEW, eos_token_id=None)
        assert torch.equal(again, made)
        assert replay.stats().recompiles == 0
        assert llama.graphs.refused is None

    def test_decisions_inside_a_step_are_made_on_the_device(self, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are those of the host, and a step is captured once, whatever is skipped in it."""
        _, seen = self.run(llama, skipc.Observe())
        typical = seen.stats().similarity["model.layers.0.mlp"]
        policy = skipc.FFNSkip(typical, cold_start=0, cold_end=0, warmup=0, rule="majority")
        with monkeypatch.context() as patch:
            patch.setattr(GatedCall, "leave_to_device", lambda self, adapted: None)
            expected, on_host = self.run(llama, policy)
        before = set(llama.graphs._captured)
        made, on_device = self.run(llama, policy)
        skipped = [step.skipped for step in on_device.route.steps]
        assert skipped == [step.skipped for step in on_host.route.steps]
        assert len(set(skipped[1:])) == 2  # some steps skip, others do not
        assert torch.equal(made, expected)
        ours, theirs = on_device.stats(), on_host.stats()
        assert ours.skipped == theirs.skipped
        assert ours.similarity.keys() == theirs.similarity.keys()
        assert all(abs(v - theirs.similarity[n]) < 1e-5 for n, v in ours.similarity.items())
        assert len(set(llama.graphs._captured) - before) == 1
        assert llama.launches() == {"decode_attention": LAYERS, "mlp_rows": LAYERS}
        assert llama.graphs.refused is None

    def test_where_rows_want_adapters_the_host_decides(self, llama: Case) -> None:
        before, names = dict(llama.graphs._captured), ["r4", "r7"]
        policy = skipc.FFNSkip(2.0, cold_start=0, cold_end=0, warmup=0)  # never reached
        assert torch.equal(llama.generate(adapters=names, policy=policy), llama.expected(names))
        assert dict(llama.graphs._captured) == before

    def test_decisions_about_attentions_stay_on_the_host(self, llama: Case) -> None:
        before = dict(llama.graphs._captured)
        _, session = self.run(llama, skipc.EarlyExit(-1.0))
        assert session.stats().skipped["model.layers.1.self_attn"] > 0
        assert dict(llama.graphs._captured) == before


@pytest.mark.parametrize("name", ["gemma2", seldom("qwen3")])
def test_other_attentions(name: str) -> None:
    """Caps on scores, sliding windows, norms of heads: prompts and steps beside eager."""
    model = ZOO[name].build().to(DEVICE)
    with a_gpu(), forced(FEW):
        compiled = skipc.compile(model, fullgraph=True, **STRICT)
        given = ids(2, 6).to(DEVICE)
        ours = compiled(input_ids=given, use_cache=False).logits
        tokens = skipc.generate(compiled, given, max_new_tokens=3, eos_token_id=None)
    eager = model(input_ids=given, use_cache=False).logits
    want = given
    for _ in range(3):
        want = torch.cat([want, model(input_ids=want, use_cache=False).logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(tokens, want)
    assert_no_further(model.double()(input_ids=given, use_cache=False).logits, eager, ours)


class TestGraphs:
    @pytest.fixture(autouse=True)
    def _simulated(self) -> Iterator[None]:
        with a_gpu():
            yield

    def test_outputs_stay_where_they_are(self) -> None:
        x = torch.ones(3, device=DEVICE)
        graphs = Graphs([x])
        first = graphs("a", lambda: (x * 2, 5))
        kept = first[0]
        x.fill_(4)
        assert graphs("a", lambda: (x * 2, 5))[0] is kept
        assert kept.tolist() == [8.0] * 3

    def test_a_step_that_waits_for_the_device_is_refused(self) -> None:
        x = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="waits for the device"):
            Graphs([x])("a", lambda: (x * float(x.sum()),))

    def test_inputs_that_moved(self) -> None:
        x = torch.ones(3, device=DEVICE)
        graphs = Graphs([x])
        graphs("a", lambda: (x * 2,))
        graphs.check()
        assert graphs.captured("a") is not None
        x.data = torch.zeros(3, device=DEVICE)
        graphs.check()
        assert graphs.captured("a") is None
