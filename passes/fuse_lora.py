"""Make one operation of a linear layer and the adapter that PEFT added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import add_input, erase_unused, infer
from skipc.passes.ops import argument, is_add, op_name, tensor
from torch import fx


class FuseLora(Pass):
    """Turn ``linear(x, w) + s * linear(linear(x, a), b)``, as PEFT's layers compute it with one active adapter, into
    one operation, which the kernels for few rows take along. What it takes beside the weights are constants, which
    become inputs of the graph.

    Before::

        %y : f32[1, 1, 64] = linear(%x, %w, None)
        %h : f32[1, 1, 4] = linear(%x, %a, None)
        %d : f32[1, 1, 64] = linear(%h, %b, None)
        %z : f32[1, 1, 64] = add(%y, mul(%d, 2.0))

    After::

        %z : f32[1, 1, 64] = skipc.lora_linear(%x, %w, None, [%a, %b, %where, %scales, %wanted, %gates])

    The scale may be a number, or a tensor of one (as ``prepare_model_for_compiled_hotswap`` makes it).

    Leaves alone: all but the first of several active adapters, rows with adapters of their own, biases of the second
    matrix, adapters of another dtype than the layer, scales that Dynamo has as inputs since they differed between
    models of one class, devices but the CPU.
    """

    name = "fuse_lora"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if ctx.config.lowering != "outline":
            return PassResult()
        flow, constants, matched = Dataflow(gm.graph), _Constants(gm.graph), 0
        for node in [n for n in gm.graph.nodes if is_add(n)]:
            found = _read(node, flow)
            if found is not None:
                _rewrite(gm.graph, node, found, constants)
                matched += 1
        return PassResult(matched, matched > 0)


@dataclass
class _Adapted:
    layer: fx.Node
    a: fx.Node
    b: fx.Node
    scale: fx.Node | float


class _Constants:
    """Inputs of the graph that are the same at each call, each once."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.made: dict[Any, fx.Node] = {}

    def get(self, key: Any, value: torch.Tensor) -> fx.Node:
        if key not in self.made:
            self.made[key] = add_input(self.graph, f"lora_constant_{len(self.made)}", value, value)
        return self.made[key]


def _read(add: fx.Node, flow: Dataflow) -> _Adapted | None:
    made = tensor(add)
    if add.kwargs:  # `alpha` scales one of them
        return None
    for layer, change in (add.args, add.args[::-1]):
        branch = _scaled(change)
        if branch is None or not _linear(layer) or len(layer.users) != 1:  # type: ignore[union-attr]
            continue
        product, scale = branch
        if not _linear(product) or not _linear(first := product.args[0]):
            continue
        if len(product.users) != 1 or len(first.users) != 1:
            continue
        if _bias(product) is not None or _bias(first) is not None or first.args[0] is not layer.args[0]:  # type: ignore[union-attr]
            continue
        weights = [layer.args[1], first.args[1], product.args[1]]  # type: ignore[union-attr]
        if any(w.op != "placeholder" or flow.storages[w] & flow.written for w in weights):
            continue
        values = [tensor(w) for w in (layer.args[0], *weights)]  # type: ignore[union-attr]
        known = [v for v in values if v is not None and made is not None and v.dtype == made.dtype]
        if (
            len(known) < 4
            or any(v.device.type != "cpu" for v in known)
            or not all(v.is_contiguous() for v in known[1:])
        ):
            continue
        _, weight, a, b = known
        if b.shape[0] == weight.shape[0] and a.shape[0] < min(weight.shape):  # else no low-rank map
            return _Adapted(layer, weights[1], weights[2], scale)  # type: ignore[arg-type]
    return None


def _linear(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and op_name(node) == "linear"
        and len(node.args) >= 2
        and not set(node.kwargs) - {"bias"}
    )


def _bias(linear: fx.Node) -> Any:
    return argument(linear, "bias", linear.args[2] if len(linear.args) > 2 else None)


def _scaled(node: Any) -> tuple[Any, fx.Node | float] | None:
    """What is scaled, and by how much."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or op_name(node) not in ("mul", "__mul__") or node.kwargs:
        return None
    for product, scale in (node.args, node.args[::-1]):
        value = tensor(scale)
        number = isinstance(scale, float | int) and not isinstance(scale, bool)
        one = value is not None and value.dim() == 0 and value.dtype == torch.float32 and scale.op == "placeholder"  # type: ignore[union-attr]
        if number or one:
            return product, scale  # type: ignore[return-value]
    return None


def _rewrite(graph: fx.Graph, add: fx.Node, found: _Adapted, constants: _Constants) -> None:
    rank = tensor(found.a).shape[0]  # type: ignore[union-attr]
    where = constants.get(("rank", rank), torch.tensor([[rank, 0, 0, rank]]))
    scale = found.scale
    if not isinstance(scale, fx.Node):
        scale = constants.get(("scale", float(scale)), torch.tensor([float(scale)]))
    wanted = constants.get("wanted", torch.tensor([1, 1, 0]))
    gates = constants.get("gates", torch.tensor([0.0, 0.0, 1.0]))
    x, weight = found.layer.args[:2]
    with graph.inserting_before(add):
        node = graph.call_function(
            torch.ops.skipc.lora_linear.default,
            (x, weight, _bias(found.layer), [found.a, found.b, where, scale, wanted, gates]),
        )
    node.meta = {k: v for k, v in found.layer.meta.items() if k != "example_value"}
    infer(node)
    add.replace_all_uses_with(node)
    erase_unused(add)
