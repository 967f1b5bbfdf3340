"""AdaSkip (AAAI 2025, arXiv 2501.02336)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from skipc.runtime.gating import Observation
from skipc.runtime.policies.base import Call, Phase, Policy, TableCache, is_feed_forward
from skipc.runtime.policies.lagged import agreed

from skipc.ir.errors import ConfigError
from skipc.ir.gating import BATCH_RULES, BatchRule, GateTable
from skipc.ir.site import SiteKind

Rule = Literal["paper", "released"]


class AdaSkip(Policy):
    """Skip the sublayers that calibration found most similar, attentions and MLPs ranked together, and scale the stream
    in their place; while decoding, also MLPs that are as similar in this request.

    Args:
        similarity: mean cosine of each site over calibration text (section 3; :func:`skipc.measure_similarity`).
        scale: mean ratio of norms of each site, by which a skipped one multiplies the stream; None for no scaling.
        count: how many sites to skip. Or give
        acceleration: the paper's alpha: of M layers, ``2 * (M - M / alpha)`` sublayers are skipped.
        window: P, decode steps over which the request's own similarities are measured.
        rule: ``paper``: the window runs in full; behind it, MLPs whose mean similarity is above the lowest of the
            skipped sites' calibrated ones are skipped too. ``released``: what the authors' code does: the set stays
            skipped in the window, and its threshold is reset to 1 before each request, so that no MLP is ever added.
        phases: when to skip; ``("decode",)`` is the code's Decode variant, both its E2E variant.
        batch_rule: when the rows of a batch, together, are above the threshold. (The authors run batch 1.)
    """

    def __init__(
        self,
        similarity: Mapping[str, float],
        scale: Mapping[str, float] | None = None,
        *,
        count: int | None = None,
        acceleration: float | None = None,
        window: int = 20,
        rule: Rule = "paper",
        phases: Iterable[Phase] = ("prefill", "decode"),
        batch_rule: BatchRule = "all",
    ):
        if (count is None) == (acceleration is None):
            raise ConfigError("give either count or acceleration")
        if rule not in ("paper", "released") or batch_rule not in BATCH_RULES:
            raise ConfigError(
                f"rule is 'paper' or 'released', batch_rule one of {BATCH_RULES}: {rule!r}, {batch_rule!r}"
            )
        if acceleration is not None and not acceleration >= 1:
            raise ConfigError(f"acceleration must be 1 or more, not {acceleration}")
        if count is not None and not 0 <= count <= len(similarity):
            raise ConfigError(f"count must be between 0 and the {len(similarity)} calibrated sites, not {count}")
        self.similarity, self.scale = dict(similarity), dict(scale or {})
        self.count, self.acceleration, self.window = count, acceleration, window
        self.rule, self.phases, self.batch_rule = rule, frozenset(phases), batch_rule
        self.only_grows = rule == "released" or "prefill" not in self.phases
        self._tables = TableCache()
        self.reset()

    def reset(self) -> None:
        """A new request."""
        self._sums: list[list[float]] = []  # of similarities, by site and row
        self._steps = 0
        self._added: frozenset[str] = frozenset()

    def ranked(self, call: Call) -> list[str]:
        """Sites that may be skipped, the most similar first."""
        kinds = (SiteKind.ATTENTION, SiteKind.MLP, SiteKind.MOE)
        known = [s.name for s in call.sites if s.kind in kinds and s.name in self.similarity]
        return sorted(known, key=lambda name: -self.similarity[name])  # stable: as in the code, ties by position

    def chosen(self, call: Call) -> list[str]:
        """The set that calibration chose."""
        count = self.count
        if count is None:
            assert self.acceleration is not None
            layers = len({(s.stream, s.layer) for s in call.sites})
            count = 2 * math.floor(layers - layers / self.acceleration + 1e-9)
        return self.ranked(call)[:count]

    def decide(self, call: Call) -> GateTable:
        """The chosen set, and behind the window what was added."""
        observing = call.phase == "decode" and self._steps < self.window
        active = call.phase in self.phases and not (observing and self.rule == "paper")
        added = self._added if call.phase == "decode" and not observing else frozenset()

        def make() -> GateTable:
            skip = [*self.chosen(call), *added] if active else []
            scale = {name: self.scale[name] for name in skip if name in self.scale}
            return GateTable.of(call.names, skip=skip, scale=scale, measures=observing)

        return self._tables.get((call.sites, active, added, observing), make)

    def observe(self, call: Call, seen: Observation) -> None:
        """Measure MLPs within the window."""
        if call.phase != "decode" or self._steps >= self.window:
            return
        rows = seen.rows()
        same = len(self._sums) == len(rows) and all(len(a) == len(b) for a, b in zip(self._sums, rows, strict=True))
        sums = self._sums if same else [[0.0] * len(row) for row in rows]
        self._sums = [[a + b for a, b in zip(old, new, strict=True)] for old, new in zip(sums, rows, strict=True)]
        self._steps += 1
        chosen = self.chosen(call)
        if self._steps < self.window or not chosen:
            return
        bound = min(self.similarity[name] for name in chosen) if self.rule == "paper" else 1.0
        above = math.nextafter(bound, math.inf) if self.rule == "paper" else bound  # the paper's is strict
        self._added = frozenset(
            site.name
            for site, row in zip(call.sites, self._sums, strict=True)
            if is_feed_forward(site)
            and site.name not in chosen
            and agreed([total / self._steps for total in row], above, self.batch_rule)
        )
