"""Statistics of similarities over the calls of a session."""

from __future__ import annotations

import torch
from skipc.runtime.gating import Observation

EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)  # between the bins of a histogram
_MOST_PENDING = 64
_LARGE = 1 << 14  # elements: folded at once, so that a long prompt's moments are not kept


class SimilarityStats:
    """Similarities of all tokens that ran through each site. Adding a decode step costs a list entry; sums are made in
    batches."""

    def __init__(self) -> None:
        self._pending: list[Observation] = []
        # By the sites of a program, float64 [sites, 4]: tokens, sum of cosines, calls in which tokens could disagree,
        # sum of their agreement; and int64 [sites, bins].
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._histograms: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, seen: Observation) -> None:
        """Note one call."""
        self._pending.append(seen)
        if len(self._pending) >= _MOST_PENDING or any(block.numel() > _LARGE for block in seen.blocks):
            self._fold()

    def means(self) -> dict[str, float]:
        """Mean similarity of each site, over tokens."""
        self._fold()
        return {n: s[1] / s[0] for n, s in self._by_name(self._sums) if s[0]}

    def agreements(self) -> dict[str, float]:
        """For each site with a threshold, the mean share of a call's tokens on the side where most of them are."""
        self._fold()
        return {n: s[3] / s[2] for n, s in self._by_name(self._sums) if s[2]}

    def histograms(self) -> dict[str, list[int]]:
        """How many tokens of each site fell between the edges of :data:`EDGES`, below the first and above the last."""
        self._fold()
        return {n: h for n, h in self._by_name(self._histograms) if any(h)}

    @staticmethod
    def _by_name(found: dict[tuple[str, ...], torch.Tensor]) -> list[tuple[str, list]]:  # type: ignore[type-arg]
        return [(n, row) for names, rows in found.items() for n, row in zip(names, rows.tolist(), strict=True)]

    def _fold(self) -> None:
        pending, self._pending = self._pending, []
        edges = torch.tensor(EDGES)
        for seen in pending:
            sites = seen.table.sites
            sums = self._sums.setdefault(sites, torch.zeros(len(sites), 4, dtype=torch.float64))
            counts = self._histograms.setdefault(sites, torch.zeros(len(sites), len(EDGES) + 1, dtype=torch.long))
            for cosines in seen.cosines():
                flat = cosines.flatten(1).cpu()
                there = ~flat.isnan()
                tokens = there.sum(1)
                sums[:, 0] += tokens
                sums[:, 1] += flat.double().nansum(1)
                counts.scatter_add_(1, torch.bucketize(flat.nan_to_num(), edges), there.long())
                if seen.table.deciding:
                    judged = (tokens > 1) & seen.table.threshold.isfinite()
                    above = (flat >= seen.table.threshold[:, None]).sum(1) / tokens.clamp(min=1)
                    sums[:, 2] += judged
                    sums[:, 3] += torch.where(judged, torch.maximum(above, 1 - above), 0)
