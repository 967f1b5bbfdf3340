"""SkipDecode (arXiv 2307.02628)."""

from __future__ import annotations

from skipc.runtime.policies.base import Call, Policy, TableCache, layers_of

from skipc.ir.errors import ConfigError
from skipc.ir.gating import GateTable


class SkipDecode(Policy):
    """One depth for each position, shared by all rows, never rising, so that no token needs keys and values of a layer
    that an earlier one left out. Some layers at the bottom and the rest at the top run; prompts run in full.

    Args:
        most: layers that run at the first decoded token.
        least: layers that run from ``length`` on.
        length: positions over which the depth falls, evenly.
        warmup: of the layers that run, how many are at the bottom.

    The paper fine-tunes with the schedule; without that, expect little (AdaSkip's table 3).
    """

    only_grows = True

    def __init__(self, most: int, least: int, length: int, warmup: int = 1):
        if not most >= least >= warmup >= 1 or length < 1:
            raise ConfigError(
                f"most >= least >= warmup >= 1 and length >= 1 are needed, not {most}, {least}, {warmup}, {length}"
            )
        self.most, self.least, self.length, self.warmup = most, least, length, warmup
        self._tables = TableCache()

    def depth(self, position: int) -> int:
        """Layers that run at ``position``."""
        fallen = (self.most - self.least) * min(position, self.length) / self.length
        return max(self.least, self.most - int(fallen))

    def decide(self, call: Call) -> GateTable:
        """The layers between the bottom ones and the top ones."""
        depth = self.depth(call.position) if call.phase == "decode" else None

        def make() -> GateTable:
            skip: list[str] = []
            for stream in sorted({site.stream for site in call.sites}) if depth is not None else ():
                layers = [sites for (of, _), sites in layers_of(call.sites).items() if of == stream]
                assert depth is not None
                left_out = layers[self.warmup : max(self.warmup, len(layers) - (depth - self.warmup))]
                skip += [site.name for sites in left_out for site in sites]
            return GateTable.of(call.names, skip=skip, measures=False)

        return self._tables.get((call.sites, depth), make)
