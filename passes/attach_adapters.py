"""A graph whose linear layers add what the adapters of a bank say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from skipc.kernels import native
from skipc.kernels.device import on_cpu, on_gpu
from skipc.kernels.library import NATIVE, TRITON
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import add_input, infer, labels_of, last_input
from skipc.passes.ops import decides, op_name, same_sizes, tensor
from skipc.passes.residual import Streams
from skipc.passes.substitute_weights import weight_name
from torch import fx

from skipc.ir.adapters import WANTED, AdaptedLayer, Bank, operands_of
from skipc.ir.errors import AdapterError

_LOOKUPS = frozenset(["embedding"])  # uses of a tied weight that no adapter of the linear layer changes


@dataclass(frozen=True)
class Attached:
    """What a graph has of a bank.

    Attributes:
        paths: of the layers whose tensors are inputs, in order.
        left: those that do not add what adapters say, and why.
        routed: those that take the tokens that a router decides for, one by one.
        width: of these tokens; 0 if there are none.
    """

    paths: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    routed: frozenset[str] = frozenset()
    width: int = 0


def attach_adapters(gm: fx.GraphModule, streams: Streams, bank: Bank) -> Attached:
    """Edit ``gm``: linear layers that ``bank`` knows become ``skipc.lora_linear``. The tensors of the bank that they
    read become inputs of the graph, behind all others, and then what the rows of the call want, which a router may
    decide from the stream as it is before the first site.

    A layer stays as it is whose weight has another shape here (of a plan), or that takes other rows than those of the
    batch, one after the other (positions, tokens gathered for an expert): kernels could not tell whose they are.

    Args:
        gm: after the passes over whole graphs.
        streams: of ``gm``; edited, too.

    Raises:
        AdapterError: for a weight that goes into something else than its linear layer.
    """
    found = list(_layers_in(gm.graph, bank.layers.values()))
    if not found:
        return Attached()
    if on_cpu(found[0][0].memory):
        native.available()  # which the operations put in here run on, if it is
    inputs: dict[int, fx.Node] = {}
    for value in operands_of(layer for layer, _, _ in found):
        inputs[id(value)] = add_input(gm.graph, f"adapters_{len(inputs)}", value)
    *wanted, router = (  # each call's own
        add_input(gm.graph, name, value, parameter=False)
        for name, value in zip(WANTED, bank.nobody.tensors, strict=True)
    )
    tokens = _route(gm.graph, streams, router, wanted)
    branches = _branches(streams)
    left: dict[str, str] = {}
    routed = set()
    for layer, weight, uses in found:
        size = tensor(weight)
        assert size is not None
        if tuple(size.shape) != (layer.shape[::-1] if layer.transposed else layer.shape):
            left[layer.path] = f"the plan changes the shape of {layer.path}"
        elif not all(_by_row(tensor(_input_of(use)), streams) for use in uses):
            left[layer.path] = f"the rows that {layer.path} takes are not those of the batch"
        else:
            if tokens is not None and all(use in branches and _by_token(use, tokens) for use in uses):
                routed.add(layer.path)
            for use in uses:
                _attach(use, weight, [*(inputs[id(t)] for t in layer.operands), *wanted])
    gm.graph.lint()
    gm.recompile()
    flow = Dataflow(gm.graph)
    for junction in streams.junctions:
        for term in junction.terms:
            term.branch = [n for n in flow.between(junction.point, term.value) if not decides(n)]
    stream = tensor(tokens)
    width = int(stream.shape[-1]) if stream is not None else 0
    return Attached(tuple(layer.path for layer, _, _ in found), left, frozenset(routed), width)


def _route(graph: fx.Graph, streams: Streams, router: fx.Node, wanted: Sequence[fx.Node]) -> fx.Node | None:
    """Have ``router`` decide for the tokens of the first stream, which are returned; None if there is none."""
    head = streams.junctions[0].point if streams.junctions else None
    tokens = tensor(head)
    if head is None or tokens is None or tokens.dim() not in (2, 3):
        return None
    last = head if head.op != "placeholder" else last_input(graph)
    with graph.inserting_after(last):
        node = graph.call_function(torch.ops.skipc.route_tokens.default, (head, router, *wanted))
    node.meta = {**labels_of(head), "example_value": None}
    taken = TRITON if on_gpu(tokens) else NATIVE  # by the kernel
    if tokens.dtype not in taken or not tokens.is_contiguous():
        with graph.inserting_before(node):
            for method in ("float", "contiguous"):
                made = graph.call_method(method, (node.args[0],))
                made.meta = labels_of(head)
                infer(made)
                node.args = (made, *node.args[1:])
    return head


def _branches(streams: Streams) -> set[fx.Node]:
    """What adds to the first stream."""
    mine = [j for j in streams.junctions if j.stream == streams.junctions[0].stream]
    return {node for junction in mine for term in junction.terms for node in term.branch}


def _by_token(use: fx.Node, head: fx.Node) -> bool:
    """Whether a layer takes as many rows as the stream has tokens."""
    x, tokens = tensor(_input_of(use)), tensor(head)
    assert x is not None
    assert tokens is not None
    return same_sizes((math.prod(x.shape[:-1]),), (math.prod(tokens.shape[:-1]),))


def _layers_in(
    graph: fx.Graph, layers: Iterable[AdaptedLayer]
) -> Iterable[tuple[AdaptedLayer, fx.Node, list[fx.Node]]]:
    """The layers of a graph, each with its weight and the nodes that multiply by it."""
    by_weight: dict[str, AdaptedLayer] = {name: layer for layer in layers for name in layer.weights}
    for node in graph.nodes:
        layer = by_weight.get(weight_name(node) or "")
        if layer is None:
            continue
        uses = [u for u in node.users if _multiplies(u, node, layer)]
        others = [u for u in node.users if u not in uses and op_name(u) not in _LOOKUPS]
        if others:
            raise AdapterError(
                f"{layer.path} cannot have adapters in this model: its weight goes into {op_name(others[0])}; leave it "
                "out of the bank's targets"
            )
        if uses:
            yield layer, node, uses


def _multiplies(node: fx.Node, weight: fx.Node, layer: AdaptedLayer) -> bool:
    if layer.transposed:
        return op_name(node) == "addmm" and len(node.args) == 3 and node.args[2] is weight and not node.kwargs
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return op_name(node) == "linear" and given is weight


def _input_of(node: fx.Node) -> Any:
    if op_name(node) == "addmm":
        return node.args[1]
    return node.args[0] if node.args else node.kwargs["input"]


def _by_row(x: torch.Tensor | None, streams: Streams) -> bool:
    """Whether ``x`` begins with the batch of a stream, or with all its tokens row by row."""
    for junction in streams.junctions:
        stream = tensor(junction.add)
        if x is None or stream is None or x.dim() < 2 or stream.dim() < 2:
            continue
        if same_sizes(x.shape[:1], stream.shape[:1]):
            return True
        if x.dim() == 2 and stream.dim() == 3 and same_sizes(x.shape[:1], (stream.shape[0] * stream.shape[1],)):
            return True
    return False


def _attach(node: fx.Node, weight: fx.Node, lora: list[fx.Node]) -> None:
    """Turn a node into the adapted layer; it stays the same node, which streams know."""
    graph = node.graph
    if op_name(node) == "addmm":
        bias, x, _ = node.args
        with graph.inserting_before(node):
            turned = graph.call_method("t", (weight,))
        turned.meta = labels_of(node)
        infer(turned)
        node.args = (x, turned, bias, lora)
    else:
        names: Mapping[str, object] = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
        node.args = (names["input"], names["weight"], names.get("bias"), lora)  # type: ignore[assignment]
    node.kwargs = {}
    node.op, node.target = "call_function", torch.ops.skipc.lora_linear.default
