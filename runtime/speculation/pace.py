"""How many drafted tokens to have judged at a time, if any: by what calls take and how often drafts were right."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable, Sequence

from skipc.runtime.speculation.drafts import Proposal

_KEPT = 16  # times of each width
_WEIGHT = 0.05  # of one more token in a rate
_FIRST = 0.5  # rate of a kind of which nothing is known
_ENOUGH = 3  # times of a width, before they are believed
_AGAIN = 32  # after so many calls with drafts a plain one is timed
_SURE = 1.02  # a call with drafts must promise so much more than one without


class Pace:
    """Chooses between plain steps and calls that judge drafts, for the most tokens in a second.

    How often the first token of a proposal is right shows at plain steps too: it costs nothing to compare it with what
    came. So drafting stops where it does not pay, and begins again where it would have, without trying.

    Args:
        widths: of calls, tokens of each row: 1, and more for those that judge drafts.
    """

    def __init__(self, widths: Sequence[int]):
        self.widths = tuple(sorted(widths))
        self._seconds: dict[int, deque[float]] = {w: deque(maxlen=_KEPT) for w in self.widths}
        self._rates: dict[Hashable, float] = {}
        self._since = 0  # calls since the last plain one

    def took(self, width: int, seconds: float) -> None:
        """A call of this width took so long, with all that belongs to it."""
        self._seconds[width].append(seconds)
        self._since = 0 if width == 1 else self._since + 1

    def came(self, kind: Hashable, right: int, wrong: int) -> None:
        """Of a proposal's tokens so many were right, and then one was ``wrong``, or none was looked at."""
        rate = self._rates.get(kind, _FIRST)
        for hit in [1.0] * right + [0.0] * wrong:
            rate += _WEIGHT * (hit - rate)
        self._rates[kind] = rate

    def rate(self, kind: Hashable) -> float:
        """How often a token of such a proposal is right, given that those before it were."""
        return self._rates.get(kind, _FIRST)

    def cost(self, width: int) -> float:
        """Of a call of this width, in plain steps; a guess while nothing is known."""
        plain, wide = self._seconds[1], self._seconds[width]
        if not plain or len(wide) < _ENOUGH:
            return 1 + 0.04 * (width - 1)
        return statistics.median(wide) / statistics.median(plain)

    def expected(self, proposal: Proposal, width: int) -> float:
        """Tokens that a call of this width brings a row, by how often such proposals were right."""
        rate, total, here = self.rate(proposal.kind), 1.0, 1.0
        for _ in range(min(len(proposal.tokens), width - 1)):
            here *= rate
            total += here
        return total

    def choose(self, proposals: Sequence[Proposal], most: int) -> int:
        """The width of the next call, at most ``most`` if it is more than one, given what is proposed for each row that
        still runs."""
        if len(self._seconds[1]) < _ENOUGH or self._since >= _AGAIN or not any(p.tokens for p in proposals):
            return 1
        best, chosen = _SURE, 1
        for width in (w for w in self.widths[1:] if w <= most):
            gain = sum(self.expected(p, width) for p in proposals) / len(proposals) / self.cost(width)
            if gain > best:
                best, chosen = gain, width
        return chosen
