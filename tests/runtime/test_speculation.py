"""Speculative generation gives what plain generation gives."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.runtime import generation
from skipc.runtime.hugging_face import _check
from skipc.runtime.speculation.accepting import greedy, sampled
from skipc.runtime.speculation.pace import Pace

import skipc
from tests.adapters.test_adapter import trained
from tests.harness import STRICT
from tests.models.zoo import ZOO, ids

NEW = 24
WIDTHS = (4, 8)


class Oracle:
    """Knows what comes, and now and then says something else."""

    def __init__(self, rows: Sequence[Sequence[int]], wrong: float, vocabulary: int = 96):
        self.rows, self.wrong, self.vocabulary = rows, wrong, vocabulary
        self.random = random.Random(0)

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        self.made = [0] * len(rows)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        self.made[row] += len(tokens)

    def propose(self, most: Sequence[int]) -> list[skipc.Proposal]:
        return [skipc.Proposal(self.guess(row, n)) for row, n in enumerate(most)]

    def guess(self, row: int, most: int) -> list[int]:
        truth = self.rows[row][self.made[row] :][: self.random.randint(0, most)]
        return [self.random.randrange(self.vocabulary) if self.random.random() < self.wrong else t for t in truth]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drafts are judged whatever that costs, by calls of any width."""
    chosen = random.Random(1)

    def choose(self: Pace, proposals: Sequence[skipc.Proposal], most: int) -> tuple[int, float]:
        return chosen.choice([w for w in self.widths if w <= most]), 1.0

    monkeypatch.setattr(Pace, "choose", choose)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return skipc.compile(ZOO["llama"].build(), fullgraph=True, **STRICT)


def padded(batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    given = ids(batch, 9)
    mask = torch.ones_like(given)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return given, mask if batch > 1 else None


def both(compiled: Any, batch: int, draft: Any = None, **how: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens without drafts and with them, and what came of those. Without a draft: an oracle that errs."""
    given, mask = padded(batch)
    how = {"max_new_tokens": NEW, "attention_mask": mask, "eos_token_id": None, **how}
    plain = skipc.generate(compiled, given, **how)
    speculation = skipc.Speculation(draft or Oracle(plain[:, 9:].tolist(), 0.2), WIDTHS)
    return plain, skipc.generate(compiled, given, speculative=speculation, **how), speculation.stats


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_same(llama: Any, batch: int) -> None:
    plain, ours, stats = both(llama, batch)
    assert torch.equal(ours, plain)
    assert stats.accepted > 5
    assert stats.accepted < stats.drafted
    assert set(stats.calls) == {1, *WIDTHS}
    with llama.session() as session:
        again = both(llama, batch)
    assert torch.equal(again[1], plain)
    assert session.stats().recompiles == 0
    assert {step.replay.refused for step in llama._decoder._steps.values()} == {None}


@pytest.mark.parametrize("batch", [1, 3])
def test_rubbish_changes_nothing(llama: Any, batch: int) -> None:
    plain, ours, stats = both(llama, batch, Oracle([[0] * NEW] * batch, 1.0))
    assert torch.equal(ours, plain)
    assert stats.acceptance < 0.2
    plain, ours, _ = both(llama, batch, skipc.PromptLookup())
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_came_before_comes_faster(llama: Any, batch: int) -> None:
    cache = skipc.NGramCache()
    shares = []
    for _ in range(2):
        plain, ours, stats = both(llama, batch, cache)
        assert torch.equal(ours, plain)
        shares.append(stats.acceptance)
    assert shares[1] > max(0.7, shares[0])


def test_a_full_cache_closes_its_holes(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from skipc.runtime.decoder import Decoder

    closed: list[int] = []
    close = Decoder.close_holes
    monkeypatch.setattr(Decoder, "close_holes", lambda self: closed.append(close(self)))
    both(llama, 3)
    monkeypatch.setattr(llama._decoder, "length", 9 + NEW + max(WIDTHS))
    plain, ours, _ = both(llama, 3)
    assert torch.equal(ours, plain)
    assert closed


def test_a_row_that_is_done_long_before_the_others(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = both(llama, 3)
    truth = plain[:, 9:].tolist()
    monkeypatch.setattr(llama._decoder, "length", 9 + NEW + max(WIDTHS))

    def guess(self: Oracle, row: int, most: int) -> list[int]:
        return truth[0][self.made[0] :][:most] if row == 0 else [-5, 96, 1 << 40]

    monkeypatch.setattr(Oracle, "guess", guess)
    plain, ours, _ = both(llama, 3, Oracle(truth, 0.0))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("batch", [1, 3])
def test_end_tokens_inside_drafts(llama: Any, batch: int) -> None:
    plain, _, _ = both(llama, batch)
    ends = [plain[0, 9 + 6].item(), plain[-1, 9 + 11].item()]
    plain, ours, _ = both(llama, batch, eos_token_id=ends, pad_token_id=0)
    assert plain.shape[1] < 9 + NEW
    assert torch.equal(ours, plain)


def test_tokens_are_shown_in_order_and_stop_when_told(llama: Any) -> None:
    plain, _, _ = both(llama, 3)
    seen: list[list[int]] = []

    def show(tokens: torch.Tensor) -> bool:
        seen.append(tokens.tolist())
        return len(seen) == 10

    given, mask = padded(3)
    speculation = skipc.Speculation(Oracle(plain[:, 9:].tolist(), 0.2), WIDTHS)
    ours = skipc.generate(llama, given, max_new_tokens=NEW, attention_mask=mask, eos_token_id=None, on_token=show,
                          speculative=speculation)  # fmt: skip
    assert torch.equal(ours, plain[:, : 9 + 10])
    assert torch.equal(torch.tensor(seen).T, plain[:, 9:19])


def test_a_request_that_was_cut_off_leaves_nothing_behind(llama: Any) -> None:
    plain, _, _ = both(llama, 1)

    def fail(tokens: torch.Tensor) -> None:
        raise KeyboardInterrupt

    given, _ = padded(1)
    with pytest.raises(KeyboardInterrupt):
        skipc.generate(llama, given, max_new_tokens=NEW, on_token=fail, speculative=True)
    assert torch.equal(both(llama, 1)[1], plain)


@pytest.mark.parametrize("batch", [1, 3])
def test_processors_see_what_they_see_without_drafts(llama: Any, batch: int) -> None:
    """One that looks at all that came before, padding too, and forbids it."""

    def once(known: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.scatter(1, known, -torch.inf)

    plain, ours, stats = both(llama, batch, logits_processor=[once])
    assert torch.equal(ours, plain)
    assert (stats.accepted > 0) == (batch == 1)  # those of several rows see them together
    assert all(len(set(row[9:])) == NEW for row in plain.tolist())


class TestTransformers:
    """``model.generate`` with skipc as its way to generate."""

    @pytest.mark.parametrize("batch", [1, 3])
    def test_greedy_tokens_are_those_of_transformers(self, llama: Any, batch: int) -> None:
        given, mask = padded(batch)
        how = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": 5, "pad_token_id": 0,
               "repetition_penalty": 1.3}  # fmt: skip
        expected = llama.model.generate(given, **how)
        ours = llama.model.generate(given, custom_generate=skipc.generation_mode(llama), **how)
        assert torch.equal(ours, expected)

    def test_streams_and_criteria(self, llama: Any) -> None:
        from transformers import StoppingCriteriaList

        given, _ = padded(1)
        shown: list[int] = []

        class Streamer:
            def put(self, tokens: torch.Tensor) -> None:
                shown.extend(tokens.flatten().tolist())

            def end(self) -> None:
                shown.append(-1)

        def enough(known: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([known.shape[1] >= 9 + 5])

        how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        mode = skipc.generation_mode(llama, streamer=Streamer())
        made = llama.model.generate(
            given, stopping_criteria=StoppingCriteriaList([enough]), custom_generate=mode, **how
        )
        assert torch.equal(made, llama.model.generate(given, **how)[:, : 9 + 5])
        assert shown == [*given[0].tolist(), *made[0, 9:].tolist(), -1]

    def test_what_it_does_not_do_is_refused(self, llama: Any) -> None:
        mode = skipc.generation_mode(llama)
        for how in ({"num_beams": 2}, {"return_dict_in_generate": True}):
            with pytest.raises(ValueError, match="tokens alone"):
                llama.model.generate(padded(1)[0], max_new_tokens=4, custom_generate=mode, do_sample=False, **how)
        with pytest.raises(ValueError, match="this is another"):
            ZOO["llama"].build().generate(padded(1)[0], max_new_tokens=4, custom_generate=mode, do_sample=False)
        with pytest.raises(ValueError, match="without pixel_values"):
            _check(llama.model.generation_config, {"pixel_values": torch.zeros(1), "attention_mask": None})


def test_sessions_hold_for_drafts_too(llama: Any) -> None:
    with llama.session(skip={"model.layers.0.mlp"}) as session:
        plain, ours, stats = both(llama, 1)
    assert torch.equal(ours, plain)
    assert stats.accepted
    assert session.stats().skipped["model.layers.0.mlp"] == session.stats().calls
    with llama.session(policy=skipc.Observe()):
        plain, ours, stats = both(llama, 1)
    assert torch.equal(ours, plain)
    assert "policy" in stats.plain


def test_adapters_of_rows_and_of_tokens_hold_for_drafts_too() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=4, max_rank=8)
    for rank in (4, 7):
        bank.load(f"r{rank}", trained("llama", rank, torch.float32, r=rank))
    compiled = skipc.compile(base, adapters=bank, fullgraph=True, **STRICT)
    without = both(compiled, 1)[0]
    router = skipc.AdapterRouter(torch.randn(2, 64), ["r4", "r7"], top_k=1)
    for batch, wanted in ((1, ["r7"]), (1, router), (3, ["r4", None, "r7"])):
        with compiled.session(adapters=wanted):
            plain, ours, stats = both(compiled, batch)
        assert torch.equal(ours, plain)
        assert stats.accepted
        assert batch > 1 or not torch.equal(plain, without)


def test_drawn_tokens_have_the_distribution_of_the_whole_model(llama: Any) -> None:
    """A chi-square test of three tokens in a row, each of three, for rows of a batch that accept different numbers of
    drafted tokens, against the probabilities that the eager model gives them."""
    draws, top, temperature = 800, 3, 0.4
    given, mask = padded(3)
    assert mask is not None

    def after(row: int, *tokens: int) -> dict[int, float]:
        text = torch.cat([given[row][mask[row].bool()], torch.tensor(tokens, dtype=torch.long)])
        best = llama.model(input_ids=text[None]).logits[0, -1].float().topk(top)
        return dict(zip(best.indices.tolist(), (best.values / temperature).softmax(-1).tolist(), strict=True))

    odds = [
        {(a, b, c): x * y * z for a, x in after(i).items() for b, y in after(i, a).items()
         for c, z in after(i, a, b).items()}
        for i in range(3)
    ]  # fmt: skip

    class Likely(Oracle):
        """Drafts the likeliest way to go on, with an error now and then."""

        def start(self, rows: Sequence[Sequence[int]]) -> None:
            self.said: list[list[int]] = [[] for _ in rows]

        def extend(self, row: int, tokens: Sequence[int]) -> None:
            self.said[row] += tokens

        def guess(self, row: int, most: int) -> list[int]:
            said = self.said[row]
            ways = [list(way) for way in odds[row] if [*way[: len(said)]] == said]
            way = max(ways, key=lambda w: odds[row][tuple(w)])[len(said) :][:most]
            return [self.random.randrange(96) if self.random.random() < self.wrong else t for t in way]

    speculation = skipc.Speculation(Likely([], 0.2), WIDTHS)
    generator = torch.Generator().manual_seed(3)
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3, "eos_token_id": None}
    how |= {"do_sample": True, "top_k": top, "temperature": temperature}
    found = [Counter[tuple[int, ...]]() for _ in given]
    drafted = accepted = 0
    for _ in range(draws):
        made = skipc.generate(llama, given, generator=generator, speculative=speculation, **how)
        for row, tokens in enumerate(made[:, 9:].tolist()):
            found[row][tuple(tokens)] += 1
        drafted, accepted = drafted + speculation.stats.drafted, accepted + speculation.stats.accepted
    assert draws / 2 < accepted < drafted - draws / 2  # both happened often

    for seen, chances in zip(found, odds, strict=True):
        assert set(seen) <= set(chances)
        often = {t for t, chance in chances.items() if draws * chance >= 5}  # the others together
        pairs = [(seen[t], draws * chances[t]) for t in often]
        pairs.append((draws - sum(n for n, _ in pairs), draws - sum(n for _, n in pairs)))
        square = sum((n - expected) ** 2 / expected for n, expected in pairs if expected > 0.5)
        assert torch.special.gammaincc(torch.tensor(len(often) / 2), torch.tensor(square / 2)) > 1e-3


def test_logits_that_are_not_numbers_are_refused() -> None:
    for drafted in ([0], []):
        with pytest.raises(ValueError, match="no token to draw"):
            sampled(drafted, lambda i, made: torch.full((3,), torch.nan), None)


def test_models_without_positions_speculate_in_one_row_alone(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(input_ids: Any, past_key_values: Any = None, attention_mask: Any = None, **how: Any) -> None: ...

    monkeypatch.setattr(generation.inspect, "signature", lambda _: signature(forward))
    speculation = skipc.Speculation()
    assert generation._speculation(speculation, llama.model, 1, False) is speculation
    assert generation._speculation(speculation, llama.model, 3, False) is None
    assert "positions" in str(speculation.stats.plain)


def test_many_rows_are_not_widened_unless_told(llama: Any) -> None:
    speculation = skipc.Speculation()
    widths = [speculation.widths_for(batch, llama.model) for batch in (1, 3, 6, 7)]
    assert widths == [(1, 4, 8), (1, 2, 4), (1, 2), (1,)]
    assert generation._speculation(speculation, llama.model, 7, False) is None
    assert "many rows" in str(speculation.stats.plain)
    assert generation._speculation(skipc.Speculation(widths=[4]), llama.model, 7, False) is not None


def test_tile_registers_take_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "tiles", lambda: True)
    layer = torch.nn.Linear(2, 2)
    for dtype, expected in (
        (torch.float32, [(1, 2), (1,), (1,)]),
        (torch.bfloat16, [(1, 2, 4), (1, 2), (1,)]),
    ):
        layer.to(dtype)
        assert [skipc.Speculation().widths_for(batch, layer) for batch in (4, 8, 9)] == expected


def test_caches_that_slide_do_not_speculate() -> None:
    compiled = skipc.compile(ZOO["mistral"].build(), fullgraph=True, **STRICT)
    plain, ours, stats = both(compiled, 1)
    assert torch.equal(ours, plain)
    assert "slides" in stats.plain


def test_dynamo_does_not_give_up() -> None:
    """However many kinds of calls there are."""
    torch._dynamo.reset()
    compiled = torch.compile(ZOO["llama"].build(), backend="skipc", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        plain, ours, stats = both(compiled, 1)
    assert torch.equal(ours, plain)
    assert set(stats.calls) == {1, *WIDTHS}


def test_positions_end_where_the_models_end() -> None:
    model = ZOO["gpt2"].build()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    room = model.config.n_positions
    given = ids(1, room - 12)
    plain = skipc.generate(compiled, given, max_new_tokens=12, eos_token_id=None)
    draft = Oracle(plain[:, room - 12 :].tolist(), 0.1)
    ours = skipc.generate(compiled, given, max_new_tokens=12, eos_token_id=None,
                          speculative=skipc.Speculation(draft, WIDTHS))  # fmt: skip
    assert torch.equal(ours, plain)


# -- without a model ------------------------------------------------------------------------------------------------


def test_what_is_accepted() -> None:
    def after(truth: list[int]) -> Any:
        return lambda i, made: truth[i]

    assert greedy([1, 2, 3], after([1, 2, 3, 4])) == [1, 2, 3, 4]
    assert greedy([1, 9, 3], after([1, 2, 3, 4])) == [1, 2]
    assert greedy([], after([7])) == [7]


@pytest.mark.parametrize("drafted", [[0, 1], [3, 3], [4, 0], []])
def test_drawn_tokens_have_the_distribution_of_the_model(drafted: list[int]) -> None:
    """A chi-square test of pairs of tokens, where what the second may be depends on the first."""
    draws = 40_000
    generator = torch.Generator().manual_seed(5)
    first = torch.tensor([0.4, 0.1, 0.2, 0.3, 0.0])
    second = torch.rand(5, 5, generator=generator).softmax(-1)
    odds = {(): first, **{(a,): second[a] for a in range(5)}}
    found: Counter[tuple[int, int]] = Counter()
    for _ in range(draws):
        made: list[int] = []
        while len(made) < 2:  # what comes after the first is drawn with what is left of the draft
            rest = drafted[len(made) :] if made == drafted[: len(made)] else []
            before = tuple(made)
            made += sampled(rest, lambda i, m, b=before: odds.get((*b, *m)[:1], first), generator)
        found[made[0], made[1]] += 1
    expected = {(a, b): draws * float(first[a] * second[a, b]) for a in range(5) for b in range(5)}
    assert not any(found[pair] for pair, n in expected.items() if n == 0)
    square = sum((found[pair] - n) ** 2 / n for pair, n in expected.items() if n)
    assert square < 43.8  # 19 degrees of freedom, one in a thousand
