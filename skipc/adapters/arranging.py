"""Who decides how the adapters of sessions run, and keeps what is merged for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from skipc.adapters.adapter import layer_of
from skipc.adapters.merged import MergedWeights, seconds_to_merge, unmergeable
from skipc.adapters.modes import Costs, Decision, Mode, majority, measure, mixture
from skipc.adapters.slots import Loaded, Wishes, text_of
from skipc.ir.adapters import AdaptedLayer
from skipc.ir.errors import AdapterError
from skipc.ir.plan import Plan
from skipc.kernels.lora import MOST


@dataclass(frozen=True)
class Arranged:
    """How adapters run.

    Attributes:
        wishes: what rows want beside their weights.
        decision: see :class:`Decision`.
        plan: with weights that some are merged into; None for the model's own.
    """

    wishes: Wishes
    decision: Decision = Decision("unmerged")  # noqa: RUF009
    plan: Plan | None = None


class Arranger:
    """Of one bank; see :class:`skipc.AdapterBank` for ``when_full``, ``timeout`` and ``calls``.

    Args:
        model: gives the model.
        layers: of the bank.
        changed: held while something is decided, and notified when a session ends.
    """

    def __init__(
        self,
        model: Callable[[], torch.nn.Module],
        layers: Mapping[str, AdaptedLayer],
        changed: threading.Condition,
        when_full: Literal["refuse", "wait"],
        timeout: float,
        calls: int,
    ):
        self._model, self.layers, self._changed = model, layers, changed
        self.when_full, self.timeout, self.calls = when_full, timeout, calls
        self._merged: MergedWeights | None = None  # once a session asked for it
        self._costs: Costs | None = None

    def arrange(self, rows: Wishes, mode: Mode) -> Arranged:
        """How adapters that lie in slots run; what they are merged into is kept until :meth:`end`.

        Raises:
            AdapterError: for a mode that does not go with such rows, or with what other sessions have merged.
        """
        most = majority(rows)
        if mode == "unmerged" or most is None:
            return Arranged(rows)
        if mode == "merged" and any(row != most for row in rows):
            raise AdapterError("mode='merged' is for rows that all want the same")
        with self._changed:
            if mode == "auto":
                decision, most = self.cheapest(rows)
                if most is None:
                    return Arranged(rows, decision)
            else:
                switches = self._merged is None or not self._merged.holds(self._model(), most)
                decision = Decision(mode, text_of(most), switches)
            return Arranged(mixture(rows, most), decision, self._merge(most))

    def end(self, arranged: Arranged) -> None:
        """A session that ran so is over."""
        if arranged.plan is not None and self._merged is not None:
            self._merged.users -= 1

    def _merge(self, content: Mapping[Loaded, float]) -> Plan:
        """A plan with this merged, for one session more."""
        model, deadline = self._model(), time.monotonic() + self.timeout
        if self._merged is None:
            self._merged = MergedWeights(model, self.layers)
        merged = self._merged
        while not merged.holds(model, content):
            if not merged.users:
                merged.write(model, content, {loaded: loaded.place for loaded in content})
            elif self.when_full == "refuse" or not self._changed.wait(max(0.0, deadline - time.monotonic())):
                raise AdapterError(f"{merged.users} open session(s) run with {text_of(merged.content)} merged")
        merged.users += 1
        return merged.plan

    def cheapest(self, rows: Wishes) -> tuple[Decision, Mapping[Loaded, float] | None]:
        """What takes the least time now, and what has to be merged for it. Measures costs when it is called for the
        first time."""
        most = majority(rows)
        if most is None or unmergeable(self._model(), self.layers.values()) is not None:
            return Decision("unmerged"), None
        model, costs, merged = self._model(), self._measured(next(iter(most))), self._merged
        ways: dict[Mode, tuple[float, Mapping[Loaded, float] | None, bool]] = {}
        ways["unmerged"] = self.calls * costs.step(rows), None, False
        candidates: list[Mapping[Loaded, float]] = [most]
        if merged is not None and merged.content and merged.content.keys() <= {k for row in rows for k in row}:
            candidates.append(merged.content)
        for content in candidates:
            switches = merged is None or not merged.holds(model, content)
            left = mixture(rows, content)
            if (switches and merged is not None and merged.users) or max(map(len, left)) > MOST:
                continue
            mode: Mode = "mixture" if any(left) else "merged"
            took = self.calls * costs.step(left) + switches * costs.switch
            if mode not in ways or took < ways[mode][0]:
                ways[mode] = took, content, switches
        best = min(ways, key=lambda way: ways[way][0])
        _, chosen, switches = ways[best]
        seconds: dict[str, float] = {way: found[0] for way, found in ways.items()}
        merged_text = text_of(chosen) if chosen is not None else None
        return Decision(best, merged_text, switches, self.calls, seconds), chosen

    def _measured(self, loaded: Loaded) -> Costs:
        """What adapters take here; measured when it is asked for the first time."""
        model = self._model()
        if self._costs is None:
            layers = [(layer_of(model, layer.path, "bank")[0], layer) for layer in self.layers.values()]
            turned = [(w.detach().T.contiguous() if layer.transposed else w.detach(), layer) for w, layer in layers]
            self._costs = measure(turned, loaded.place, seconds_to_merge(model, self.layers, loaded.place))
        if self._merged is not None and self._merged.seconds is not None:
            self._costs = replace(self._costs, switch=self._merged.seconds)
        return self._costs
