"""Skip what changed little at earlier steps."""

from __future__ import annotations

from collections.abc import Sequence

from skipc.runtime.gating import Observation
from skipc.runtime.policies.base import Call, Policy, TableCache, is_feed_forward

from skipc.ir.errors import ConfigError
from skipc.ir.gating import BATCH_RULES, BatchRule, GateTable
from skipc.ir.site import Site


class Lagged(Policy):
    """Skip sites whose similarity over earlier decode steps of the request is high. All is decided before a step.

    Each row of the batch has a running mean for each site. A site is skipped once it reaches ``enter``; every
    ``refresh`` steps it runs again, and goes on running if the mean has fallen below ``leave``.

    Args:
        enter: mean similarity from which a site is skipped.
        leave: mean similarity below which it runs again; at most ``enter``.
        warmup: decode steps that run in full.
        refresh: at most so many steps are skipped in a row.
        weight: of a new similarity in the running mean.
        attention: skip attentions too (they then still write keys and values).
        rule: when the rows of a batch, together, have reached the mean.
    """

    def __init__(
        self,
        enter: float,
        leave: float | None = None,
        warmup: int = 8,
        refresh: int = 32,
        weight: float = 0.25,
        attention: bool = False,
        rule: BatchRule = "all",
    ):
        leave = enter if leave is None else leave
        if leave > enter or refresh < 1 or warmup < 1 or not 0 < weight <= 1 or rule not in BATCH_RULES:
            raise ConfigError(
                "needed are leave <= enter, refresh and warmup of 1 or more, weight in (0, 1], and a batch rule of "
                f"{', '.join(BATCH_RULES)}; got {leave}, {enter}, {refresh}, {warmup}, {weight}, {rule!r}"
            )
        self.enter, self.leave, self.warmup, self.refresh = enter, leave, warmup, refresh
        self.weight, self.attention, self.rule = weight, attention, rule
        self._tables = TableCache()
        self.reset()

    def reset(self) -> None:
        """A new request."""
        self._steps = 0
        self._sites: tuple[Site, ...] = ()  # of the last step, those that may be skipped, and their names
        self._places: list[int] = []
        self._names: list[str] = []
        self._means: dict[str, list[float]] = {}  # of each row
        self._skipped_for: dict[str, int] = {}  # steps since a skipped site last ran

    def decide(self, call: Call) -> GateTable:
        """Sites to skip at this step."""
        ready = call.phase == "decode" and self._steps >= self.warmup
        skip = frozenset(n for n, since in self._skipped_for.items() if since < self.refresh) if ready else frozenset()
        measures = call.phase == "decode"
        return self._tables.get(
            (call.sites, skip, measures), lambda: GateTable.of(call.names, skip=skip, measures=measures)
        )

    def observe(self, call: Call, seen: Observation) -> None:
        """Update the means of what ran, and decide about the next step."""
        if call.phase != "decode":
            return
        self._steps += 1
        if call.sites is not self._sites:
            self._sites = call.sites
            self._places = [i for i, site in enumerate(call.sites) if self.attention or is_feed_forward(site)]
            self._names = [call.sites[i].name for i in self._places]
        for name, row in zip(self._names, seen.rows(self._places), strict=True):
            if all(new != new for new in row):  # NaN: it did not run
                if name in self._skipped_for:
                    self._skipped_for[name] += 1
                continue
            old = self._means.get(name)
            if old is not None and len(old) == len(row):
                row = [
                    a if b != b else b if a != a else a + self.weight * (b - a) for a, b in zip(old, row, strict=True)
                ]
            self._means[name] = row
            if agreed(row, self.leave if name in self._skipped_for else self.enter, self.rule):
                self._skipped_for[name] = 0
            else:
                self._skipped_for.pop(name, None)


def agreed(row: Sequence[float], bound: float, rule: BatchRule) -> bool:
    """Whether the rows of a batch, of which NaN have no say, have reached a bound together."""
    votes = [value for value in row if value == value]
    if rule == "mean":
        return bool(votes) and sum(votes) / len(votes) >= bound
    above = sum(value >= bound for value in votes)
    return bool(votes) and (above == len(votes) if rule == "all" else 2 * above > len(votes))
