"""A draft that remembers what came in earlier requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from skipc.runtime.speculation.drafts import Proposal

_SURE = 7  # times in a row, which are counted up to here
_BITS = _SURE.bit_length()


class NGramCache:
    """Proposes what came the last time behind the same tokens, in this request or in earlier ones that used this object
    (a look-up cache, as llama.cpp keeps one). For what a service says again and again: templates, greetings, names.
    Begins empty, and learns from what the model says; prompts are not learned, which :class:`PromptLookup` looks at. A
    token's kind is how many tokens before it agreed, and how many times in a row it came behind them.

    It outlives requests, so make one for each model, hand it to all requests that may know of each other (what is kept
    never shows in their tokens, only in their speed), and let requests that use it follow each other. One entry takes
    some 150 bytes; a token makes ``order`` entries, if they are new.

    Args:
        order: so many last tokens are looked up, then fewer.
        capacity: entries; where there are more, those that did not come for longest go.

    Raises:
        ValueError: for numbers below 1.
    """

    def __init__(self, order: int = 4, capacity: int = 1 << 18):
        if order < 1 or capacity < 1:
            raise ValueError(f"needed are order >= 1 and capacity >= 1, got {order} and {capacity}")
        self.order, self.capacity = order, capacity
        # By the hash of what stands before: the token, and how many times in a row it came. (Numbers take a third of
        # the memory of what they stand for; two contexts that share a hash would cost a wrong guess.)
        self._next: dict[int, int] = {}
        self._tails: list[list[int]] = []  # the last tokens of each row

    def __len__(self) -> int:
        return len(self._next)

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """A new request with these prompts."""
        self._tails = [list(row[-self.order :]) for row in rows]

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """``tokens`` came in a row."""
        known, tail = self._next, self._tails[row]
        for token in tokens:
            for n in range(1, len(tail) + 1):
                key = hash(tuple(tail[-n:]))
                last, times = divmod(known.pop(key, -1), 1 << _BITS)
                known[key] = token << _BITS | (min(times + 1, _SURE) if last == token else 1)  # the newest is last
            tail.append(token)
            del tail[: -self.order]
        if len(known) > self.capacity:
            for key in list(islice(known, len(known) - self.capacity + self.capacity // 8)):
                del known[key]

    def propose(self, most: Sequence[int]) -> list[Proposal]:
        """What came the last time, and what came behind that."""
        return [self._chain(list(tail), n) for tail, n in zip(self._tails, most, strict=True)]

    def _chain(self, tail: list[int], most: int) -> Proposal:
        tokens: list[int] = []
        kinds: list[tuple[int, int]] = []
        while len(tokens) < most:
            for n in range(min(self.order, len(tail)), 0, -1):
                found = self._next.get(hash(tuple(tail[-n:])))
                if found is not None:
                    token, times = divmod(found, 1 << _BITS)
                    break
            else:
                break
            tokens.append(token)
            kinds.append((n, times))
            tail.append(token)
        return Proposal(tokens, kinds)
