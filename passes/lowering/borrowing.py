"""The KV policy ``copy``: a skipped attention keeps, at the places of its tokens, what a lower one has there.

A lower one that was skipped, too, has copied: so the rows are those of the nearest attention below that ran, as in the
released code of Unified Layer Skipping (arXiv 2404.06954) and in early exits that copy states.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import PARTS, VIEWS, is_parameter_like, op_name, same_sizes, tensor
from skipc.passes.partition import Slot
from torch import fx
from torch._prims_common import is_contiguous_or_false

_IN_PLACE = frozenset(["index_copy_", "index_put_", "setitem", "copy_"])


@dataclass(frozen=True)
class Keeping:
    """How an attention keeps its new keys, or values.

    Attributes:
        node: the write to a cache in place, or what becomes of a cache that grows.
        source: the new rows, an argument of ``node`` (or ``node`` itself, where it is all that is kept).
        cache: where the rows are found when ``node`` has run.
        dim: of a cache that grows, the dimension along which it does.
    """

    node: fx.Node
    source: fx.Node
    cache: fx.Node
    dim: int | None = None

    def like(self, other: Keeping) -> bool:
        """Whether rows of one fit into the other. (Lengths of two caches that vary are symbols of their own.)"""
        mine, yours = ((tensor(k.source), tensor(k.cache)) for k in (self, other))
        if op_name(self.node) != op_name(other.node) or self.dim != other.dim:
            return False
        return all(_fit(a, b) for a, b in zip(mine, yours, strict=True))

    def new_alone(self, flow: Dataflow, slot: Slot) -> bool:
        """Whether the source is made of the call's tokens alone (a sliding window is made of older rows, too)."""
        if self.cache is not self.node:
            return not flow.depends(self.source, self.cache)
        value = tensor(self.source)
        return value is not None and not any(_holds_rows(n, value.dim()) for n in _made_of(flow, self.source, slot))


@dataclass(frozen=True)
class Borrowed:
    """What a skipped attention keeps instead: rows of ``lower``."""

    kept: Keeping
    lower: Keeping
    entry: fx.Node  # the stream before the attention

    @property
    def arguments(self) -> list[fx.Node]:
        """What :attr:`kept` reads then, in the place of its own rows."""
        others = [n for n in self.kept.node.all_input_nodes if n is not self.kept.source] if self._places else []
        size = [self.entry] if self.kept.dim is not None and not isinstance(self._count, int) else []
        return [*others, self.lower.cache, *size]

    @property
    def _places(self) -> bool:
        return self.kept.node is not self.kept.source

    @property
    def _count(self) -> Any:
        return self.kept.source.meta["example_value"].shape[self.kept.dim]

    def emit(self, graph: fx.Graph, lift: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Append :attr:`kept` with the other rows to ``graph``."""
        node, cache = self.kept.node, lift(self.lower.cache)
        if not self._places:
            return graph.call_method("clone", (cache,))
        rows = self._rows(graph, lift, cache)
        rows.meta = dict(self.kept.source.meta)
        return graph.node_copy(node, lambda n: rows if n is self.kept.source else lift(n))

    def _rows(self, graph: fx.Graph, lift: Callable[[fx.Node], fx.Node], cache: fx.Node) -> fx.Node:
        node, name = self.kept.node, op_name(self.kept.node)
        lifted: Any = fx.map_arg(node.args, lambda n: n if n is self.kept.source else lift(n))
        if self.kept.dim is not None:
            count: Any = self._count
            if not isinstance(count, int):
                count = graph.call_method("size", (lift(self.entry), _dimension(self.entry, count)))
            last = graph.call_function(operator.neg, (count,)) if isinstance(count, fx.Node) else -count
            return graph.call_function(operator.getitem, (cache, (*[slice(None)] * self.kept.dim, slice(last, None))))
        if name == "index_copy_":
            return graph.call_function(torch.index_select, (cache, lifted[1], lifted[2]))
        if name == "copy_":
            return self._view_of(graph, lift, cache, node.args[0])
        index = tuple(slice(None) if i is None else i for i in lifted[1]) if name == "index_put_" else lifted[1]
        return graph.call_function(operator.getitem, (cache, index))

    def _view_of(self, graph: fx.Graph, lift: Callable[[fx.Node], fx.Node], cache: fx.Node, view: Any) -> fx.Node:
        if view is self.kept.cache:
            return cache
        base = self._view_of(graph, lift, cache, view.args[0])
        made = graph.node_copy(view, lambda n: base if n is view.args[0] else lift(n))
        made.meta = dict(view.meta)
        return made


def keeping(flow: Dataflow, slot: Slot, node: fx.Node) -> Keeping | None:
    """How ``node`` keeps rows; None if it is of no known form, or keeps what was made of older rows, too."""
    found = _written(slot, node) if node in flow.writes else _grown(slot, node)
    if found is None or not found.new_alone(flow, slot):
        return None
    return found


def _written(slot: Slot, node: fx.Node) -> Keeping | None:
    name, arguments = op_name(node), list[Any](node.args)
    if name not in _IN_PLACE or node.kwargs or not arguments or not isinstance(arguments[-1], fx.Node):
        return None
    cache, source = arguments[0], arguments[-1]
    while name == "copy_" and cache in slot.nodes and op_name(cache) in (VIEWS | PARTS) and not cache.kwargs:
        cache = cache.args[0]
    counted = {"copy_": 2, "index_copy_": 4}.get(name, 3)
    if not isinstance(cache, fx.Node) or len(arguments) != counted:
        return None
    if cache.op != "placeholder" and not any(u.op == "output" for u in cache.users):  # made at the first call
        return None
    return Keeping(node, source, cache)


def _grown(slot: Slot, node: fx.Node) -> Keeping | None:
    arguments, value = list[Any](node.args), tensor(node)
    if op_name(node) in ("cat", "concat", "concatenate") and arguments and len(arguments[0]) == 2:
        before, source = arguments[0]
        dim = node.kwargs.get("dim", arguments[1] if len(arguments) > 1 else 0)
        if isinstance(dim, int) and value is not None and source in slot.nodes and before not in slot.nodes:
            dim %= value.dim()
            count = source.meta["example_value"].shape[dim]
            known = isinstance(count, int) or _dimension(slot.entry, count) is not None
            return Keeping(node, source, node, dim) if known else None
    return Keeping(node, node, node) if value is not None and is_contiguous_or_false(value) else None


def _dimension(stream: fx.Node | None, size: Any) -> int | None:
    """The dimension of ``stream`` that is ``size`` long."""
    sizes = tensor(stream)
    return next((d for d, n in enumerate(sizes.shape) if same_sizes([n], [size])), None) if sizes is not None else None


def _fit(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    sizes = [(n, m) for n, m in zip(a.shape, b.shape, strict=True) if isinstance(n, int) and isinstance(m, int)]
    return all(n == m for n, m in sizes)


def _made_of(flow: Dataflow, node: fx.Node, slot: Slot) -> set[fx.Node]:
    """Inputs of the graph that ``node`` is made of, other than through the stream."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen and n is not slot.entry:
            seen.add(n)
            stack += flow.sources[n]
    return {n for n in seen if n.op == "placeholder"}


def _holds_rows(node: fx.Node, rank: int) -> bool:
    """True for an input that may be a cache, by its rank (rotary tables have less than the keys that they turn)."""
    value = tensor(node)
    if value is None or is_parameter_like(node) or not value.is_floating_point():
        return False
    return value.dim() >= rank and value.numel() != 0
