"""Trained routers: FlexiDepth (arXiv 2503.23798) and Mixture-of-Depths (2404.02258)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from skipc.runtime.policies.base import Call, Policy, TableCache

from skipc.ir.errors import ConfigError
from skipc.ir.gating import GateTable

Score = Callable[[torch.Tensor], torch.Tensor]


class Routed(Policy):
    """Let a router decide for each token which sites it goes through. MLPs run on the tokens that need them; attentions
    compute keys and values of all tokens, and the queries of those that go through, where they can (see ``Config``).

    Args:
        routers: for each site, a module or function from the stream before it, ``[batch, tokens, width]``, to scores,
            ``[batch, tokens]``; or the name of an earlier site, whose decision it shares (FlexiDepth has one router for
            both sublayers of a layer).
        threshold: of the score, above which a token goes through (FlexiDepth: 0.5 of a sigmoid).
        capacity: instead, this share of each row's tokens goes through, those with the highest scores
            (Mixture-of-Depths, section 3.3). Not causal: while decoding, the threshold counts.
        adapters: for sites, modules from the stream of skipped tokens, ``[tokens, width]``, to what is added to it.
    """

    only_grows = False

    def __init__(
        self,
        routers: Mapping[str, Score | str],
        threshold: float = 0.5,
        capacity: float | None = None,
        adapters: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ):
        if capacity is not None and not 0 < capacity <= 1:
            raise ConfigError(f"capacity is a share of the tokens in (0, 1], not {capacity}")
        for site, router in routers.items():
            if isinstance(router, str) and (router not in routers or isinstance(routers[router], str)):
                raise ConfigError(f"{site} shares the decision of {router!r}, which has no router of its own")
        self.routers, self.adapters = dict(routers), dict(adapters or {})
        self.threshold, self.capacity = threshold, capacity
        self._tables = TableCache()
        self.reset()

    def fresh(self) -> Routed:
        """The same routers, which are not copied, without memory."""
        return type(self)(self.routers, self.threshold, self.capacity, self.adapters)

    def reset(self) -> None:
        """Forget the last call."""
        self._decided: dict[str, torch.Tensor] = {}

    def decide(self, call: Call) -> GateTable:
        """Routed sites, nothing else."""
        routed = frozenset(self.routers).intersection(call.names)
        return self._tables.get(call.sites, lambda: GateTable.of(call.names, routed=routed, measures=False))

    @torch.no_grad()
    def route(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor:
        """The tokens with a high score."""
        router = self.routers[site]
        if isinstance(router, str):
            return self._decided[router]
        scores = router(stream)
        scores = scores.squeeze(-1) if scores.dim() == stream.dim() else scores
        runs = scores > self.threshold
        if self.capacity is not None and call.phase == "prefill":
            kept = scores.topk(max(1, math.floor(self.capacity * scores.shape[1])), dim=1).indices
            runs = torch.zeros_like(runs).scatter_(1, kept, True)
        self._decided[site] = runs
        return runs

    @torch.no_grad()
    def instead(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor | None:
        """The adapter's output."""
        adapter = self.adapters.get(site)
        return None if adapter is None else adapter(stream)
