"""The loop of speculative generation: proposals, one call that judges them, what is kept of them, for each row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from skipc.runtime.decoder import Decoder
from skipc.runtime.rules import Rules
from skipc.runtime.speculation.accepting import greedy, sampled
from skipc.runtime.speculation.drafts import Draft, Proposal
from skipc.runtime.speculation.pace import Pace
from skipc.runtime.speculation.settings import SpeculationStats


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
        draft: Draft,
        pace: Pace,
        stats: SpeculationStats,
    ):
        self.decoder, self.rules, self.draft, self.pace = decoder, rules, draft, pace
        skipped = [0] * len(prompts) if mask is None else (mask == 0).sum(1).tolist()
        self.padding = [row[:n] for row, n in zip(prompts.tolist(), skipped, strict=True)]  # which processors see, too
        self.known = [row[n:] for row, n in zip(prompts.tolist(), skipped, strict=True)]
        self.lengths = [len(row) for row in self.known]
        self.running = [True] * len(prompts)
        self.positions, self.vocabulary = _positions(decoder.model.config), logits.shape[-1]
        self.shown = 0
        self.stopped = False
        self.stats = stats
        draft.start(self.known)
        self._take([self._decide(row, [], logits[row : row + 1]) for row in range(len(prompts))])

    def run(self) -> list[list[int]]:
        """The new tokens of each row."""
        while not self.stopped and any(self.running):
            self._round()
        return [row[n:] for row, n in zip(self.known, self.lengths, strict=True)]

    def _round(self) -> None:
        begin = time.perf_counter()
        proposals = self._proposals()
        running = [p for p, runs in zip(proposals, self.running, strict=True) if runs]
        width = self.pace.choose(running, self.positions - max(map(len, self.known)))
        drafted = [p.tokens[: width - 1] for p in proposals]
        drafting = time.perf_counter() - begin
        if self.decoder.count + width > self.decoder.length:
            self.decoder.close_holes()
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
        self._count(width, proposals, drafted, came)
        self._take(came)
        took = time.perf_counter() - begin
        self.stats.note(width, took, drafting)
        if ready:
            self.pace.took(width, took)

    def _proposals(self) -> list[Proposal]:
        """What the draft says, as far as it can be fed to the model."""
        most = [min(max(self.pace.widths), self._left(i)) - 1 if runs else 0 for i, runs in enumerate(self.running)]
        made = []
        for (tokens, kind), n in zip(self.draft.propose(most), most, strict=True):
            known = next((i for i, t in enumerate(tokens[:n]) if not 0 <= t < self.vocabulary), n)
            made.append(Proposal(list(tokens[:known]), kind))
        return made

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

    def _count(self, width: int, proposals: list[Proposal], drafted: list[list[int]], came: list[list[int]]) -> None:
        for proposal, judged, here in zip(proposals, drafted, came, strict=True):
            if not proposal.tokens or not here:
                continue
            right = len(here) - 1 if width > 1 else int(proposal.tokens[0] == here[0])
            looked_at = len(judged) if width > 1 else 1
            self.pace.came(proposal.kind, right, int(right < looked_at))
            if width > 1:
                self.stats.drafted += len(judged)
                self.stats.accepted += right

    def _take(self, came: list[list[int]]) -> None:
        """Append the tokens that came, up to the first that ends a row, and show those that all rows have."""
        for row, tokens in enumerate(came):
            if not self.running[row]:
                continue
            tokens = tokens[: self._left(row)]
            end = next((i for i, t in enumerate(tokens) if t in self.rules.ends), None)
            tokens = tokens if end is None else tokens[: end + 1]
            self.known[row] += tokens
            self.draft.extend(row, tokens)
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
