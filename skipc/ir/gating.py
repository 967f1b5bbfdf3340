"""What the gates of one call do, as plain data."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from skipc.ir.errors import PlanError, UnknownSiteError

BatchRule = Literal["all", "majority", "mean", "gather"]
BATCH_RULES: tuple[BatchRule, ...] = ("all", "majority", "mean")  # by which tokens decide together


@dataclass(frozen=True, eq=False)
class GateTable:
    """Which sites a call skips from its start, and which it skips once a similarity of its own is high enough.

    A site that runs and whose similarity reaches its threshold closes gates of later sites. The similarity is the fp32
    cosine, for each token, of the residual stream after the site and before it, or before an earlier one (a layer's
    first); ``rule`` says what it means that the tokens of a call reach it: all of them, more than half, or their mean.
    Under ``gather`` each token decides for itself: a site then runs on the tokens that need it.

    Attributes:
        sites: names of the program's sites in order of execution; the axis of all tensors, of length n.
        skip: bool ``[n]``.
        threshold: float32 ``[n]``; infinite for sites that decide nothing.
        closes: bool ``[n, n]``, above the diagonal: ``closes[i, j]`` if site i decides about site j.
        scale: float32 ``[n]``: what a skipped site multiplies the stream by.
        since: int64 ``[n]``: the site before which the stream is compared with; itself, if not an earlier one.
        measures: True if somebody wants to see the similarities of sites that decide nothing.
        routed: sites about which the policy is asked, token by token, when the stream has come to them.
    """

    sites: tuple[str, ...]
    skip: torch.Tensor
    threshold: torch.Tensor
    closes: torch.Tensor
    scale: torch.Tensor
    since: torch.Tensor
    rule: BatchRule = "all"
    measures: bool = True
    routed: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        sites: Sequence[str],
        *,
        skip: Iterable[str] = (),
        threshold: Mapping[str, float] | None = None,
        closes: Mapping[str, Iterable[str]] | None = None,
        scale: Mapping[str, float] | None = None,
        since: Mapping[str, str] | None = None,
        rule: BatchRule = "all",
        measures: bool = True,
        routed: Iterable[str] = (),
    ) -> GateTable:
        """A table by names.

        Raises:
            UnknownSiteError: for a name that is not among ``sites``.
            PlanError: if a site would decide about itself or an earlier one.
        """
        place = {name: i for i, name in enumerate(sites)}

        def at(name: str) -> int:
            if name not in place:
                raise UnknownSiteError(name, sites)
            return place[name]

        n = len(sites)
        table = cls(
            tuple(sites),
            torch.zeros(n, dtype=torch.bool),
            torch.full((n,), torch.inf),
            torch.zeros(n, n, dtype=torch.bool),
            torch.ones(n),
            torch.arange(n),
            rule,
            measures,
            frozenset(routed),
        )
        if rule not in get_args(BatchRule):
            raise PlanError(f"rule is one of {', '.join(get_args(BatchRule))}, not {rule!r}")
        for name in table.routed:
            at(name)
        for name in skip:
            table.skip[at(name)] = True
        for name, value in (threshold or {}).items():
            table.threshold[at(name)] = value
        for name, others in (closes or {}).items():
            for other in others:
                if at(other) <= at(name):
                    raise PlanError(f"{name} cannot decide about {other}, which runs no later")
                table.closes[at(name), at(other)] = True
        for name, value in (scale or {}).items():
            table.scale[at(name)] = value
        for name, first in (since or {}).items():
            if at(first) > at(name):
                raise PlanError(f"{name} cannot be compared with the stream before {first}, which runs later")
            table.since[at(name)] = at(first)
        return table

    @cached_property
    def deciding(self) -> frozenset[int]:
        """Numbers of the sites whose similarity may close gates of the same call."""
        return frozenset((self.threshold.isfinite() & self.closes.any(1)).nonzero().flatten().tolist())

    @property
    def fixed(self) -> bool:
        """True if all that a call skips is known before it: nothing is decided in its middle."""
        return not self.deciding and not self.routed

    @cached_property
    def flags(self) -> tuple[bool, ...]:
        """``skip`` as plain numbers."""
        return tuple(self.skip.tolist())

    @cached_property
    def work(self) -> Hashable:
        """Equal for tables that ask for the same work."""
        told = (self.flags, self.measures, tuple(self.factors_by_number.items()), tuple(self.spans.items()))
        if self.fixed:
            return told
        return (*told, self.rule, tuple(self.threshold.tolist()), tuple(self.closes.flatten().tolist()), self.routed)

    @property
    def by_token(self) -> bool:
        """True if tokens of one call may differ in what they skip."""
        return bool(self.routed) or (self.rule == "gather" and bool(self.deciding))

    @cached_property
    def factors(self) -> dict[str, float]:
        """Factors other than 1, by site."""
        return {name: f for name, f in zip(self.sites, self.scale.tolist(), strict=True) if f != 1}

    @cached_property
    def factors_by_number(self) -> dict[int, float]:
        """The same, by the sites' numbers."""
        return {i: self.factors[name] for i, name in enumerate(self.sites) if name in self.factors}

    @cached_property
    def spans(self) -> dict[int, int]:
        """For each site whose similarity spans earlier ones, the first of them."""
        return {i: first for i, first in enumerate(self.since.tolist()) if first != i}

    @cached_property
    def opens_spans(self) -> frozenset[int]:
        """Sites that later ones are compared with the stream before."""
        return frozenset(self.spans.values())

    @cached_property
    def ends_spans(self) -> dict[int, int]:
        """For the last site of each span, the first."""
        last = {first: i for i, first in self.spans.items()}
        return {i: first for first, i in last.items()}

    @cached_property
    def skipped(self) -> frozenset[str]:
        """Sites that are skipped from the start."""
        return self.names_of(self.skip)

    def names_of(self, chosen: torch.Tensor) -> frozenset[str]:
        """The names of the sites that are true in ``chosen``, bool ``[n]``. (One object for equal answers, which most
        calls get: hashing sixty names takes a while.)"""
        flags = tuple(chosen.tolist())
        if flags not in self._named:
            self._named.clear()
            self._named[flags] = frozenset(name for name, here in zip(self.sites, flags, strict=True) if here)
        return self._named[flags]

    @cached_property
    def _named(self) -> dict[tuple[bool, ...], frozenset[str]]:
        return {}
