"""Fall back to running everything where gates cost more than they save."""

from __future__ import annotations

import torch
from skipc.runtime.gating import Observation
from skipc.runtime.policies.base import Call, Policy, TableCache

from skipc.ir.errors import ConfigError
from skipc.ir.gating import GateTable


class Worthwhile(Policy):
    """Another policy, as long as it skips something: after a window of decode steps in which it skipped too little, all
    sites run for a while, without gates, and then it gets another chance. It judges by what was skipped, not by a
    clock, so a request takes the same route every time.

    Args:
        policy: the other policy. Of what runs while it pauses it sees nothing.
        share: of the sites of a step, which must be skipped in the mean. Open gates cost up to 2 % of a step
            (docs/benchmarks.md), and sites differ in what they take.
        window: decode steps after which it is judged.
        pause: decode steps for which everything runs.
    """

    only_grows = False

    def __init__(self, policy: Policy, share: float = 0.03, window: int = 16, pause: int = 128):
        if window < 1 or pause < 1 or not 0 <= share <= 1:
            raise ConfigError(f"window and pause are 1 or more, share is in [0, 1]: {window}, {pause}, {share}")
        self.policy, self.share, self.window, self.pause = policy, share, window, pause
        self._tables = TableCache()
        self.reset()

    def fresh(self) -> Worthwhile:
        """The same, around a policy without memory."""
        return type(self)(self.policy.fresh(), self.share, self.window, self.pause)

    def reset(self) -> None:
        """A new request."""
        self.policy.reset()
        self._seen: list[float] = []
        self._paused = 0

    def decide(self, call: Call) -> GateTable:
        """What the other policy says, or nothing."""
        if call.phase == "decode" and self._paused:
            return self._tables.get(call.sites, lambda: GateTable.of(call.names, measures=False))
        return self.policy.decide(call)

    def route(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor:
        """See :meth:`Policy.route`."""
        return self.policy.route(call, site, stream)

    def instead(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor | None:
        """See :meth:`Policy.instead`."""
        return self.policy.instead(call, site, stream)

    def observe(self, call: Call, seen: Observation) -> None:
        """Judge the policy at the end of a window."""
        if call.phase == "decode" and self._paused:
            self._paused -= 1
            return
        self.policy.observe(call, seen)
        if call.phase != "decode":
            return
        self._seen.append(len(seen.skipped) / max(1, len(call.sites)))
        if len(self._seen) == self.window:
            if sum(self._seen) / self.window < self.share:
                self._paused = self.pause
            self._seen = []
