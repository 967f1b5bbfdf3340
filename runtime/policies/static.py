"""Fixed sets, and no set at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skipc.runtime.policies.base import Call, Phase, Policy, TableCache

from skipc.ir.gating import GateTable


class Static(Policy):
    """Skip the same sites in every call: LLM-Drop (arXiv 2406.15786), ShortGPT (2403.03853), or any set of one's own.

    Args:
        skip: names of sites. Those that a program does not have are ignored there.
        scale: what a skipped site multiplies the stream by (AdaSkip's compensation); 1 where a name is missing.
        phases: when to skip. In decode alone, prompts run in full.
        measures: take the similarities of the sites that run, for the session's statistics.
    """

    def __init__(
        self,
        skip: Iterable[str],
        scale: Mapping[str, float] | None = None,
        phases: Iterable[Phase] = ("prefill", "decode"),
        measures: bool = False,
    ):
        self.skip, self.scale = frozenset(skip), dict(scale or {})
        self.phases, self.measures = frozenset(phases), measures
        self.only_grows = self.phases in ({"prefill", "decode"}, {"decode"})
        self._tables = TableCache()

    def decide(self, call: Call) -> GateTable:
        """The set, or nothing in other phases."""

        def make() -> GateTable:
            skip = self.skip.intersection(call.names) if call.phase in self.phases else frozenset()
            scale = {name: self.scale[name] for name in skip if name in self.scale}
            return GateTable.of(call.names, skip=skip, scale=scale, measures=self.measures)

        return self._tables.get((call.sites, call.phase), make)


class Observe(Static):
    """Skip nothing, and take all similarities."""

    def __init__(self) -> None:
        super().__init__((), measures=True)
