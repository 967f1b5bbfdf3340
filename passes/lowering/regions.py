"""Distinct regions of a program: what they do, and whether Inductor has a part in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from skipc.kernels.blocks import SUBLAYERS
from skipc.passes.dataflow import Dataflow
from skipc.passes.lowering.inductor import Compiled
from skipc.passes.ops import HEAVY, VIEWS, op_name, tensor, written_arguments
from torch import fx

from skipc.ir.program import Input, KernelCall, RegionInfo, Result

_FREE = VIEWS | frozenset(["getitem", "expand", "transpose", "permute", "size", "add_", "arange", "add", "to", "sub"])


@dataclass
class Region:
    """A distinct region: its graph and, once compiled, its function. ``rare``: it is called in few sessions.
    ``measures``: its last result are moments of the stream around it. ``predicated``: see :class:`RegionInfo`."""

    name: str
    gm: fx.GraphModule
    symbols: list[sympy.Symbol]
    calls: int = 0
    guards: list[Any] = field(default_factory=list)
    function: Compiled | None = None
    seconds: float = 0.0
    rare: bool = False
    measures: bool = False
    predicated: KernelCall | None = None

    @cached_property
    def interpreted(self) -> bool:
        """Run as it is, without Inductor: because it does so little that calling Inductor's code would cost more (views
        and counters, kernels that are whole sublayers), or because it does little and hardly anyone will call it, or
        because it writes to an input that another input overlaps (AOTAutograd would need to know how the two were made,
        which a region's inputs do not tell)."""
        nodes = [n for n in self.gm.graph.nodes if n.op in ("call_function", "call_method")]
        if self.rare and not any(op_name(n) in HEAVY for n in nodes):
            return True
        if len(nodes) <= 4 and all(op_name(n) in _FREE or n.target in SUBLAYERS for n in nodes):
            return True
        flow = Dataflow(self.gm.graph)
        owners = Counter(s for n in flow.nodes if n.op == "placeholder" for s in flow.storages[n])
        return any(owners[s] > 1 for s in flow.written)

    def info(self) -> RegionInfo:
        """The record for reports."""
        count = sum(1 for n in self.gm.graph.nodes if n.op in ("call_function", "call_method"))
        kernels = kernel_calls(self.gm.graph)
        return RegionInfo(
            self.name, count, self.calls, not self.interpreted, self.seconds, kernels, predicated=self.predicated
        )


def kernel_calls(graph: fx.Graph) -> tuple[KernelCall, ...]:
    """What ``graph`` does, if that is calling sublayer kernels, each of which may read what earlier ones made and the
    last of which makes its result, and counting. Otherwise nothing."""
    places: dict[fx.Node, Input | Result] = {}
    calls: list[KernelCall] = []
    result: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            places[node] = Input(len(places))
        elif node.op == "output":
            if list(node.args[0]) != ([result] if result is not None else []):
                return ()
        elif any(n not in places for n in node.all_input_nodes):
            return ()
        elif node.target in SUBLAYERS:
            calls.append(KernelCall(node.target._opname, _as_tuples(node.args, places)))
            if tensor(node) is not None:
                if result is not None and result not in node.all_input_nodes:
                    return ()
                result, places[node] = node, Result(len(calls) - 1)
        elif op_name(node) == "add_" and isinstance(node.args[1], int) and not node.kwargs and not node.users:
            value = tensor(node.args[0])
            if value is None or value.dtype != torch.int64 or value.dim():
                return ()
            calls.append(KernelCall("count", _as_tuples(node.args, places)))
        else:
            return ()
    return tuple(calls)


def _as_tuples(value: Any, places: dict[fx.Node, Input | Result]) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_tuples(v, places) for v in value)
    return places[value] if isinstance(value, fx.Node) else value


def as_it_is(gm: fx.GraphModule) -> Compiled:
    """``gm`` without Inductor. What custom operations write is noted, as torch notes what its own write."""
    forward = gm.forward
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    writers = [n for n in gm.graph.nodes if n.target in SUBLAYERS]
    written = [i for i, n in enumerate(inputs) if any(n in written_arguments(w) for w in writers)]
    if not written:
        return lambda arguments: forward(*arguments)

    def call(arguments: list[Any]) -> Any:
        torch._C._increment_version([arguments[i] for i in written])
        return forward(*arguments)

    return call
