"""What plans lose: padding, encoders, intervals; and the text that nobody brought."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import skipc
from skipc.calibration.batches import batches_of, call_on
from skipc.calibration.judging import Judge, Judgement
from skipc.calibration.text import calibration_windows, documentation_text, english_text, halves
from tests.harness import known_times, unlike_in_padding
from tests.models.zoo import ZOO, ids


@torch.no_grad()
def test_loss_is_the_ratio_of_perplexities_and_padding_has_no_say() -> None:
    model = ZOO["llama"].build()
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 90, (2, 16), generator=generator) for _ in range(6)]
    plan = skipc.Plan({"model.layers.0.mlp"})

    def nats(text: torch.Tensor, plan: skipc.Plan | None = None) -> float:
        (batch,) = batches_of(model, [text])
        logits = call_on(model, batch, plan).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))

    expected = math.exp(sum(nats(t, plan) - nats(t) for t in texts) / len(texts)) - 1
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


@torch.no_grad()
def test_kinds_of_text_are_judged_each_by_itself() -> None:
    model = ZOO["llama"].build()
    generator = torch.Generator().manual_seed(3)
    low = [torch.randint(3, 20, (2, 16), generator=generator) for _ in range(3)]
    high = [torch.randint(50, 90, (2, 16), generator=generator) for _ in range(5)]
    plan = skipc.Plan({"model.layers.0.mlp"})
    mixed = batches_of(model, [low[0], *high, *low[1:]])
    found = Judge(model, mixed, ["low", *["high"] * 5, "low", "low"]).judge(plan)
    assert list(found.parts) == ["low", "high"]
    for kind, texts in (("low", low), ("high", high)):
        alone = Judge(model, batches_of(model, texts)).judge(plan)
        assert found.parts[kind][0] == pytest.approx(alone.loss, rel=1e-6)
        assert found.parts[kind][1] <= alone.loss <= found.parts[kind][2]
        assert not alone.parts
    mean = sum(math.log1p(found.parts[kind][0]) * n for kind, n in (("low", 3), ("high", 5))) / 8
    assert found.loss == pytest.approx(math.expm1(mean), rel=1e-6)
    assert found.low <= found.loss <= found.high
    whole = Judge(model, mixed).judge(plan)
    assert whole.loss == pytest.approx(found.loss, rel=1e-9)
    assert not Judge(model, mixed, ["one"] * 8).judge(plan).parts
    assert Judgement(**json.loads(json.dumps(asdict(found)))) == found
    assert f"(low {found.parts['low'][0]:+.1%}, high {found.parts['high'][0]:+.1%})" in str(found)
    assert "(" not in str(whole)
    with pytest.raises(ValueError, match="argument"):
        Judge(model, mixed, ["low"] * 7)


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 6], ids=["", "same lengths"])
def test_an_encoder_decoder_is_judged_on_the_decoders_tokens(length: int) -> None:
    model = ZOO["t5"].build()
    plan = skipc.Plan({"decoder.block.0.layer.2.DenseReluDense"})
    read, said = ids(2, length), ids(2, 6) + 1
    mask, decoder_mask = torch.ones_like(read), torch.ones_like(said)
    mask[0, 2:] = 0
    decoder_mask[1, 4:] = 0

    def lost_by(**inputs: Any) -> torch.Tensor:
        (batch,) = batches_of(model, [{"input_ids": read, "attention_mask": mask, **inputs}])
        with_plan, without = (call_on(model, batch, p).logits.log_softmax(-1) for p in (plan, None))
        return without - with_plan

    def loss(**inputs: Any) -> float:
        batches = batches_of(model, [{"input_ids": read, "attention_mask": mask, **inputs}])
        return Judge(model, batches).judge(plan).loss

    lost = lost_by(decoder_input_ids=said)
    each = lost[:, :-1].gather(2, said[:, 1:, None])[..., 0]
    assert loss(decoder_input_ids=said) == pytest.approx(math.expm1(each.mean()), rel=1e-4)
    some = torch.cat([each[0], each[1, :3]])
    judged = loss(decoder_input_ids=said, decoder_attention_mask=decoder_mask)
    assert judged == pytest.approx(math.expm1(some.mean()), rel=1e-4)
    other = torch.where(decoder_mask.bool(), said, 7)
    assert loss(decoder_input_ids=other, decoder_attention_mask=decoder_mask) == pytest.approx(judged, rel=1e-6)
    labels = said.masked_fill(decoder_mask == 0, -100)
    lost = lost_by(labels=labels)
    each = lost.gather(2, said[..., None])[..., 0][decoder_mask.bool()]
    assert loss(labels=labels) == pytest.approx(math.expm1(each.mean()), rel=1e-4)


def test_encoders_are_judged_by_their_embeddings() -> None:
    model = ZOO["bert"].build()
    judged = []
    for inputs in unlike_in_padding():
        judge = Judge(model, batches_of(model, [inputs]))
        names = skipc.find_sites(model, **inputs).names
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
    expected = call_on(model, batches_of(model, batches[:1])[0], plan).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
