"""What plans lose: padding, encoders, intervals; and the text that nobody brought."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import skipc
from skipc.calibration.batches import batches_of, call_on
from skipc.calibration.judging import Judge
from skipc.calibration.text import calibration_windows, documentation_text, english_text, halves
from tests.harness import known_times
from tests.models.zoo import ZOO, ids


@torch.no_grad()
def test_loss_is_the_ratio_of_perplexities_and_padding_has_no_say() -> None:
    model = ZOO["llama"].build()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 90, (2, 16), generator=generator) for _ in range(6)]
    plan = skipc.Plan({"model.layers.0.mlp"})

    def nats(text: torch.Tensor, skip: Any = ()) -> float:
        (batch,) = batches_of(model, [text])
        logits = call_on(model, batch, skip=skip).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))

    expected = math.exp(sum(nats(t, plan.skip) - nats(t) for t in texts) / len(texts)) - 1
    found = Judge(model, batches_of(model, texts)).judge(plan)
    assert found.measure == "perplexity"
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.low <= found.loss <= found.high
    assert found.tokens == 6 * 32
    assert Judge(model, batches_of(model, texts)).judge(skipc.Plan()).agreement == 1.0
    padded = []
    for text in texts:
        wide = torch.cat([torch.full((2, 3), 5), text], 1)
        mask = torch.ones_like(wide)
        mask[:, :3] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded.append({"input_ids": wide, "attention_mask": mask, "position_ids": positions})
    again = Judge(model, batches_of(model, padded)).judge(plan)
    assert again.loss == pytest.approx(found.loss, rel=1e-3)
    assert again.agreement == found.agreement


def test_encoders_are_judged_by_their_embeddings() -> None:
    model = ZOO["bert"].build()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    judged = []
    for padding in (1, 2):
        text = ids(2, 7)
        text[0, 5:] = padding
        judge = Judge(model, batches_of(model, [{"input_ids": text, "attention_mask": mask}]))
        names = skipc.find_sites(model, text, attention_mask=mask).names
        judged.append(judge.judge(skipc.Plan([n for n in names if "0.attention" in n])))
    assert judged[0].measure == "cosine"
    assert 0 < judged[0].loss < 1
    assert judged[0].agreement is None
    assert judged[0].loss == pytest.approx(judged[1].loss, rel=1e-4)


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 90 for c in text]]))


def test_the_default_text_keeps_what_it_judges_by_apart() -> None:
    given, judged = calibration_windows(Letters(), 128, 8, seed=0)
    assert len(judged) == 8
    assert all(w.shape == (1, 128) for w in (*given, *judged))
    assert len(documentation_text()) > 500_000
    assert len(given) > 1000
    read, other = halves(english_text())
    read += documentation_text()
    pieces = [other[i : i + 80] for i in range(0, len(other) - 80, 80)]
    assert sum(piece in read for piece in pieces) <= 0.01 * len(pieces)
    again, _ = calibration_windows(Letters(), 128, 8, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


def test_an_encoder_is_calibrated_for_its_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    known_times(monkeypatch)
    model = ZOO["bert"].build()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(10):
        text = torch.randint(3, 90, (4, 12), generator=generator)
        batches.append({"input_ids": text, "attention_mask": torch.ones_like(text)})
    profile = skipc.calibrate(model, batches, removals=(0.2,), most_in_a_row=0, progress=False)
    (entry,) = profile.menu
    assert str(profile.regime) == "prefill, batch 4, 12 tokens"
    assert entry.judgement.measure == "cosine"
    assert entry.kv is None
    plan = profile.plan_of(entry)
    assert plan.weights
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    with torch.no_grad(), compiled.session(plan=plan):
        found = compiled(**batches[0]).last_hidden_state
    expected = call_on(model, batches_of(model, batches[:1])[0], plan.weights).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
