"""Steps captured as CUDA graphs: one for each way to run a program on inputs that stay.

A step of a small batch is some hundred launches of a few microseconds each, which a host cannot keep up with; a graph
is one. What was decided on the host when a graph was captured stays decided in it, so there is one for each choice of
arms, and one more for steps in which nobody wants adapters. What tensors hold (tokens, caches, tables of adapters, the
contents of slots) is read at each replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from skipc.kernels.gpu.kernel import recorded
from skipc.kernels.gpu.workspace import own_counters
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger("skipc")
Outputs = tuple[Any, ...]
Step = Callable[[], Outputs]
_MOST = 64  # graphs of a program


class Captured:
    """A step on a GPU, captured.

    Attributes:
        launches: of skipc's own kernels in it, in order.
    """

    def __init__(self, step: Step, device: torch.device, pool: Any):
        self._graph = torch.cuda.CUDAGraph()
        with (
            recorded(arguments=False) as launches,
            own_counters(device) as self._counters,
            torch.cuda.graph(self._graph, pool=pool),
        ):
            self._outputs = step()
        self.launches = tuple(launches)
        self.pool = self._graph.pool()

    def __call__(self) -> Outputs:
        """Do it again; its outputs are where they were."""
        self._graph.replay()
        return self._outputs


class Imitated:
    """The same for tensors that are only taken to be on a GPU. A replay does the step and refuses what a graph could
    not hold: that the host reads a number off the device."""

    pool = None

    def __init__(self, step: Step):
        self._step = step
        self._outputs: Outputs | None = None
        self.launches: tuple[Any, ...] = ()

    def __call__(self) -> Outputs:
        with recorded(arguments=False) as launches, _NoHostReads():
            made = self._step()
        self.launches = tuple(launches)
        if self._outputs is None:
            self._outputs = tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in made)
            return self._outputs
        for old, new in zip(self._outputs, made, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(new)
        return self._outputs


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"a step that is captured as a graph waits for the device: {func}")
        return func(*args, **(kwargs or {}))


class Graphs:
    """Graphs of one program on inputs that stay. They share their memory: only one runs at a time, and what it returns
    is valid until the next.

    Args:
        inputs: whose addresses are in the graphs.
    """

    def __init__(self, inputs: Sequence[Any]):
        self._inputs = [t for t in inputs if isinstance(t, torch.Tensor)]
        self._addresses = self._read()
        self._captured: dict[Hashable, Captured | Imitated] = {}
        self._pool: Any = None
        self._device = self._inputs[0].device
        self.refused: str | None = None  # why nothing is captured, if so

    def _read(self) -> list[int]:
        return [t.data_ptr() for t in self._inputs]

    def check(self) -> None:
        """Forget all graphs if an input has moved since they were captured."""
        now = self._read()
        if now != self._addresses:
            self._captured.clear()
            self._addresses = now

    def __call__(self, key: Hashable, step: Step) -> Outputs:
        """What ``step`` returns, in tensors that the next call may overwrite. ``step`` has run before, outside any
        graph, and does the same each time."""
        if self.refused is not None:
            return step()
        found = self._captured.get(key)
        if found is None:
            if len(self._captured) >= _MOST:
                self._captured.pop(next(iter(self._captured)))
            try:
                found = self._captured[key] = self._capture(step)
            except RuntimeError as error:
                self.refused = str(error).partition("\n")[0]
                log.warning("steps are not captured as CUDA graphs, but run one launch at a time: %s", self.refused)
                return step()
        return found()

    def captured(self, key: Hashable) -> Captured | Imitated | None:
        """The graph under this key, if there is one."""
        return self._captured.get(key)

    def _capture(self, step: Step) -> Captured | Imitated:
        if self._device.type != "cuda":
            return Imitated(step)
        made = Captured(step, self._device, self._pool)
        self._pool = made.pool
        return made
