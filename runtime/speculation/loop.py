"""The loop of speculative generation: proposals, one call that judges them, what is kept of them, for each row."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from skipc.runtime.decoder import Decoder
from skipc.runtime.rules import Rules
from skipc.runtime.speculation.accepting import greedy, sampled
from skipc.runtime.speculation.drafts import Draft, ModelDraft, Proposal
from skipc.runtime.speculation.pace import Pace
from skipc.runtime.speculation.settings import SpeculationStats

_UNPROVEN = 2  # calls under a plan that look at what they are given, before they are repeated


class Request:
    """One request on a decoder that has read its prompts.

    Args:
        prompts: int64 ``[batch, prompt]``.
        mask: the same, 0 for padding on the left; None if there is none.
        logits: behind the prompts, float ``[batch, vocabulary]``.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: torch.Tensor,
        mask: torch.Tensor | None,
        logits: torch.Tensor,
        rules: Rules,
        drafts: Sequence[Draft],
        pace: Pace,
        stats: SpeculationStats,
    ):
        self.decoder, self.rules, self.pace, self.stats = decoder, rules, pace, stats
        self.drafts = drafts
        self.models = {d.key: d for d in drafts if isinstance(d, ModelDraft)}
        self.lookups = [(i, d) for i, d in enumerate(drafts) if not isinstance(d, ModelDraft)]
        self.asked: Counter[Hashable] = Counter()  # models, how often
        skipped = [0] * len(prompts) if mask is None else (mask == 0).sum(1).tolist()
        self.padding = [row[:n] for row, n in zip(prompts.tolist(), skipped, strict=True)]  # which processors see, too
        self.known = [row[n:] for row, n in zip(prompts.tolist(), skipped, strict=True)]
        self.lengths = [len(row) for row in self.known]
        self.running = [True] * len(prompts)
        self.positions, self.vocabulary = _positions(decoder.model.config), logits.shape[-1]
        self.shown = 0
        self.stopped = False
        for model in self.models.values():
            model.attach(decoder, functools.partial(self._goes_on, model), rules.watched)
        for draft in drafts:
            draft.start(self.known)
        self._take([self._decide(row, [], logits[row : row + 1]) for row in range(len(prompts))])

    def run(self) -> list[list[int]]:
        """The new tokens of each row."""
        while not self.stopped and any(self.running):
            self._round()
        return [row[n:] for row, n in zip(self.known, self.lengths, strict=True)]

    def _round(self) -> None:
        begin = time.perf_counter()
        if self.decoder.count + max(self.pace.widths) > self.decoder.length:
            self.decoder.close_holes()
        width, proposals, model = self._propose()
        drafted = [list(p.tokens[: width - 1]) for p in proposals]
        middle = time.perf_counter()
        ready = self.decoder.ready(width)
        last, pad = [row[-1] for row in self.known], self.rules.pad
        fed = [[t, *d, *[pad] * (width - 1 - len(d))] for t, d in zip(last, drafted, strict=True)]
        logits = self.decoder.judge(self._tensor(fed), self.rules.watched)
        plain = None if self.rules.process or self.rules.sample else logits.argmax(-1).tolist()
        came = [
            self._decide(i, drafted[i], logits[i], None if plain is None else plain[i]) if runs else []
            for i, runs in enumerate(self.running)
        ]
        self.decoder.keep(width, [len(tokens) for tokens in came])
        self._count(width, proposals, drafted, came, model)
        self._take(came)
        end = time.perf_counter()
        self.stats.note(width, end - begin, middle - begin)
        if ready:
            self.pace.took(width, end - middle)

    def _propose(self) -> tuple[int, list[Proposal], Hashable | None]:
        """The width of the next call, what it is to judge of each row, and the model that drafted it, if one did."""
        room = self.positions - max(map(len, self.known))
        most = [min(max(self.pace.widths), self._left(i)) - 1 if runs else 0 for i, runs in enumerate(self.running)]
        width, gain, proposals = 1, 1.0, [Proposal() for _ in most]
        for i, draft in self.lookups:
            made = self._asked(draft, most, i)
            chosen, promised = self.pace.choose(self._behind(made), room)
            if promised > gain or not any(p.tokens for p in proposals):
                width, gain, proposals = chosen, promised, made
        self._width = min(room, max(most) + 1)
        key = self.pace.choose_model(self.models, self._width, gain) if self.models else None
        if key is None:
            return width, proposals, None
        proposals = self._timed(self.models[key], most)
        return self.pace.choose(self._behind(proposals), room)[0], proposals, key

    def _timed(self, model: ModelDraft, most: Sequence[int]) -> list[Proposal]:
        """What a model says."""
        begin, ready = time.perf_counter(), self.decoder.ready(1) and self.asked[model.key] >= _UNPROVEN
        self.asked[model.key] += 1
        proposals = self._asked(model, most, model.key)
        steps = max(len(p.tokens) for p in proposals)
        self.stats.steps += steps
        self.pace.drafted(model.key, max(1, steps), time.perf_counter() - begin if ready else None)
        return proposals

    def _goes_on(self, model: ModelDraft, kinds: Sequence[Sequence[Hashable]]) -> bool:
        return self.pace.goes_on(model.key, [[(model.key, k) for k in row] for row in kinds], self._width)

    def _asked(self, draft: Draft, most: Sequence[int], key: Hashable) -> list[Proposal]:
        """What a draft says, as far as it can be fed to the model, with kinds that are no other draft's."""
        made = []
        for (tokens, kinds), n in zip(draft.propose(most), most, strict=True):
            known = next((i for i, t in enumerate(tokens[:n]) if not 0 <= t < self.vocabulary), min(n, len(tokens)))
            made.append(Proposal(tokens[:known], [(key, kinds[i] if i < len(kinds) else None) for i in range(known)]))
        return made

    def _behind(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Those of the rows that have most tokens to come: a request takes as long as they do, whatever others gain."""
        left = [self._left(i) if runs else -1 for i, runs in enumerate(self.running)]
        return [p for p, n in zip(proposals, left, strict=True) if n == max(left)]

    def _decide(self, row: int, drafted: list[int], logits: torch.Tensor, plain: list[int] | None = None) -> list[int]:
        """The tokens that come in a row: ``logits``, float [1 + drafted or more, vocabulary]."""
        rules = self.rules

        def shaped(i: int, made: Sequence[int]) -> torch.Tensor:
            here = logits[i : i + 1].float()
            if rules.process is None:
                return here[0]
            ids = torch.tensor([[*self.padding[row], *self.known[row], *made]], device=logits.device)
            return rules.process(ids, here)[0]

        if rules.sample:
            return sampled(drafted, lambda i, made: shaped(i, made).softmax(-1), rules.generator)
        if plain is not None:
            return greedy(drafted, lambda i, made: plain[i])
        return greedy(drafted, lambda i, made: int(shaped(i, made).argmax()))

    def _count(
        self,
        width: int,
        proposals: list[Proposal],
        drafted: list[list[int]],
        came: list[list[int]],
        model: Hashable | None,
    ) -> None:
        """Which tokens were right: those that were judged, and in plain steps the first of each proposal."""
        for proposal, judged, here in zip(proposals, drafted, came, strict=True):
            if not proposal.tokens or not here:
                continue
            right = len(here) - 1 if width > 1 else int(proposal.tokens[0] == here[0])
            self.pace.came(proposal.kinds[: max(1, len(judged))], right, model)
            self.stats.drafted += len(judged)
            self.stats.accepted += right if width > 1 else 0

    def _take(self, came: list[list[int]]) -> None:
        """Append the tokens that came, up to the first that ends a row, and show those that all rows have."""
        for row, tokens in enumerate(came):
            if not self.running[row]:
                continue
            tokens = tokens[: self._left(row)]
            end = next((i for i, t in enumerate(tokens) if t in self.rules.ends), None)
            tokens = tokens if end is None else tokens[: end + 1]
            self.known[row] += tokens
            for draft in self.drafts:
                draft.extend(row, tokens)
            self.running[row] = end is None and self._left(row) > 0
        self._show()

    def _left(self, row: int) -> int:
        return self.rules.most - (len(self.known[row]) - self.lengths[row])

    def _show(self) -> None:
        """Show what all rows have that still run."""
        made = [len(row) - n for row, n in zip(self.known, self.lengths, strict=True)]
        ready = min((n for n, runs in zip(made, self.running, strict=True) if runs), default=max(made))
        while self.shown < ready and not self.stopped:
            at, pad = self.shown, self.rules.pad
            now = [row[n + at] if at < len(row) - n else pad for row, n in zip(self.known, self.lengths, strict=True)]
            self.shown += 1
            self.rules.advance()
            if self.rules.on_token is not None and self.rules.on_token(self._tensor(now)):
                self.stopped = True
                self.known = [row[: n + self.shown] for row, n in zip(self.known, self.lengths, strict=True)]

    def _tensor(self, numbers: list[Any]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.decoder.position.device)


def _positions(config: Any) -> int:
    """How many positions a model has."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None) or 1 << 62
