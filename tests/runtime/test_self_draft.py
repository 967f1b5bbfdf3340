"""A model without some of its sublayers drafts for the whole of it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch
from skipc.runtime.speculation.pace import Pace

import skipc
from skipc.ir.site import Source
from tests.adapters.test_adapter import trained
from tests.harness import STRICT
from tests.models.zoo import ZOO, ids
from tests.runtime.test_speculation import NEW, WIDTHS, padded

SKIP = {"model.layers.1.self_attn", "model.layers.1.mlp"}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model drafts now and then, as many tokens as it happens, and calls of any width judge them."""
    chosen = random.Random(1)

    def choose(self: Pace, proposals: Sequence[skipc.Proposal], most: int) -> tuple[int, float]:
        return chosen.choice([w for w in self.widths if w <= most]), 1.0

    def choose_model(self: Pace, models: Sequence[Hashable], most: int, otherwise: float) -> Hashable | None:
        return chosen.choice([*models, None]) if most >= min(WIDTHS) else None

    def goes_on(self: Pace, model: Hashable, kinds: Sequence[Sequence[Hashable]], most: int) -> bool:
        return max(map(len, kinds)) < most - 1 and chosen.random() < 0.8

    monkeypatch.setattr(Pace, "choose", choose)
    monkeypatch.setattr(Pace, "choose_model", choose_model)
    monkeypatch.setattr(Pace, "goes_on", goes_on)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return skipc.compile(ZOO["llama"].build(), fullgraph=True, **STRICT)


def both(compiled: Any, batch: int, draft: Any, **how: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens without drafts and with them, and what came of those."""
    given, mask = padded(batch)
    how = {"max_new_tokens": NEW, "attention_mask": mask, "eos_token_id": None, **how}
    speculation = skipc.Speculation(draft, WIDTHS)
    return (
        skipc.generate(compiled, given, **how),
        skipc.generate(compiled, given, speculative=speculation, **how),
        speculation.stats,
    )


def drafts() -> dict[str, Any]:
    """Of all kinds."""
    width, random_ = 64, torch.Generator().manual_seed(0)
    source = Source("model.layers.1.post_attention_layernorm", True, width)
    small = {name: 0.001 * torch.randn(shape, generator=random_)
             for name, shape in {"down": (4, width), "up": (width, 4), "shift": (width,)}.items()}  # fmt: skip
    replaced = skipc.Plan(["model.layers.1.self_attn"], replace={"model.layers.1.mlp": skipc.LowRank(source, **small)})
    return {
        "skip": skipc.SelfDraft(SKIP),
        "exit": skipc.SelfDraft(depth=1),
        "first attention": skipc.SelfDraft(["model.layers.0.self_attn"]),
        "adapter": skipc.SelfDraft(replaced),
        "adaptive": skipc.AdaptiveDraft(SKIP),
        "several": [skipc.PromptLookup(), skipc.SelfDraft(SKIP), skipc.SelfDraft(["model.layers.0.mlp"])],
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["skip", "exit", "first attention", "adapter", "adaptive", "several"])
def test_greedy_tokens_are_the_same(llama: Any, kind: str, batch: int) -> None:
    plain, ours, stats = both(llama, batch, drafts()[kind])
    assert torch.equal(ours, plain)
    assert stats.steps > 5
    assert 0 < stats.accepted < stats.drafted
    with llama.session() as session:
        again = both(llama, batch, drafts()[kind])
    assert torch.equal(again[1], plain)
    assert session.stats().recompiles == 0
    assert {step.replay.refused for step in llama._decoder._steps.values()} == {None}


def test_the_whole_model_is_always_right(llama: Any) -> None:
    _, _, stats = both(llama, 1, skipc.SelfDraft(skipc.Plan()))
    assert stats.acceptance == 1.0


def test_a_draft_tells_of_each_token_how_likely_it_found_it(llama: Any) -> None:
    said: list[skipc.Proposal] = []

    class Told(skipc.SelfDraft):
        def propose(self, most: Sequence[int]) -> list[skipc.Proposal]:
            made = super().propose(most)
            said.extend(made)
            return made

    both(llama, 1, Told(SKIP))
    kinds = [kind for proposal in said for kind in proposal.kinds]
    assert all(len(p.kinds) == len(p.tokens) for p in said)
    assert set(kinds) <= set(range(10))


def test_sessions_hold_for_drafts(llama: Any) -> None:
    with llama.session(skip={"model.layers.0.mlp"}) as session:
        plain, ours, stats = both(llama, 1, skipc.SelfDraft(SKIP))
    assert torch.equal(ours, plain)
    assert stats.accepted
    counts = session.stats()
    assert counts.skipped == {"model.layers.0.mlp": counts.calls}  # drafting was not the session's own doing
    own = skipc.Plan(weights={"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 128)})
    with llama.session(plan=own):
        plain, ours, stats = both(llama, 1, skipc.SelfDraft(SKIP))
        assert torch.equal(ours, plain)
        with pytest.raises(skipc.PlanError, match="weights or replacements"):
            both(llama, 1, drafts()["adapter"])


def test_adapters_hold_for_drafts() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=4, max_rank=8)
    bank.load("a", trained("llama", 4, torch.float32, r=4))
    compiled = skipc.compile(base, adapters=bank, fullgraph=True, **STRICT)
    with compiled.session(adapters=["a"]):
        plain, ours, stats = both(compiled, 1, skipc.SelfDraft(skipc.Plan()))
    assert torch.equal(ours, plain)
    assert stats.acceptance == 1.0  # only with the same adapter


def test_an_edit_between_calls_is_seen(llama: Any) -> None:
    """Weights that a callback replaces hold for what follows, drafts or not."""
    norm = llama.model.model.norm
    before = norm.weight

    def run(speculative: Any) -> torch.Tensor:
        norm.weight, seen = before, []

        def edit(tokens: torch.Tensor) -> None:
            seen.append(tokens)
            if len(seen) == 8:
                norm.weight = torch.nn.Parameter(-before.detach())

        return skipc.generate(llama, ids(1, 9), max_new_tokens=NEW, on_token=edit, eos_token_id=None,
                              speculative=speculative)  # fmt: skip

    try:
        assert torch.equal(run(skipc.Speculation(skipc.SelfDraft(SKIP), WIDTHS))[:, : 9 + 8], run(False)[:, : 9 + 8])
    finally:
        norm.weight = before


def test_a_call_that_judges_sees_an_edit_too(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what was judged before an edit, which here leaves nothing to say but token 0, comes nothing else."""
    monkeypatch.setattr(Pace, "choose", lambda self, proposals, most: (4, 1.0))
    monkeypatch.setattr(Pace, "choose_model", lambda self, models, most, otherwise: next(iter(models)))
    norm = llama.model.model.norm
    before, seen = norm.weight, 0

    def edit(tokens: torch.Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen == 60:  # calls are repeated by then
            norm.weight = torch.nn.Parameter(torch.zeros_like(before))

    try:
        for _ in range(2):
            norm.weight, seen = before, 0
            speculation = skipc.Speculation(skipc.SelfDraft(SKIP), WIDTHS)
            made = skipc.generate(llama, ids(1, 9), max_new_tokens=120, on_token=edit, eos_token_id=None,
                                  speculative=speculation)  # fmt: skip
            assert not made[:, 9 + 60 + max(WIDTHS) :].any()
    finally:
        norm.weight = before


def test_drafts_that_leave_out_the_same_share_what_is_known_of_them() -> None:
    assert skipc.SelfDraft(SKIP).key == skipc.SelfDraft(skipc.Plan(sorted(SKIP))).key
    assert skipc.SelfDraft(SKIP).key != skipc.SelfDraft(skipc.Plan()).key
    assert drafts()["adapter"].key != drafts()["adapter"].key


def test_what_is_no_draft_is_refused(llama: Any) -> None:
    for given in ({}, {"plan": SKIP, "depth": 1}, {"depth": 0}):
        with pytest.raises(skipc.ConfigError):
            skipc.SelfDraft(**given)
    with pytest.raises(skipc.UnknownSiteError, match="mlpp"):
        both(llama, 1, skipc.SelfDraft(["model.layers.0.mlpp"]))
    with pytest.raises(skipc.PlanError, match="layer 9"):
        both(llama, 1, skipc.SelfDraft(depth=9))
    with pytest.raises(skipc.ConfigError, match="needs a draft"):
        skipc.Speculation([])
