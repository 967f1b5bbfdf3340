"""Early exit by saturation of the similarity: MuE (arXiv 2211.11152)."""

from __future__ import annotations

import math

from skipc.runtime.policies.base import Call, Policy, TableCache, layers_of

from skipc.ir.errors import ConfigError
from skipc.ir.gating import BatchRule, GateTable


class EarlyExit(Policy):
    """Leave a stream once a whole layer hardly changes it: all sites behind are skipped, and what follows (the head, or
    the decoder's cross-attention) takes the stream as it is. Encoder and decoder leave at depths of their own.
    Attentions that are left out still write keys and values of the stream they are given, so that later tokens may go
    deeper.

    Args:
        threshold: of the cosine between the outputs of one layer and the next.
        minimum: layers that always run.
        decay: how the threshold falls while decoding, as in CALM (arXiv 2207.07061): at step t of ``horizon`` it is
            ``decay * threshold + (1 - decay) * exp(-temperature * t / horizon)``, stricter early; 1 keeps it constant.
        temperature, horizon: see ``decay``.
        rule: when the tokens of a call, together, have reached the threshold. The paper does not say; the default is
            the mean over valid tokens.
        phases: when to exit. An exit in prefill holds for all tokens of the prompt.
    """

    def __init__(
        self,
        threshold: float,
        minimum: int = 1,
        decay: float = 1.0,
        temperature: float = 4.0,
        horizon: int = 256,
        rule: BatchRule = "mean",
        phases: tuple[str, ...] = ("prefill", "decode"),
    ):
        if minimum < 1 or horizon < 1 or not 0 <= decay <= 1:
            raise ConfigError(f"minimum and horizon are 1 or more, decay is in [0, 1]: {minimum}, {horizon}, {decay}")
        self.threshold, self.minimum, self.rule, self.phases = threshold, minimum, rule, frozenset(phases)
        self.decay, self.temperature, self.horizon = decay, temperature, horizon
        self._tables = TableCache()
        self.reset()

    def reset(self) -> None:
        """A new request."""
        self._decoded = 0

    def threshold_at(self, step: int) -> float:
        """The threshold of decode step ``step``."""
        late = math.exp(-self.temperature * step / self.horizon)
        return self.decay * self.threshold + (1 - self.decay) * late

    def decide(self, call: Call) -> GateTable:
        """A threshold at each layer's last site."""
        threshold = self.threshold_at(self._decoded) if call.phase == "decode" else self.threshold
        active = call.phase in self.phases

        def make() -> GateTable:
            closes: dict[str, list[str]] = {}
            since: dict[str, str] = {}
            layers = layers_of(call.sites)
            for (stream, layer), sites in layers.items() if active else ():
                if layer + 1 < self.minimum:
                    continue
                last = sites[-1].name
                since[last] = sites[0].name
                closes[last] = [
                    s.name for (of, at), later in layers.items() if of == stream and at > layer for s in later
                ]
            thresholds = dict.fromkeys(closes, threshold)
            return GateTable.of(
                call.names, threshold=thresholds, closes=closes, since=since, rule=self.rule, measures=False
            )

        return self._tables.get((call.sites, active, threshold), make)

    def observe(self, call: Call, seen: object) -> None:
        """Count steps."""
        self._decoded += call.phase == "decode"
