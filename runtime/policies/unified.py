"""Unified Layer Skipping (arXiv 2404.06954)."""

from __future__ import annotations

import math

from skipc.runtime.policies.base import Call, Policy, TableCache, layers_of

from skipc.ir.errors import ConfigError
from skipc.ir.gating import GateTable


class Unified(Policy):
    """Keep every so-manieth layer while decoding, for a target speed-up; prompts run in full.

    Args:
        speedup: layers over layers kept, above 1.

    The paper fine-tunes for the same speed-up; without that, expect little.
    """

    only_grows = True

    def __init__(self, speedup: float):
        if not speedup > 1:
            raise ConfigError(f"speedup must be above 1, not {speedup}")
        self.speedup = speedup
        self._tables = TableCache()

    def decide(self, call: Call) -> GateTable:
        """All sites of the layers that are not kept."""

        def make() -> GateTable:
            if call.phase != "decode":
                return GateTable.of(call.names, measures=False)
            skip = []
            for stream in sorted({site.stream for site in call.sites}):
                layers = [sites for (of, _), sites in layers_of(call.sites).items() if of == stream]
                kept = kept_layers(len(layers), self.speedup)
                skip += [site.name for i, sites in enumerate(layers) for site in sites if i not in kept]
            return GateTable.of(call.names, skip=skip, measures=False)

        return self._tables.get((call.sites, call.phase), make)


def kept_layers(layers: int, speedup: float) -> set[int]:
    """Layers that are kept of so many: the first, the last, and evenly spaced ones in between."""
    keep = max(1, math.floor(layers / speedup))
    if layers <= 2 or keep <= 2:  # the interval is not defined
        return {0, layers - 1} if layers else set()
    interval = max(1, math.floor(layers / (keep - 1)))
    kept = {0, layers - 1}
    for i in range(1, layers - 1):
        if len(kept) == keep:
            break
        if i % interval == 0:
            kept.add(i)
    return kept
