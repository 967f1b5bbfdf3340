"""Sessions with policies: what they share, what they must not, padding, chunks, failures; and random gates."""

from __future__ import annotations

import contextvars
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, eager_skip, in_double
from tests.models.zoo import ZOO

LENGTH = 24
SITES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    for batch in (2, 1):
        run(model, compiled, [5, 1], batch)
    return model, in_double(model, {})[0], compiled


def new_cache(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=LENGTH)


def tokens(batch: int, count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, call: Any, chunks: list[int], batch: int = 2, **more: Any) -> list[torch.Tensor]:
    """Logits of one call for each chunk of a text."""
    ids, cache, at, logits = tokens(batch, sum(chunks)), new_cache(model), 0, []
    for size in chunks:
        logits.append(call(input_ids=ids[:, at : at + size], past_key_values=cache, **more).logits)
        at += size
    return logits


def test_a_new_session_starts_clean_and_the_policy_given_stays_as_it_is(models: Any) -> None:
    model, _, compiled = models
    policy = skipc.Lagged(0.5, warmup=2, refresh=2, attention=True)
    routes = []
    for _ in range(2):
        with compiled.session(policy=policy, record=True) as session:
            run(model, compiled, [5, *[1] * 6])
        routes.append(session.route)
    assert routes[0].digest() == routes[1].digest()
    assert any(step.skipped for step in routes[0].steps)
    assert policy._steps == 0


def test_two_sessions_on_one_model_do_not_mix(models: Any) -> None:
    """Requests that take turns get what each gets alone."""
    model, _, compiled = models
    policies = [skipc.Lagged(0.5, warmup=1, refresh=3, attention=True), skipc.FFNSkip(0.5, 0, 0, warmup=0)]
    chunks = [[5, *[1] * 6], [3, 2, *[1] * 5]]
    alone = []
    for policy, sizes in zip(policies, chunks, strict=True):
        with compiled.session(policy=policy):
            alone.append(run(model, compiled, sizes))
    contexts = [contextvars.copy_context() for _ in policies]
    sessions = [compiled.session(policy=p) for p in policies]
    for context, session in zip(contexts, sessions, strict=True):
        context.run(session.__enter__)
    caches, together = [new_cache(model) for _ in policies], [[], []]  # type: ignore[var-annotated]
    ids, at = [tokens(2, sum(c)) for c in chunks], [0, 0]
    for turn in range(max(map(len, chunks))):
        for k, sizes in enumerate(chunks):
            if turn < len(sizes):
                piece = ids[k][:, at[k] : at[k] + sizes[turn]]
                with torch.no_grad():
                    made = contexts[k].run(compiled, input_ids=piece, past_key_values=caches[k])
                together[k].append(made.logits)
                at[k] += sizes[turn]
    for context, session in zip(contexts, sessions, strict=True):
        context.run(session.__exit__, None, None, None)
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_chunked_prefill_counts_positions(models: Any) -> None:
    """Chunks of a prompt are prefill; one token behind others is a decode step, unless the session says otherwise."""
    model, _, compiled = models
    seen: list[tuple[int, int, int, str]] = []

    class Watch(skipc.Observe):
        def decide(self, call: skipc.Call) -> skipc.GateTable:
            seen.append((call.batch, call.tokens, call.position, call.phase))
            return super().decide(call)

    with compiled.session(policy=Watch()) as session:
        run(model, compiled, [4, 3, 1])
        session.phase = "prefill"
        with torch.no_grad():
            compiled(input_ids=tokens(2, 1), past_key_values=new_cache(model))
    assert seen == [(2, 4, 0, "prefill"), (2, 3, 4, "prefill"), (2, 1, 7, "decode"), (2, 1, 8, "prefill")]
    with pytest.raises(skipc.SessionError, match="phase is"):
        session.phase = "training"  # type: ignore[assignment]


@torch.no_grad()
def test_padding_has_no_say(models: Any) -> None:
    """A site's similarity under every rule is that of the valid tokens."""
    model, _, compiled = models
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    streams: dict[str, torch.Tensor] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: streams.__setitem__(f"before{i}", a[0])))
        handles.append(layer.register_forward_hook(lambda m, a, out, i=i: streams.__setitem__(f"after{i}", out)))
    model(**given, past_key_values=new_cache(model))
    for handle in handles:
        handle.remove()
    similar = torch.nn.functional.cosine_similarity(streams["before0"], streams["after0"], dim=-1)
    valid = similar[mask.bool()]
    assert not math.isclose(similar.mean(), valid.mean(), abs_tol=1e-3)
    for rule, bound in (("mean", valid.mean()), ("all", valid.min()), ("majority", valid.sort().values[3])):
        for threshold, exits in ((bound - 1e-4, True), (bound + 1e-4, False)):
            policy = skipc.EarlyExit(float(threshold), rule=rule)  # type: ignore[arg-type]
            with compiled.session(policy=policy, record=True) as session:
                compiled(**given, past_key_values=new_cache(model))
            assert bool(session.route.steps[0].skipped) == exits, rule


def test_a_failed_call_leaves_no_trace(models: Any) -> None:
    model, _, compiled = models

    class Failing(skipc.Lagged):
        broken = False

        def decide(self, call: skipc.Call) -> skipc.GateTable:
            if self.broken:
                raise ValueError("on purpose")
            return super().decide(call)

    with compiled.session(policy=Failing(0.5, warmup=1), record=True) as session, torch.no_grad():
        cache = new_cache(model)
        compiled(input_ids=tokens(2, 5), past_key_values=cache)
        position, route = dict(session.steering._positions), len(session.route)
        session.steering.policy.broken = True
        with pytest.raises(ValueError, match="on purpose"):
            compiled(input_ids=tokens(2, 1), past_key_values=cache)
        assert session.steering._positions == position
        assert len(session.route) == route
        session.steering.policy.broken = False
        compiled(input_ids=tokens(2, 1), past_key_values=cache)
    assert session.stats().calls == 2
    assert all(int(layer.cumulative_length) == 6 for layer in cache.layers)


def test_gates_that_do_not_pay_pause(models: Any) -> None:
    """A policy that skips too little stops being asked for a while; one that skips enough goes on."""
    model, _, compiled = models
    asked: list[int] = []

    class Asked(skipc.Static):
        def decide(self, call: skipc.Call) -> skipc.GateTable:
            asked.append(call.position)
            return super().decide(call)

    for skip, expected in (((), [0, 4, 5, 9, 10]), ((SITES[1],), [0, *range(4, 14)])):
        asked.clear()
        policy = skipc.Worthwhile(Asked(skip, phases=("decode",)), share=0.2, window=2, pause=3)
        with compiled.session(policy=policy, record=True) as session:
            run(model, compiled, [4, *[1] * 10])
        assert asked[: len(expected)] == expected
        assert [bool(s.skipped) for s in session.route.steps] == [False] + [bool(skip)] * 10


def test_bad_settings_are_refused(models: Any, tmp_path: Path) -> None:
    model, _, compiled = models
    with pytest.raises(skipc.SessionError, match="goes with neither"):
        compiled.session(policy=skipc.Observe(), skip=SITES[:1])
    with pytest.raises(skipc.SessionError, match="without measure"):
        compiled.session(record=True, measure=True)
    with pytest.raises(TypeError, match=r"skipc\.Policy"):
        compiled.session(policy="adaskip")
    with pytest.raises(skipc.SessionError, match="either a policy or a route"):
        compiled.session(policy=skipc.Observe(), route=skipc.Route())
    with pytest.raises(skipc.SessionError, match="0 calls"), compiled.session(route=skipc.Route()):
        run(model, compiled, [5])
    with pytest.raises(skipc.PlanError, match="cannot decide about"):
        skipc.GateTable.of(SITES, closes={SITES[1]: [SITES[0]]})
    with pytest.raises(skipc.UnknownSiteError, match="did you mean"):
        skipc.GateTable.of(SITES, skip=["model.layers.0.mpl"])
    with compiled.session(policy=skipc.Observe()) as session:
        run(model, compiled, [5])
    with pytest.raises(skipc.SessionError, match="record=True"):
        _ = session.route
    (tmp_path / "route.json").write_text("[]")
    with pytest.raises(skipc.PlanError, match="is no route"):
        skipc.Route.load(tmp_path / "route.json")
    for settings_ in ({"enter": 0.9, "leave": 0.95}, {"enter": 0.9, "refresh": 0}, {"enter": 0.9, "rule": "some"}):
        with pytest.raises(skipc.ConfigError):
            skipc.Lagged(**settings_)  # type: ignore[arg-type]
    with pytest.raises(skipc.ConfigError, match="either count or acceleration"):
        skipc.AdaSkip({})


class Drawn(skipc.Policy):
    """Gates that a test draws."""

    only_grows = False

    def __init__(self, tables: list[dict[str, Any]]):
        self.tables, self.call = tables, 0

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        return skipc.GateTable.of(call.names, **self.tables[self.call])

    def observe(self, call: skipc.Call, seen: Any) -> None:
        self.call += 1


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Random gates: some sites skipped, some deciding with thresholds that are met, or may be, or cannot."""
    skip = draw(st.sets(st.sampled_from(SITES)))
    deciding = draw(st.sets(st.sampled_from(SITES[:-1])))
    return {
        "skip": skip,
        "threshold": {n: draw(st.sampled_from([-1.0, 0.6, 0.9, 2.0])) for n in sorted(deciding)},
        "closes": {n: draw(st.sets(st.sampled_from(SITES[SITES.index(n) + 1 :]))) for n in sorted(deciding)},
        "scale": {n: draw(st.sampled_from([1.0, 1.5])) for n in sorted(skip)},
        "rule": draw(st.sampled_from(["all", "majority", "mean", "gather"])),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_gates_replay_and_lose_no_write(models: Any, tmp_path_factory: Any, data: Any) -> None:
    """Whatever is skipped: the route gives the same bits again, after a round trip through a file, and every cache
    holds one row for each position."""
    model, double, compiled = models
    batch = data.draw(st.sampled_from([1, 2]))
    chunks = [data.draw(st.integers(2, 6)), *[1] * data.draw(st.integers(1, 4))]
    drawn = [data.draw(tables()) for _ in chunks]
    kv = data.draw(st.sampled_from(["project", "copy"]))
    with compiled.session(policy=Drawn(drawn), record=True, kv=kv) as session, torch.no_grad():
        ids, cache, at, logits = tokens(batch, sum(chunks)), new_cache(model), 0, []
        for size in chunks:
            logits.append(compiled(input_ids=ids[:, at : at + size], past_key_values=cache).logits)
            at += size
            for layer in cache.layers:
                assert int(layer.cumulative_length) == at
                written = (layer.keys != 0).any(-1).all(1)  # [batch, positions]
                assert written[:, :at].all()
                assert not written[:, at:].any()
    path = tmp_path_factory.mktemp("route") / "route.json"
    session.route.save(path)
    route = skipc.Route.load(path)
    assert route.digest() == session.route.digest()
    with compiled.session(route=route, kv=kv):
        assert all(torch.equal(a, b) for a, b in zip(run(model, compiled, chunks, batch), logits, strict=True))
    plain = kv == "project" and not any(s.tokens or s.scale for s in route.steps)
    if plain and len({s.skipped for s in route.steps}) == 1:
        with eager_skip(double, route.steps[0].skipped):
            truth = run(double, double, chunks, batch)
        with eager_skip(model, route.steps[0].skipped):
            eager = run(model, model, chunks, batch)
        assert_no_further(truth, eager, logits)
