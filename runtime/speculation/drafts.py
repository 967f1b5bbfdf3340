"""What drafts tokens.

A draft is asked for the next tokens of each row and told which came. It says how sure it is of a token by a kind,
whatever that is to it: how often tokens of a kind turn out right is counted by :mod:`skipc.runtime.speculation.pace`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from skipc.runtime.decoder import Decoder


class Proposal(NamedTuple):
    """Tokens that may come next in a row.

    Attributes:
        tokens: in order; none if there is nothing to say.
        kinds: of each token: those of a kind are about as often right, where those before them were.
    """

    tokens: Sequence[int] = ()
    kinds: Sequence[Hashable] = ()


class Draft(Protocol):
    """Proposes the next tokens of each row, at next to no cost."""

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """A new request with these prompts."""

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """``tokens`` came in a row."""

    def propose(self, most: Sequence[int]) -> Sequence[Proposal]:
        """What may come next in each row, so many tokens at most (0 in rows that have ended)."""


GoesOn = Callable[[Sequence[Sequence[Hashable]]], bool]  # given the kinds of what is drafted of each row


@runtime_checkable
class ModelDraft(Draft, Protocol):
    """One that runs a model for each token, which takes time: it is asked where that pays, and asks behind each token
    whether one more is worth it.

    Attributes:
        key: drafts of one key are equally fast and equally often right.
    """

    key: Hashable

    def attach(self, decoder: Decoder, goes_on: GoesOn, watched: bool) -> None:
        """Before :meth:`start`: what has read the prompts, whether one more token is worth its time, and whether code
        outside may edit the model between calls."""


class PromptLookup:
    """Proposes what followed the last time that a row, prompt included, had the same last tokens (prompt look-up
    decoding; LLMA, arXiv 2304.04487). Costs microseconds, and pays where output repeats its context: edits of code,
    extraction, summaries. A token's kind is how many tokens before the proposal agreed.

    Args:
        longest: so many last tokens are looked up, then fewer.
        shortest: down to so many.
    """

    _MOST_AGREEING = 16  # tokens that are compared

    def __init__(self, longest: int = 3, shortest: int = 1):
        if not 1 <= shortest <= longest:
            raise ValueError(f"needed are 1 <= shortest <= longest, got {shortest} and {longest}")
        self.longest, self.shortest = longest, shortest
        self._rows: list[list[int]] = []
        self._ends: list[dict[tuple[int, ...], int]] = []  # where what follows some tokens begins, the last time

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """A new request with these prompts."""
        self._rows = [[] for _ in rows]
        self._ends = [{} for _ in rows]
        for i, row in enumerate(rows):
            self.extend(i, row)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """``tokens`` came in a row."""
        known, ends = self._rows[row], self._ends[row]
        for token in tokens:
            at = len(known)
            for n in range(self.shortest, min(self.longest, at) + 1):
                ends[tuple(known[at - n :])] = at
            known.append(token)

    def propose(self, most: Sequence[int]) -> list[Proposal]:
        """What followed the last time."""
        return [self._look_up(row, n) if n > 0 else Proposal() for row, n in enumerate(most)]

    def _look_up(self, row: int, most: int) -> Proposal:
        known, ends = self._rows[row], self._ends[row]
        for n in range(min(self.longest, len(known)), self.shortest - 1, -1):
            at = ends.get(tuple(known[len(known) - n :]))
            if at is not None:
                tokens = self._from(known, at, most)
                return Proposal(tokens, [self._agreeing(known, at, n)] * len(tokens))
        return Proposal()

    @staticmethod
    def _from(known: list[int], at: int, most: int) -> list[int]:
        period = len(known) - at
        return [known[at + i % period] for i in range(most)]

    @classmethod
    def _agreeing(cls, known: list[int], at: int, n: int) -> int:
        """How many tokens before ``at`` are the last ones."""
        end = len(known)
        while n < cls._MOST_AGREEING and n < at and known[at - 1 - n] == known[end - 1 - n]:
            n += 1
        return n
