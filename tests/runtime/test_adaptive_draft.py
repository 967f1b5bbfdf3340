"""A draft that changes what it leaves out: for what brings more, and never what comes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from skipc.runtime.speculation import adaptive
from skipc.runtime.speculation.adaptive import AdaptiveDraft
from skipc.runtime.speculation.pace import Pace

import skipc
from tests.harness import STRICT
from tests.models.zoo import ids
from tests.runtime.test_speculation import padded
from tests.skipc.test_drafting import build

FIRST = {"model.layers.0.self_attn", "model.layers.0.mlp"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round drafts three tokens, has them judged and takes a second; trials follow each other."""
    clock = itertools.count()
    monkeypatch.setattr(adaptive.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(Pace, "choose_model", lambda self, models, most, otherwise: next(iter(models)))
    monkeypatch.setattr(Pace, "choose", lambda self, proposals, most: (4 if most >= 4 else 1, 1.0))
    monkeypatch.setattr(Pace, "goes_on", lambda self, model, kinds, most: max(map(len, kinds)) < 3)
    monkeypatch.setattr(adaptive, "_REST", 1)
    monkeypatch.setattr(adaptive, "_LONGEST_REST", 1)
    monkeypatch.setattr(adaptive, "_MOST", 24)


@pytest.fixture(scope="module")
def model() -> Any:
    """Its first layer alone decides what it says."""
    with torch.no_grad():
        return build()


@pytest.fixture(scope="module")
def compiled(model: Any) -> Any:
    return skipc.compile(model, fullgraph=True, **STRICT)


def ask(compiled: Any, batch: int, draft: Any, prompts: torch.Tensor, mask: Any, new: int = 90) -> tuple[Any, Any]:
    how = {"max_new_tokens": new, "attention_mask": mask, "eos_token_id": None}
    speculation = skipc.Speculation(draft, [4])
    return (
        (skipc.generate(compiled, prompts, **how), skipc.generate(compiled, prompts, speculative=speculation, **how)),
        speculation.stats,
    )


@pytest.mark.usefixtures("_alike")
@pytest.mark.parametrize("batch", [1, 3])
def test_what_decides_runs_again(compiled: Any, batch: int) -> None:
    """It begins without what matters, and ends with it. What it says of tokens never changes them."""
    draft = AdaptiveDraft(FIRST)
    assert draft.current is None
    given, mask = padded(batch)
    ask(compiled, batch, draft, given, mask)  # compiles
    with compiled.session() as session:
        for i in range(40):
            (plain, ours), _ = ask(compiled, batch, draft, (given + i) % 90 + 3, mask)
            assert torch.equal(ours, plain)
            assert draft.current is not None
            if not FIRST & draft.current.skip:
                break
    assert session.stats().recompiles == 0
    assert not FIRST & draft.current.skip
    began, came = (ask(compiled, batch, skipc.SelfDraft(plan), given, mask)[1] for plan in (FIRST, draft.current))
    assert began.acceptance + 0.1 < came.acceptance
    assert came.acceptance > 0.9


@pytest.mark.usefixtures("_alike")
def test_a_plan_that_is_right_stays(compiled: Any) -> None:
    """Where tokens are all that counts, nothing beats the whole model, and changes that change nothing are chance."""
    draft = AdaptiveDraft(["model.layers.1.mlp"])
    for i in range(6):
        _, stats = ask(compiled, 1, draft, ids(1, 9) + i, None)
    assert draft.current is not None
    assert not FIRST & draft.current.skip
    assert stats.acceptance > 0.7


@pytest.mark.usefixtures("_alike")
def test_a_plan_that_cannot_draft_is_not_tried(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = skipc.Plan(["model.layers.9.mlp"])
    monkeypatch.setattr(adaptive, "changed", lambda plan, sites, draw: wrong)
    opened = AdaptiveDraft._opened

    def refuse(self: AdaptiveDraft, plan: skipc.Plan) -> Any:
        if plan is wrong:
            raise skipc.PlanError("not this one")
        return opened(self, plan)

    monkeypatch.setattr(AdaptiveDraft, "_opened", refuse)
    draft = AdaptiveDraft(["model.layers.1.mlp"])
    (plain, ours), stats = ask(compiled, 1, draft, ids(1, 9), None)
    assert torch.equal(ours, plain)
    assert stats.drafted
    assert draft.current is not None
    assert draft.current.skip == {"model.layers.1.mlp"}


def test_time_counts_beside_tokens() -> None:
    """Of two plans that bring as many tokens, the one whose rounds take less time; a stall decides nothing."""

    def arm(tokens: Sequence[float], seconds: float) -> Any:
        made = adaptive._Arm(skipc.Plan())
        for i, n in enumerate([9.0, *tokens]):
            made.note(n, 100.0 if i in (0, 5) else seconds)
        return made

    draft = AdaptiveDraft(["a"])
    tokens = [2.0, 3.0, 2.0, 3.0] * 8
    for slow, fast, over in ((1.0, 0.7, True), (1.0, 1.3, True), (1.0, 1.0, False)):
        draft._arm = before = arm(tokens, slow)
        challenger = arm(tokens, fast)
        assert draft._over(before, challenger) is over
        assert (draft._arm is challenger) is (fast < slow)
    assert draft._rest == 2 * adaptive._REST


def test_a_plan_with_no_site_that_is_free_stays() -> None:
    draw = random.Random(0)
    assert all(adaptive.changed(skipc.Plan(["a"]), [], draw).skip == {"a"} for _ in range(8))


def test_drafts_that_begin_alike_share_what_is_known_of_them(compiled: Any, model: Any) -> None:
    assert AdaptiveDraft(FIRST).key == AdaptiveDraft(sorted(FIRST)).key != skipc.SelfDraft(FIRST).key
    with pytest.raises(skipc.ConfigError):
        AdaptiveDraft()
    with pytest.raises(skipc.UnknownSiteError, match="mlpp"):
        ask(compiled, 1, AdaptiveDraft(["model.layers.0.mlpp"]), ids(1, 9), None)
    draft = AdaptiveDraft(depth=1)
    ask(compiled, 1, draft, ids(1, 9), None, 8)
    assert draft.current is not None
    assert draft.current.skip == skipc.SelfDraft(depth=1).plan_for(model).skip
