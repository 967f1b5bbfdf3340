"""FFN-SkipLLM (arXiv 2404.03865)."""

from __future__ import annotations

from skipc.runtime.policies.base import Call, Policy, TableCache, is_feed_forward

from skipc.ir.errors import ConfigError
from skipc.ir.gating import BatchRule, GateTable


class FFNSkip(Policy):
    """Skip MLPs of the middle layers once the stream hardly changes any more, judged anew for each decoded token: an
    MLP whose similarity reaches the threshold closes the gates of those behind it. Attentions always run, so no cache
    has a hole. The paper counts on similarities that rise with depth; calibrate before relying on it.

    Args:
        threshold: of the cosine.
        cold_start: layers at the bottom whose MLPs always run.
        cold_end: layers at the top whose MLPs always run.
        warmup: tokens at the start of a request that run in full, prompt included.
        stride: how many MLPs one decision skips, before one runs and is judged again; None: all that are left.
        rule: when the rows of a batch, together, have reached the threshold.
    """

    only_grows = True  # of attentions it skips none

    def __init__(
        self,
        threshold: float,
        cold_start: int = 2,
        cold_end: int = 2,
        warmup: int = 32,
        stride: int | None = None,
        rule: BatchRule = "all",
    ):
        if stride is not None and stride < 1:
            raise ConfigError(f"stride must be 1 or more, not {stride}")
        self.threshold, self.cold_start, self.cold_end = threshold, cold_start, cold_end
        self.warmup, self.stride, self.rule = warmup, stride, rule
        self._tables = TableCache()

    def decide(self, call: Call) -> GateTable:
        """Thresholds at the MLPs of the middle layers."""
        active = call.phase == "decode" and call.position >= self.warmup

        def make() -> GateTable:
            closes: dict[str, list[str]] = {}
            for stream in sorted({site.stream for site in call.sites}) if active else ():
                depth = max(site.layer for site in call.sites if site.stream == stream) + 1
                middle = [
                    site.name
                    for site in call.sites
                    if site.stream == stream
                    and is_feed_forward(site)
                    and self.cold_start <= site.layer < depth - self.cold_end
                ]
                reach = len(middle) if self.stride is None else self.stride
                closes |= {name: middle[i + 1 : i + 1 + reach] for i, name in enumerate(middle)}
            threshold = dict.fromkeys(closes, self.threshold)
            return GateTable.of(call.names, threshold=threshold, closes=closes, rule=self.rule, measures=False)

        return self._tables.get((call.sites, active), make)
