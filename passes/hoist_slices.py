"""Take the rows that are wanted before the last layers compute them, not after."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import erase_unused, infer, labels_of
from skipc.passes.norms import over_last
from skipc.passes.ops import CASTS, is_add, op_name, same_sizes, tensor
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_UNARY = (CASTS - {"dropout"}) | {"neg", "__neg__", "square", "rsqrt", "sqrt", "exp", "log"}
_ACTIVATIONS = frozenset(["tanh", "sigmoid", "silu", "gelu", "relu"])
_BINARY = frozenset(
    ["add", "__add__", "sub", "__sub__", "mul", "__mul__", "div", "truediv", "__truediv__", "pow", "__pow__"]
)


class HoistSlices(Pass):
    """Move the choice of some tokens' rows (``logits[:, -1]``) above the linear layer that makes them, and above the
    norm and the casts before it. With a vocabulary of 50,000 the head costs as much as two layers, for each token.

    Before::

        %n : f32[2, 7, 64] = rms_norm(%x, (64,), %g, 1e-05)
        %l : f32[2, 7, 128] = linear(%n, %w, None)
        %y : f32[2, 128] = getitem(%l, (slice(None), -1))

    After::

        %s : f32[2, 1, 64] = getitem(%x, (slice(None), slice(-1, None), slice(None)))
        %n : f32[2, 1, 64] = rms_norm(%s, (64,), %g, 1e-05)
        %l : f32[2, 1, 128] = linear(%n, %w, None)
        %y : f32[2, 128] = getitem(%l, (slice(None), 0, slice(None)))

    Leaves alone: choices by tensors or of columns, rows that somebody else reads, what lies above the last residual
    sum.
    """

    name = "hoist_slices"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched = 0
        for node in list(gm.graph.nodes):
            index = _rows_taken(node)
            if index is not None and self._hoist(gm.graph, node, index):
                matched += 1
        return PassResult(matched, matched > 0)

    @staticmethod
    def _hoist(graph: fx.Graph, taken: fx.Node, index: list[Any]) -> bool:
        moved = _computing_rows(graph, taken)
        if not any(op_name(n) == "linear" for n in moved):
            return False
        flow = Dataflow(graph)
        if any(flow.storages[n] & flow.written for m in (*moved, taken) for n in (m, *m.all_input_nodes)):
            return False
        slices = tuple(i if isinstance(i, slice) else slice(i, None if i == -1 else i + 1) for i in index)
        new: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(taken):
            for node in moved:
                for source in node.all_input_nodes:
                    if source not in new and _carries_rows(source, node):
                        new[source] = graph.call_function(operator.getitem, (source, slices))
                        new[source].meta = labels_of(node)
                        infer(new[source])
                new[node] = graph.node_copy(node, lambda n: new.get(n, n))
                new[node].meta = labels_of(node)
                infer(new[node])
            result = new[moved[-1]]
            if not all(isinstance(i, slice) for i in index):
                last = tuple(slice(None) if isinstance(i, slice) else 0 for i in index)
                result = graph.call_function(operator.getitem, (result, last))
                result.meta = labels_of(taken)
                infer(result)
        taken.replace_all_uses_with(result)
        erase_unused(taken)
        return True


def _rows_taken(node: fx.Node) -> list[Any] | None:
    """For each axis the slice or number that ``node`` takes, if it leaves out rows and keeps them whole."""
    source = tensor(node.args[0]) if node.args else None
    if source is None or source.dim() < 2 or tensor(node) is None:
        return None
    index: list[Any] = [slice(None)] * source.dim()
    if node.target is operator.getitem:
        given = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given[at : at + 1] = [slice(None)] * (source.dim() - len(given) + 1)
        if len(given) > source.dim() or not all(map(_is_basic, given)):
            return None
        index[: len(given)] = given
    elif op_name(node) == "select" and len(node.args) == 3 and all(type(a) is int for a in node.args[1:]):
        index[node.args[1]] = node.args[2]  # type: ignore[index]
    elif op_name(node) == "narrow" and len(node.args) == 4 and all(type(a) is int for a in node.args[1:]):
        _, axis, start, length = node.args
        if start < 0:  # type: ignore[operator]
            return None
        index[axis] = slice(start, start + length)  # type: ignore[index, operator]
    else:
        return None
    sizes = iter(tensor(node).shape)  # type: ignore[union-attr]
    fewer = False
    for i, size in zip(index, source.shape, strict=True):
        fewer |= statically_known_true((next(sizes) if isinstance(i, slice) else 1) < size)
    return index if fewer and index[-1] == slice(None) else None


def _is_basic(i: Any) -> bool:
    if isinstance(i, slice):
        return all(p is None or type(p) is int for p in (i.start, i.stop, i.step))
    return type(i) is int


def _computing_rows(graph: fx.Graph, taken: fx.Node) -> list[fx.Node]:
    """What computes the rows that ``taken`` chooses from, row by row and for nobody else, in order."""
    source = taken.args[0]
    rows = tensor(source)
    assert rows is not None
    moved: dict[fx.Node, None] = {}
    for node in reversed(list(graph.nodes)):
        alone = node.users and all(u is taken or u in moved for u in node.users)
        if alone and (node is source or moved) and _is_rowwise(node, rows.shape[:-1]):
            moved[node] = None
    return list(moved)[::-1]


def _is_rowwise(node: fx.Node, leading: Sequence[Any]) -> bool:
    """True if each row of ``node`` is a function of the same row of what it reads."""
    name, made = op_name(node), tensor(node)
    if node.op not in ("call_function", "call_method") or not node.args or made is None:
        return False
    if not same_sizes(made.shape[:-1], leading):
        return False
    inputs = [a for a in node.all_input_nodes if _carries_rows(a, node)]
    sizes = [t.shape[:-1] for t in map(tensor, inputs) if t is not None]
    if len(sizes) != len(inputs) or not all(same_sizes(s, leading) for s in sizes):
        return False
    if len(inputs) == 2:
        return name in _BINARY and not is_add(node)  # a sum of two values is where a sublayer joins the stream
    if len(inputs) != 1 or (node.args[0] is not inputs[0] and name not in _BINARY):
        return False
    if name == "linear":
        return True
    if any(t is None or t.dim() > 1 for t in map(tensor, node.all_input_nodes) if t is not tensor(inputs[0])):
        return False
    if name in ("rms_norm", "layer_norm"):
        shape = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ())
        return isinstance(shape, tuple | list) and len(shape) == 1
    return name in _UNARY | _ACTIVATIONS | _BINARY or (name == "mean" and over_last(node))


def _carries_rows(source: fx.Node, reader: fx.Node) -> bool:
    """True if ``source`` has a row for each row of ``reader``; weights have none."""
    if op_name(reader) == "linear":
        return source is reader.args[0]
    value, made = tensor(source), tensor(reader)
    return value is not None and made is not None and value.dim() == made.dim()
