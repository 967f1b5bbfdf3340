"""How many drafted tokens to have judged at a time, if any, and who drafts them: by what calls take and how often
drafts were right."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from skipc.runtime.speculation.drafts import Proposal

_KEPT = 16  # times of each width
_WEIGHT = 0.05  # of one more token in a rate
_ENOUGH = 3  # times of a width, before they are believed
_AGAIN = 48  # after so many calls with drafts a plain one is timed
_GUESS = 0.04  # of a plain step, for each token more in a call
_DOUBT = 0.8  # of the least time, while it is not known well
_SURE = 1.02  # a call with drafts must promise so much more than one without
_REST = 8  # calls until a model that does not pay is weighed again: weighing takes as long as a small layer
_WAIT, _LONGEST_WAIT = 48, 1536  # plain calls until a model that did not pay as a draft is tried again


@dataclass
class Rate:
    """How often something is right: a mean at first, which then forgets slowly.

    Attributes:
        value: the estimate; at first a guess that counts as ``seen`` tokens.
        seen: tokens.
    """

    value: float = 0.5
    seen: int = 2

    def note(self, right: bool) -> None:
        """One more token."""
        self.seen += 1
        self.value += max(_WEIGHT, 1 / self.seen) * (right - self.value)


class Times:
    """Seconds of something, the last ones, but for the very first: what is repeated is made ready in it."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._median: float | None = None
        self._begun = False

    def note(self, seconds: float) -> None:
        """Once more."""
        if self._begun:
            self._last.append(seconds)
        self._begun, self._median = True, None

    @property
    def known(self) -> bool:
        """Whether there are enough to go by."""
        return len(self._last) >= _ENOUGH

    @property
    def least(self) -> float | None:
        """Of the last ones, if there are any."""
        return min(self._last, default=None)

    @property
    def median(self) -> float:
        """Of the last ones. (Kept: it is asked for at each token, some ten times.)"""
        if self._median is None:
            self._median = statistics.median(self._last)
        return self._median


@dataclass
class _Model:
    """What is known of a model that drafts."""

    seconds: Times = field(default_factory=Times)  # of a token, where calls were proven
    rate: Rate = field(default_factory=lambda: Rate(0.8, 4))  # of all its tokens
    weighed: int = 0  # the call before which it is not weighed again
    wait: int = _WAIT
    due: int = 0  # the call at which it may be tried again, though it does not pay


class Pace:
    """Chooses between plain steps and calls that judge drafts, for the most tokens in a second.

    How often the first token of a proposal is right shows at plain steps too: it costs nothing to compare it with what
    came. So drafting stops where it does not pay, and begins again where it would have, without trying. Models that
    draft cost time: one that does not pay is tried again seldom, and ever more seldom.

    Args:
        widths: of calls, tokens of each row: 1, and more for those that judge drafts.
        rows: of calls.
    """

    def __init__(self, widths: Sequence[int], rows: int = 1):
        self.widths, self.rows = tuple(sorted(widths)), rows
        self._seconds = {w: Times() for w in self.widths}
        self._rates: defaultdict[Hashable, Rate] = defaultdict(Rate)
        self._models: defaultdict[Hashable, _Model] = defaultdict(_Model)
        self._calls = 0
        self._since = 0  # calls since the last plain one

    # -- what happened ------------------------------------------------------------------------------------------------

    def took(self, width: int, seconds: float) -> None:
        """A call of this width took so long, without what drafting took."""
        self._seconds[width].note(seconds)
        self._calls += 1
        self._since = 0 if width == 1 else self._since + 1

    def came(self, kinds: Sequence[Hashable], right: int, model: Hashable = None) -> None:
        """Of a proposal's tokens of these kinds so many were right, and the one behind them, if there is one, was not.
        ``model``: the one that proposed them, if one did."""
        for i, kind in enumerate(kinds[: right + 1]):
            self._rates[kind].note(i < right)
            if model is not None:
                self._models[model].rate.note(i < right)

    def drafted(self, model: Hashable, tokens: int, seconds: float | None) -> None:
        """A model drafted so many tokens of each row; None if the time says nothing."""
        known = self._models[model]
        if seconds is not None:
            known.seconds.note(seconds / tokens)
        known.due = self._calls + known.wait
        known.wait = min(2 * known.wait, _LONGEST_WAIT)

    # -- what will ----------------------------------------------------------------------------------------------------

    def rate(self, kind: Hashable) -> float:
        """How often a token of this kind is right, given that those before it were."""
        return self._rates[kind].value

    def cost(self, width: int) -> float:
        """Of a call of this width, in plain steps; a guess while nothing is known."""
        plain, wide = self._seconds[1], self._seconds[width]
        if plain.known and wide.known:
            return wide.median / plain.median
        if not plain.known or wide.least is None:
            return 1 + _GUESS * self.rows * (width - 1)
        return _DOUBT * wide.least / plain.median  # one slow call shall not decide, nor be repeated if it was very slow

    def cost_of_drafting(self, model: Hashable) -> float | None:
        """Of one token of each row, in plain steps; None while nothing is known."""
        known = self._models[model]
        if not known.seconds.known or not self._seconds[1].known:
            return None
        return known.seconds.median / self._seconds[1].median

    def expected(self, proposal: Proposal, width: int) -> float:
        """Tokens that a call of this width brings a row, by how often such proposals were right."""
        return 1 + sum(_products(map(self.rate, proposal.kinds[: width - 1])))

    # -- choices ------------------------------------------------------------------------------------------------------

    @property
    def plain_is_due(self) -> bool:
        """Whether plain steps need to be timed."""
        return not self._seconds[1].known or self._since >= _AGAIN

    def choose(self, proposals: Sequence[Proposal], most: int) -> tuple[int, float]:
        """The width of the next call, at most ``most`` if it is more than one, given what is proposed for each row that
        is not ahead of others, and how many tokens it promises the slowest of them in the time of a plain step."""
        best, chosen = _SURE, 1
        if self.plain_is_due or not any(p.tokens for p in proposals):
            return 1, 1.0
        for width in (w for w in self.widths[1:] if w <= most):
            gain = min(self.expected(p, width) for p in proposals) / self.cost(width)
            if gain > best:
                best, chosen = gain, width
        return chosen, best if chosen > 1 else 1.0

    def choose_model(self, models: Iterable[Hashable], most: int, otherwise: float) -> Hashable | None:
        """Which model drafts for the next call, of width ``most`` at most, if one does: the one that promises most, and
        more than ``otherwise`` does; or one of which too little is known."""
        if self.plain_is_due or all(w > most for w in self.widths[1:]):
            return None
        best, chosen = max(_SURE, otherwise), None
        for model in models:
            known, cost = self._models[model], self.cost_of_drafting(model)
            if cost is None:
                return model
            if self._calls < known.weighed:
                continue
            gain = promise(known.rate.value, cost, self._cost_of_judging, most)[0]
            if gain > best:
                best, chosen = gain, model
            elif gain <= _SURE:
                known.weighed = self._calls + _REST
        if chosen is not None:
            self._models[chosen].wait = _WAIT
            return chosen
        return next((m for m in models if self._models[m].due <= self._calls), None)

    def goes_on(self, model: Hashable, kinds: Sequence[Sequence[Hashable]], most: int) -> bool:
        """Whether a model shall draft one more token, given the kinds of those that it has for each row that runs: if
        what more of them bring is worth the time, at what tokens cost now."""
        known, cost = self._models[model], self.cost_of_drafting(model)
        made = max(map(len, kinds))
        if made >= most - 1:
            return False
        if cost is None:
            return True
        worth = max(1.0, promise(known.rate.value, cost, self._cost_of_judging, most)[0])
        so_far = [list(_products(map(self.rate, row))) for row in kinds]

        def value(count: int) -> float:
            tokens = sum(sum(p) + _more(p[-1] if p else 1.0, known.rate.value, count - made) for p in so_far)
            return tokens / len(kinds) - worth * (self._cost_of_judging(count) + cost * (count - made))

        return max(value(n) for n in range(made + 1, most)) > value(made)

    def _cost_of_judging(self, count: int) -> float:
        return next((self.cost(w) for w in self.widths if w > count), float("inf")) if count else 1.0


def promise(rate: float, cost: float, judging: Callable[[int], float], most: int) -> tuple[float, int]:
    """Tokens in the time of a plain step, and drafted tokens of each row in a call: at the best length, fewer than
    ``most`` (Leviathan et al., arXiv 2211.17192, section 3.3).

    Args:
        rate: how often a drafted token is right, given that those before it were.
        cost: of drafting one, in plain steps.
        judging: cost of a call that judges so many drafted tokens, in plain steps.
    """
    return max(((1 + _more(1.0, rate, n)) / (judging(n) + cost * n), n) for n in range(1, max(2, most)))


def _products(rates: Iterable[float]) -> Iterator[float]:
    """Of the first, the first two, and so on."""
    here = 1.0
    for rate in rates:
        here *= rate
        yield here


def _more(so_far: float, rate: float, count: int) -> float:
    """Tokens that ``count`` more bring, each right with ``rate``, behind some that are right with ``so_far``."""
    return so_far * sum(rate**i for i in range(1, count + 1))
