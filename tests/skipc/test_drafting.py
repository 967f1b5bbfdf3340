"""Finding what to leave out of a model that drafts for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from skipc.runtime.speculation.pace import promise

import skipc
from skipc.calibration import drafting
from tests.harness import STRICT
from tests.models.zoo import ZOO, ids


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build() -> Any:
    """A model whose first layer alone decides what it says: sublayers of the others add next to nothing."""
    model = ZOO["llama"].build()
    for layer in model.model.layers[1:]:
        layer.mlp.down_proj.weight.mul_(1e-6)
        layer.self_attn.o_proj.weight.mul_(1e-6)
    return model


def test_what_changes_nothing_is_left_out() -> None:
    model = build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    given = skipc.Plan(["model.layers.0.mlp", "model.layers.0.self_attn"])
    prompts = ids(4, 12)
    with compiled.session() as session:
        found = skipc.find_draft(compiled, prompts, plans=[given], trials=6, context=12)
    best = found[0]
    assert session.stats().recompiles <= 8  # prompts and calls of each kind, none for a candidate
    assert found == sorted(found[:3], key=lambda f: -f.promise) + found[3:]
    assert best.agreement > 0.99
    assert best.plan.skip >= {"model.layers.1.mlp"}
    assert f"{len(best.plan.skip)} sites" in str(best)
    assert next(f for f in found if f.plan.skip == given.skip).agreement < 0.9
    speculation = skipc.Speculation(best.draft)
    plain = skipc.generate(compiled, prompts[:1], max_new_tokens=60, eos_token_id=None)
    ours = skipc.generate(compiled, prompts[:1], max_new_tokens=60, eos_token_id=None, speculative=speculation)
    assert torch.equal(ours, plain)


def test_what_cannot_draft_is_refused() -> None:
    with pytest.raises(TypeError, match="tokenizer"):
        skipc.find_draft(skipc.compile(build()))
    sliding = skipc.compile(ZOO["mistral"].build(), fullgraph=True, **STRICT)
    with pytest.raises(skipc.PlanError, match="slides"):
        skipc.find_draft(sliding, ids(2, 9))


def test_what_sites_take_adds_up_to_what_a_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tenths of which are no site's."""
    monkeypatch.setattr(
        drafting, "_by_width", lambda d, row, widths: dict.fromkeys(widths, 0.4 if len(widths) == 1 else 1.0)
    )
    compiled = skipc.compile(build(), fullgraph=True, **STRICT)
    times = drafting._Times(compiled, 1, 12, ids(1, 16))
    assert times.judge(skipc.Plan(times.seconds), 0.0).cost == pytest.approx(0.4)
    first = times.judge(skipc.Plan(s for s in times.seconds if "layers.0" in s), 0.0).cost
    assert 0.4 < first < 1


def test_what_drafts_promise() -> None:
    def judging(count: int) -> float:
        return 1.0

    assert promise(0.0, 0.5, judging, 8) == (pytest.approx(1 / 1.5), 1)
    assert promise(1.0, 0.0, judging, 8) == (pytest.approx(8.0), 7)
    gain, length = promise(0.8, 0.2, judging, 8)
    assert gain == pytest.approx(sum(0.8**i for i in range(length + 1)) / (1 + 0.2 * length))
    assert all(sum(0.8**i for i in range(n + 1)) / (1 + 0.2 * n) <= gain for n in range(1, 8))
