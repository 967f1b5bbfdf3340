"""How the adapters of a session run: beside the weights, or merged into a copy of them; and which of these takes the
least time.

* ``unmerged``: each row adds what its adapters say. Rows that want none have the model's own bits.
* ``merged``: all rows want the same, and run with weights that it was merged into, as fast as the model alone.
* ``mixture`` (V-LoRA, arXiv 2411.00915): one adapter is merged, and rows that want something else take it away again
  beside adding their own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from skipc.ir.adapters import AdaptedLayer
from skipc.kernels import native
from skipc.kernels.device import on_cpu, wait_for
from skipc.kernels.library import NATIVE

Mode = Literal["unmerged", "merged", "mixture", "auto"]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Costs:
    """What adapters take, measured on the machine at hand, in seconds.

    Attributes:
        adapter: of a step, for each adapter that some row wants.
        row: of a step, for each adapter of each row.
        switch: of merging.
    """

    adapter: float
    row: float
    switch: float

    def step(self, rows: Iterable[Mapping[Key, float]]) -> float:
        """What rows add to a step that want this beside their weights."""
        wanted = Counter(key for row in rows for key in row)
        return len(wanted) * self.adapter + wanted.total() * self.row


@dataclass(frozen=True)
class Decision:
    """How a session runs its adapters.

    Attributes:
        mode: see above.
        merged: what is merged, as text; None if nothing.
        switches: whether it has to be merged first.
        calls: that the session was expected to make.
        seconds: for each mode that is possible, what adapters add to all of these. Empty if nothing was measured.
    """

    mode: Mode
    merged: str | None = None
    switches: bool = False
    calls: int = 0
    seconds: Mapping[str, float] | None = None

    def __str__(self) -> str:
        about = "" if self.merged is None else f" with {self.merged} {'to be merged' if self.switches else 'in place'}"
        if not self.seconds:
            return f"{self.mode}{about}"
        times = ", ".join(f"{mode} {seconds * 1e3:.1f} ms" for mode, seconds in self.seconds.items())
        return f"{self.mode}{about} (adapters in {self.calls} calls: {times})"


def majority(rows: Sequence[Mapping[Key, float]]) -> Mapping[Key, float] | None:
    """What most rows want that want something; the first, of equals."""
    counted = Counter(frozenset(row.items()) for row in rows if row)
    return dict(counted.most_common(1)[0][0]) if counted else None


def mixture(rows: Sequence[Mapping[Key, float]], merged: Mapping[Key, float]) -> list[dict[Key, float]]:
    """What rows want beside weights that have ``merged`` in them."""
    away = {key: -factor for key, factor in merged.items()}
    return [
        {}
        if dict(row) == dict(merged)
        else {k: f for k in {**away, **row} if (f := away.get(k, 0.0) + row.get(k, 0.0)) != 0}
        for row in rows
    ]


_ROWS = 8


def measure(layers: Sequence[tuple[torch.Tensor, AdaptedLayer]], slot: int, switch: float) -> Costs:
    """Costs of steps of some rows, by running all layers with nobody, one of them, and all of them wanting what a slot
    holds.

    Args:
        layers: weights ``[out, in]`` with their adapters.
        slot: that some adapter lies in.
        switch: seconds of merging.
    """
    device = layers[0][0].device
    if on_cpu(layers[0][0]):
        native.available()  # which programs run, if it is
    generator = torch.Generator().manual_seed(0)
    inputs = {(w.shape[1], w.dtype): torch.randn(_ROWS, w.shape[1], generator=generator).to(w) for w, _ in layers}
    gates = torch.ones(2 + _ROWS, device=device)

    def run(wanting: int) -> float:
        table = torch.tensor([_ROWS, 1, *[slot] * wanting, *[-1] * (_ROWS - wanting)], device=device)
        wait_for(device)()
        start = time.perf_counter()
        for weight, layer in layers:
            x, lora = inputs[weight.shape[1], weight.dtype], [*layer.operands, table, gates]
            if weight.dtype in NATIVE and on_cpu(weight):
                torch.ops.skipc.skinny_linear(x, [weight], [None], None, 0.0, None, lora)
            else:
                torch.ops.skipc.lora_linear(x, weight, None, lora)
        wait_for(device)()
        return time.perf_counter() - start

    times: dict[int, list[float]] = {0: [], 1: [], _ROWS: []}
    for turn in range(10):
        for wanting, found in times.items():
            took = run(wanting)
            if turn > 1:
                found.append(took)
    none, one, every = map(min, times.values())
    row = max(0.0, every - one) / (_ROWS - 1)
    return Costs(max(0.0, one - none - row), row, switch)
