"""Conversations that a model writes itself, and the mix of texts that nobody brought."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import skipc
from skipc.calibration import chats as chats_module
from skipc.calibration import subject as subject_module
from skipc.calibration import text as text_module
from skipc.calibration.batches import Batch
from skipc.calibration.chats import NoChatsError, Turns, _Talk, chats, turns_of
from skipc.calibration.subject import Subject
from tests.harness import STRICT, run_regions_uncompiled
from tests.models.zoo import VOCAB, ZOO

NAMES = ("<unk>", "<s>", "<end>", "user", "assistant", "system", "kind", "[", "]")
END = 2
MARKED = (
    "<s>system kind<end>{% for m in messages %} {{ m.role }} {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %} [ {{ m.content }} ] "
    "{% else %} {{ m.content }}<end>{% endif %}{% endfor %}"
)
WORDS = "kind {% for m in messages %} {{ m.role }} {{ m.content }} ]{% endfor %} assistant"
MARKED_TURNS = Turns((1, 5, 6, END, 3), ((END, 4), (END, 3)))


def tokenizer(template: str | None = MARKED) -> Any:
    """One word, one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(NAMES)} | {f"w{i}": i for i in range(len(NAMES), VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, MARKED_TURNS),
        (BRACKETS, Turns((1, 7), ((8,), (END, 7)))),
        (WORDS, Turns((6, 3), ((8, 4), (8, 3)))),
    ],
)
def test_templates_are_taken_apart(template: str, expected: Turns) -> None:
    assert turns_of(tokenizer(template)) == expected


def test_blanks_are_left_to_messages() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(VOCAB)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="!")
    fast.chat_template = BRACKETS.replace("<s>", "").replace("<end>", ";")
    opening, answer, question = ([ord(c) - 32 for c in part] for part in (" [", " ]", "; ["))
    assert turns_of(fast) == Turns((*opening,), ((*answer,), (*question,)))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('tools only') }}", "does not render a conversation: tools only"),
        ("{% for m in messages %} {{ m.role }} {{ m.content }} {{ m.content }}{% endfor %}", "each message once"),
        ("<s> {{ messages[0].content }}<end> {{ messages[2].content }}<end>", "each message once"),
        ("<s>{% for m in messages %} {{ m.content }}{% endfor %}<end>", "no tokens of its own between messages"),
    ],
)
def test_templates_that_cannot_be_are_refused(template: str | None, why: str) -> None:
    with pytest.raises(NoChatsError, match=why):
        turns_of(tokenizer(template))


def talk(template: str, wishes: list[list[list[int]]], steps: int) -> list[list[int]]:
    """What rows say behind the opening, where the model's best liked tokens at each step are those of ``wishes``, which
    repeat."""
    turns = turns_of(tokenizer(template))
    processor = _Talk(turns, tokenizer(template), len(wishes), temperature=1.0)
    ids = torch.tensor([turns.opening] * len(wishes))
    for step in range(steps):
        logits = torch.zeros(len(wishes), VOCAB)
        for row, liked in zip(logits, wishes, strict=True):
            for rank, token in enumerate(liked[step % len(liked)]):
                row[token] = 9.0 - rank
        before = logits.clone()
        chosen = processor(ids, logits).argmax(-1, keepdim=True)
        assert torch.equal(logits, before), "the model's own tensor was written to"
        ids = torch.cat([ids, chosen], 1)
    return ids[:, len(turns.opening) :].tolist()


def test_turns_alternate_whoever_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats_module, "_LONGEST", 4)
    ends, runs_away, strange = talk(
        MARKED,
        [
            [[20], [21], [END], [22]],
            [[30]],
            [[END, 1, 40]],  # no turn is empty, and no special token has a place in one
        ],
        12,
    )
    assert ends == [20, 21, END, 4, 20, 21, END, 3, 20, 21, END, 4]
    assert runs_away == [30, 30, 30, 30, END, 4, 30, 30, 30, 30, 30, 30]
    assert strange == [40, END, 4, 40, END, 3, 40, END, 4, 40, END, 3]


def test_turns_that_words_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats_module, "_LONGEST", 4)
    (written,) = talk(BRACKETS, [[[20], [8], [21], [END], [22]]], 9)
    assert written == [20, 8, 21, END, 7, 20, 8, 21, END]
    (written,) = talk(WORDS, [[[20], [8], [21], [8], [4], [22]]], 8)
    assert written == [20, 8, 21, 8, 8, 4, 20, 8]  # forced at the fourth token: one of the words does not end it
    (written,) = talk(WORDS, [[[20], [8], [4], [22]]], 6)
    assert written == [20, 8, 4, 22, 20, 8]
    (forced,) = talk(BRACKETS, [[[20]]], 7)
    assert forced == [20, 20, 20, 20, 8, 20, 20]
    (ended,) = talk(BRACKETS, [[[20], [END], [21]]], 5)  # an end of text where the template has none
    assert ended == [20, END, 8, 20, END]


def test_answers_have_a_temperature_of_their_own() -> None:
    processor = _Talk(MARKED_TURNS, tokenizer(), 2, temperature=0.5)
    processor.rows[1].side = 1
    logits = torch.randn(2, VOCAB)
    found = processor(torch.tensor([[3], [4]]), logits)
    torch.testing.assert_close(found[:, 10:], logits[:, 10:] * torch.tensor([[1.0], [2.0]]))


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch._dynamo.reset()
    run_regions_uncompiled(monkeypatch)
    return ZOO["llama"].build()


def turns_in(ids: list[int]) -> list[int]:
    """Lengths of the turns of a conversation, which must be whole but for the last."""
    opening, between = MARKED_TURNS.opening, MARKED_TURNS.between
    assert tuple(ids[: len(opening)]) == opening
    lengths, start = [], len(opening)
    for i in range(start, len(ids)):
        if ids[i] == END:
            marks = between[len(lengths) % 2]
            assert tuple(ids[i : i + 2]) == marks[: len(ids) - i]
            lengths.append(i - start)
            start = i + 2
    return lengths


def test_a_model_writes_conversations(llama: Any) -> None:
    compiled = skipc.compile(llama, **STRICT)
    seen = []
    written = chats(compiled, tokenizer(), 240, 18, seed=5, progress=lambda items: seen.append(len(items)) or items)
    assert seen == [2]  # batches
    assert len(written) == 18
    assert all(w.shape == (1, 240) and w.dtype == torch.long for w in written)
    lengths = [turns_in(w[0].tolist()) for w in written]
    assert all(0 < n <= 96 for row in lengths for n in row[::2])
    assert any(n < 90 for row in lengths for n in row)  # the model ended these by itself
    assert len({tuple(w[0].tolist()) for w in written}) == 18
    again = chats(llama, tokenizer(), 240, 18, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(written, again, strict=True))
    other = chats(compiled, tokenizer(), 240, 18, seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(written, other, strict=True))


def test_conversations_are_drawn_from_the_models_distribution(llama: Any) -> None:
    """The mean likelihood of what is drawn is the mean over the distribution that it is drawn from, and a little less
    where tokens are the template's."""
    llama.lm_head.weight *= 20.0
    likely, expected = 0.0, 0.0
    for ids in chats(llama, tokenizer(), 240, 16, seed=1):
        logs = llama(ids).logits[0, :-1].log_softmax(-1)
        likely += float(logs.gather(1, ids[0, 1:, None])[20:].mean())
        expected += float((logs.exp() * logs).sum(-1)[20:].mean())
    assert likely == pytest.approx(1.05 * expected, rel=0.05)


def test_models_that_cannot_write_say_so(llama: Any) -> None:
    with pytest.raises(NoChatsError, match="opens with 5 tokens, which leaves nothing of 5"):
        chats(llama, tokenizer(), 5, 1, seed=0)
    with pytest.raises(NoChatsError, match="decoders alone"):
        chats(ZOO["t5"].build(), tokenizer(), 32, 1, seed=0)


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documentation of a few thousand words, in windows of 48."""
    words = torch.randint(len(NAMES), VOCAB, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(text_module, "english_text", lambda: " ".join(f"w{i}" for i in words))
    monkeypatch.setattr(text_module, "documentation_text", lambda: "")
    monkeypatch.setattr(subject_module, "_TOKENS", 48)


def written_in(batches: Sequence[Batch]) -> list[bool]:
    """Which of them are chats."""
    return [tuple(b.inputs["input_ids"][0, :5].tolist()) == MARKED_TURNS.opening for b in batches]


def test_the_default_text_is_documentation_and_chats(
    llama: Any,
    little_text: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> list[torch.Tensor]:
        calls.append(args[3])
        real = len(calls) == 1 or args[1].chat_template is None
        return chats(*args) if real else [torch.full((1, 48), len(calls))] * args[3]

    monkeypatch.setattr(subject_module, "chats", counted)

    def made(seed: int = 0, kept: Path | None = tmp_path, given: Any = None, **settings: Any) -> Subject:
        return Subject(llama, None, None, given or tokenizer(), 6, seed, kept=kept, **settings)

    subject = made(chats=8)
    assert calls == [11]
    written = written_in(subject.given)
    assert len(written) > 24, "text was left out"
    share = sum(written) / len(written)
    assert 0.25 < share < 0.4
    for n in range(3, len(written) + 1):
        assert abs(sum(written[:n]) - n * share) < 1
    assert subject.kinds == ["documentation"] * 3 + ["chats"] * 3
    assert written_in(subject.judged) == [kind == "chats" for kind in subject.kinds]
    given, judged = (
        [tuple(b.inputs["input_ids"][0].tolist()) for b in part] for part in (subject.given, subject.judged)
    )
    often = Counter(text for text, chat in zip(given, written, strict=True) if chat)
    assert len(often) == 8
    assert len(set(often.values())) == 1, "one chat is read more often than another"
    assert len(set(given)) == len(given) - sum(written) + 8
    assert len(set(judged)) == 6
    assert not set(judged) & set(given)

    assert made(chats=8).text_digest() == subject.text_digest()
    assert calls == [11], "kept chats were written again"
    assert made(1, chats=8).text_digest() != subject.text_digest()
    with torch.no_grad():
        llama.lm_head.weight[5] += 0.5
    made(1, chats=8)
    assert calls == [11, 11, 11], "chats of another seed or another checkpoint were taken"

    plain = made(kept=None)
    assert plain.kinds == ["documentation"] * 6
    assert not any(written_in(plain.given))
    with caplog.at_level(logging.INFO, "skipc"):
        assert made(kept=None, given=tokenizer(None), chats=8).text_digest() == plain.text_digest()
    assert "no chats to calibrate on: the tokenizer has no chat template" in caplog.text


def test_only_default_text_of_decoders_has_chats(little_text: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_module, "chats", None)
    bert = Subject(ZOO["bert"].build(), None, None, tokenizer(), 2, 0, chats=4)
    assert bert.kinds == ["documentation"] * 2
    own = Subject(ZOO["llama"].build(), [torch.full((1, 8), i) for i in range(10)], None, tokenizer(), 2, 0, chats=4)
    assert own.kinds == ["text"] * 2
