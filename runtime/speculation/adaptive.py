"""A draft that changes what it leaves out while it runs."""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from skipc.runtime.sessions import Session, sites_of
from skipc.runtime.speculation.drafts import GoesOn, Proposal
from skipc.runtime.speculation.self_draft import SelfDraft

from skipc.ir.errors import PlanError
from skipc.ir.plan import Plan
from skipc.ir.site import Site

if TYPE_CHECKING:
    from skipc.runtime.decoder import Decoder

log = logging.getLogger("skipc")

_FEWEST, _MOST = 16, 256  # rounds of each plan in a trial: with so many a difference of a tenth is seen
_SURE, _HOPELESS = 2.5, -1.0  # standard errors at which a trial ends early
_LIKELY = 1.5  # those that are enough at its end
_REST, _LONGEST_REST = 16, 1024  # rounds between trials, twice as many after each that changed nothing
_OUTLIER = 3.0  # medians that a round may take


@dataclass
class _Arm:
    """A plan, and what its rounds brought: tokens, and seconds with those of the call that judged them."""

    plan: Plan
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    begun: bool = False  # whether it has drafted: in its first round, calls are looked at that are repeated later

    def note(self, tokens: float, seconds: float) -> None:
        if self.begun:
            self.tokens.append(tokens)
            self.seconds.append(seconds)
        self.begun = True

    @property
    def speed(self) -> float:
        """Tokens in a second."""
        longest = _OUTLIER * statistics.median(self.seconds)
        return sum(self.tokens) / sum(min(s, longest) for s in self.seconds)

    @property
    def error(self) -> float:
        """Standard error of the speed, relative: that of the tokens of a round, which vary more than its time."""
        mean = statistics.fmean(self.tokens)
        return statistics.stdev(self.tokens) / math.sqrt(len(self.tokens)) / mean


class AdaptiveDraft(SelfDraft):
    """A :class:`SelfDraft` that changes what it leaves out while it drafts, for the text at hand (as SWIFT does, arXiv
    2410.06916). Nothing is compiled for that, and no call is made that would not be made anyway.

    Now and then a challenger, the plan with a layer, a sublayer or two more or less, drafts in turns with the plan,
    until one of them is seen to bring more tokens in a second, the calls that judge drafts included. (SWIFT compares
    plans on tokens that came before, in calls of their own.) What was found stays with the object, for the next
    request: keep it, and give it to each.

    Args:
        plan, depth: what to begin with, as for :class:`SelfDraft`; best what :func:`skipc.find_draft` found. A plan
            that does not pay is hardly asked, and so hardly changes.
        seed: of the changes.

    Attributes:
        current: the plan that it drafts with now; None before the first request.

    Raises:
        ConfigError, UnknownSiteError, PlanError: as :class:`SelfDraft`.
    """

    def __init__(self, plan: Plan | Iterable[str] | None = None, *, depth: int | None = None, seed: int = 0):
        super().__init__(plan, depth=depth)
        self.key: Hashable = ("adaptive", self.key)
        self._draw = random.Random(seed)
        self._model: torch.nn.Module | None = None
        self._arm: _Arm | None = None
        self._challenger: _Arm | None = None
        self._until, self._rest = _REST, _REST  # rounds until the next trial; of them, after the next one
        self._sessions: dict[Hashable, Session] = {}
        self._round: tuple[_Arm, float, set[int], int] | None = None  # begin; rows whose tokens did not come yet; all

    @property
    def current(self) -> Plan | None:
        """See above."""
        return self._arm.plan if self._arm is not None else None

    def plan_for(self, model: torch.nn.Module) -> Plan:
        """What it drafts with now on a model that is compiled."""
        if self._arm is None or self._model is not model:
            self._model, self._arm, self._challenger = model, _Arm(super().plan_for(model)), None
        return self._arm.plan

    def attach(self, decoder: Decoder, goes_on: GoesOn, watched: bool) -> None:
        """See :class:`ModelDraft`."""
        super().attach(decoder, goes_on, watched)
        self._sessions = {self._plan.key: self._session}
        self._round = None

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """``tokens`` came in a row."""
        super().extend(row, tokens)
        if self._round is None:
            return
        arm, begin, waiting, rows = self._round
        if row in waiting:
            if len(waiting) == rows:
                arm.note(0.0, time.perf_counter() - begin)
            if arm.tokens:
                arm.tokens[-1] += len(tokens) / rows
            waiting.discard(row)

    def propose(self, most: Sequence[int]) -> list[Proposal]:
        """The likeliest tokens under the plan, or under one that is tried."""
        rows = {i for i, n in enumerate(most) if n > 0}
        if not rows:
            return super().propose(most)
        arm, begin = self._next(), time.perf_counter()
        try:
            made = self._under(arm.plan, most)
        except PlanError as error:
            if arm is not self._challenger:
                raise
            log.info("a plan that cannot draft is not tried: %s", error)
            self._challenger, self._until = None, self._rest
            return self._under(self._arm.plan, most)  # type: ignore[union-attr]
        self._round = arm, begin, rows, len(rows)
        return made

    def _under(self, plan: Plan, most: Sequence[int]) -> list[Proposal]:
        self._plan, self._round = plan, None
        self._session = self._sessions.get(plan.key) or self._opened(plan)
        made = super().propose(most)
        self._sessions[plan.key] = self._session
        return made

    def _next(self) -> _Arm:
        """Which plan drafts in this round."""
        assert self._arm is not None
        if self._challenger is not None and self._over(self._arm, self._challenger):
            self._challenger = None
        arm = self._arm
        if self._challenger is None:
            self._until -= 1
            if self._until > 0:
                return arm
            arm.tokens.clear()
            arm.seconds.clear()
            self._challenger = _Arm(changed(arm.plan, sites_of(self._decoder.model), self._draw))
        return self._challenger if len(self._challenger.tokens) <= len(arm.tokens) else arm

    def _over(self, arm: _Arm, challenger: _Arm) -> bool:
        """Whether a trial has ended; who won drafts from now on."""
        rounds = min(len(arm.tokens), len(challenger.tokens))
        if rounds < _FEWEST:
            return False
        gain = math.log(challenger.speed / arm.speed) / max(math.hypot(arm.error, challenger.error), 1e-3)
        if _HOPELESS < gain < _SURE and rounds < _MOST:
            return False
        if gain > (_LIKELY if rounds >= _MOST else _SURE):
            log.info("drafts leave out %d sites from now on, not %d", len(challenger.plan.skip), len(arm.plan.skip))
            self._arm, self._rest = challenger, _REST
        else:
            self._rest = min(2 * self._rest, _LONGEST_REST)
        self._until = self._rest
        return True


def changed(plan: Plan, sites: Sequence[Site], draw: random.Random) -> Plan:
    """The plan with one sublayer more or less, with two of that, or with a layer more or less."""
    free = [s for s in sites if s.name not in plan.replace]
    skip = set(plan.skip)
    if free and draw.random() < 0.5:
        less = draw.random() < 0.5  # where few layers run, or few do not, a change that counts is not to be one of many
        layers = sorted({s.layer for s in free if (s.name in skip) != less}) or sorted({s.layer for s in free})
        layer = draw.choice(layers)
        names = {s.name for s in free if s.layer == layer}
        skip = skip | names if less else skip - names
    else:
        for site in draw.sample(free, min(len(free), draw.choice((1, 2)))):
            skip ^= {site.name}
    return Plan(skip, plan.weights, plan.expected, plan.kv, plan.replace)
