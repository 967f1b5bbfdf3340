"""Dependences of a graph with in-place writes: who must run before whom, and who depends on whose value.

FX edges alone do not say it: a static KV cache is written by ``index_copy_`` and then read through the *placeholder*,
so that the read is no user of the write. Storage identity of the fake tensors closes the gap: views share the storage
of their base, hence every access to a written storage can be put in order.

==========  ==================================================================
edge        meaning
==========  ==================================================================
data        FX argument, but for sizes of tensors, which are known before their values
read        a write, and a later access of the same storage (true dependence)
order       an access, and a later write of the same storage
==========  ==================================================================
"""

from __future__ import annotations

from collections import defaultdict

import torch
from skipc.passes.fx_edit import positions
from skipc.passes.ops import op_name, tensors, written_arguments
from torch import fx


def _storage(value: torch.Tensor) -> int:
    """Identity of the storage behind a fake tensor; inside ``vmap``, that of the tensor it wraps."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value.untyped_storage()._cdata


def _reads_size(node: fx.Node) -> bool:
    """True for ``x.size(0)``, ``x.shape`` and the like."""
    if op_name(node) == "getattr":
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return op_name(node) in ("size", "sym_size", "dim", "numel", "stride", "sym_numel")


class Dataflow:
    """Dependences of one graph. Build it anew after an edit.

    Attributes:
        order: position of each node.
        sources: for each node, those whose values it depends on (data and read edges).
        users: the inverse of ``sources``.
        before: for each node, those that it must not overtake without depending on their values (order edges).
        writes: for each node, the storages that it writes.
        written: all storages written anywhere.
    """

    def __init__(self, graph: fx.Graph):
        self.nodes = list(graph.nodes)
        self.order = positions(self.nodes)
        self.storages = {n: frozenset(map(_storage, tensors(n))) for n in self.nodes}
        self.writes: dict[fx.Node, frozenset[int]] = {}
        for node in self.nodes:
            if args := written_arguments(node):
                self.writes[node] = frozenset().union(*(self.storages[a] for a in args))
        self.written = frozenset().union(*self.writes.values()) if self.writes else frozenset()
        self.input_storages = frozenset().union(
            *(self.storages[n] for n in self.nodes if n.op in ("placeholder", "get_attr")), frozenset()
        )
        self.sources: dict[fx.Node, set[fx.Node]] = {n: set(n.all_input_nodes) for n in self.nodes}
        self.before: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node in self.nodes:
            if _reads_size(node):  # known before the value is: not a dependence, but it cannot run earlier either
                self.before[node].update(self.sources[node])
                self.sources[node] = set()
        self._order_accesses()
        self.users: dict[fx.Node, set[fx.Node]] = {n: set() for n in self.nodes}
        for node, sources in self.sources.items():
            for source in sources:
                self.users[source].add(node)
        self._ancestors: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 0
            for source in self.sources[node]:
                bits |= self._ancestors[source] | (1 << self.order[source])
            self._ancestors[node] = bits

    def _order_accesses(self) -> None:
        last_write: dict[int, fx.Node] = {}
        readers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            touched = (
                frozenset().union(*(self.storages[a] for a in node.all_input_nodes)) if node.args or node.kwargs else ()
            )
            for storage in self.written.intersection(touched):
                if storage in last_write:
                    self.sources[node].add(last_write[storage])
                if storage in self.writes.get(node, ()):
                    self.before[node].update(readers[storage])
                    readers[storage].clear()
                    last_write[storage] = node
                else:
                    readers[storage].append(node)

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """True if the value of ``node`` depends on that of ``on``."""
        return bool(self._ancestors[node] >> self.order[on] & 1)

    def between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        """Nodes on the paths from ``start`` (left out) to ``end`` (included), in order."""
        lo, hi = self.order[start], self.order[end]
        mask = self._ancestors[end]
        return [
            n
            for i, n in enumerate(self.nodes[lo + 1 : hi + 1], lo + 1)
            if (mask >> i & 1 or i == hi) and self._ancestors[n] >> lo & 1
        ]

    def ancestors(self, node: fx.Node) -> int:
        """The nodes that ``node`` depends on, as a bit set over positions."""
        return self._ancestors[node]

    def is_effect(self, node: fx.Node) -> bool:
        """True if ``node`` writes to an input of the graph, so that the write outlives the call."""
        return bool(self.writes.get(node, frozenset()) & self.input_storages)
