"""Make one operation of a linear layer and the adapters that PEFT added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from skipc.kernels import native
from skipc.kernels.device import on_cpu
from skipc.kernels.lora import MOST, PACK
from skipc.kernels.memory import aligned, zeros
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import add_input, erase_unused, infer, labels_of
from skipc.passes.ops import CASTS, argument, is_add, op_name, tensor
from torch import fx

from skipc.ir.adapters import Mirrored, Scale


class FuseLora(Pass):
    """Turn ``linear(x, w) + s * linear(linear(x, a), b) + ...``, as PEFT's layers compute it with active adapters, into
    one operation, which the kernels for few rows take along. What it takes beside the weights are constants, which
    become inputs of the graph. Several adapters of a layer, and those of another dtype, are copied to memory of the
    program's own before a call, where they lie side by side.

    Before::

        %y : f32[1, 1, 64] = linear(%x, %w, None)
        %h : f32[1, 1, 4] = linear(%x, %a, None)
        %d : f32[1, 1, 64] = linear(%h, %b, None)
        %z : f32[1, 1, 64] = add(%y, mul(%d, 2.0))

    After::

        %z : f32[1, 1, 64] = skipc.lora_linear(%x, %w, None, [%a, %b, %where, %scales, %wanted, %gates])

    Scales may be numbers, or tensors of one (as ``prepare_model_for_compiled_hotswap`` makes them); adapters may be
    wider than their layer (as PEFT makes those of half-precision models).

    Leaves alone: rows with adapters of their own, biases of the second matrix, adapters narrower than the layer, more
    than 8 adapters of a layer, scales that Dynamo has as numbers among inputs since they differed between models of one
    class, devices but CPUs and GPUs.
    """

    name = "fuse_lora"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        if ctx.config.lowering != "outline":
            return PassResult()
        flow, found = Dataflow(gm.graph), dict[fx.Node, _Adapted]()
        for node in [n for n in gm.graph.nodes if is_add(n)]:
            adapted = _read(node, flow, found)
            if adapted is not None:
                found.pop(adapted.inner, None)  # type: ignore[arg-type]
                found[node] = adapted
        layers = [(made, a) for add, a in found.items() if (made := _made(add, a)) is not None and len(a.parts) <= MOST]
        if layers:
            if on_cpu(tensor(layers[0][0])):  # type: ignore[arg-type]
                native.available()  # which the operation runs on, if it is
            ctx.mirrored = _rewrite(gm.graph, layers)
        return PassResult(len(layers), bool(layers))


@dataclass
class _Part:
    """An adapter: its matrices, inputs of the graph, and its scale."""

    a: fx.Node
    b: fx.Node
    scale: fx.Node | float


@dataclass
class _Adapted:
    """A linear layer and its adapters; ``inner``: the sum of all but the last of them, if it has several."""

    layer: fx.Node
    parts: list[_Part]
    inner: fx.Node | None = None


def _read(add: fx.Node, flow: Dataflow, found: dict[fx.Node, _Adapted]) -> _Adapted | None:
    """What a sum adds to a layer, or to one that has adapters already."""
    if add.kwargs:  # `alpha` scales one of them
        return None
    for to, change in (add.args, add.args[::-1]):
        if not isinstance(to, fx.Node) or len(to.users) != 1 or not (_linear(to) or to in found):
            continue
        before = found.get(to)
        layer = before.layer if before is not None else to
        part = _part(change, layer, flow)
        if part is not None and _wide(add, layer, part):
            return _Adapted(layer, [*(before.parts if before is not None else []), part], to if before else None)
    return None


def _part(change: Any, layer: fx.Node, flow: Dataflow) -> _Part | None:
    branch = _scaled(change)
    if branch is None:
        return None
    product, scale = branch
    if not _linear(product) or not _linear(first := product.args[0]):
        return None
    if len(product.users) != 1 or len(first.users) != 1 or _bias(product) is not None or _bias(first) is not None:
        return None
    if first.args[0] is not layer.args[0] and _cast_of(first.args[0]) is not layer.args[0]:
        return None
    weights: tuple[Any, ...] = layer.args[1], first.args[1], product.args[1]
    if any(w.op != "placeholder" or flow.storages[w] & flow.written for w in weights):
        return None
    weight, a, b = map(tensor, weights)
    x = tensor(layer.args[0])
    if weight is None or a is None or b is None or x is None or x.dtype != weight.dtype or a.dtype != b.dtype:
        return None
    if any(v.device != weight.device for v in (x, a, b)) or not weight.is_contiguous():
        return None
    if weight.device.type not in ("cpu", "cuda"):
        return None
    if b.shape[0] != weight.shape[0] or a.shape[0] >= min(weight.shape):  # else no low-rank map
        return None
    return _Part(weights[1], weights[2], scale)


def _wide(add: fx.Node, layer: fx.Node, part: _Part) -> bool:
    """Whether the sum has all the digits of the adapter, so that it is rounded to the layer's in the end, if at all."""
    own, a, made = tensor(layer), tensor(part.a), tensor(add)
    assert own is not None
    assert a is not None
    return made is not None and torch.promote_types(own.dtype, a.dtype) == a.dtype == made.dtype


def _made(add: fx.Node, adapted: _Adapted) -> fx.Node | None:
    """What has the layer's dtype again: the sum, or what it is rounded to."""
    own, total = tensor(adapted.layer), tensor(add)
    assert own is not None
    assert total is not None
    if total.dtype == own.dtype:
        return add
    if len(add.users) != 1 or _cast_of(last := next(iter(add.users))) is not add:
        return None
    made = tensor(last)
    return last if made is not None and made.dtype == own.dtype else None


def _linear(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and op_name(node) == "linear"
        and len(node.args) >= 2
        and not set(node.kwargs) - {"bias"}
    )


def _bias(linear: fx.Node) -> Any:
    return argument(linear, "bias", linear.args[2] if len(linear.args) > 2 else None)


def _cast_of(node: Any) -> fx.Node | None:
    """What ``node`` is in another dtype."""
    if not isinstance(node, fx.Node) or op_name(node) not in CASTS - {"dropout"} or len(node.all_input_nodes) != 1:
        return None
    source = node.all_input_nodes[0]
    value, made = tensor(source), tensor(node)
    return source if value is not None and made is not None and value.shape == made.shape else None


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


@dataclass
class _Planned:
    """A layer, and where its adapters lie: among the inputs of the graph as they are, or in memory of the program's
    own."""

    made: fx.Node
    adapted: _Adapted
    where: torch.Tensor
    direct: bool


def _rewrite(graph: fx.Graph, layers: list[tuple[fx.Node, _Adapted]]) -> list[Mirrored]:
    """Put the operation in the place of what is made, and tell what memory it reads."""
    given = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    slots = max(len(adapted.parts) for _, adapted in layers)
    sizes: dict[torch.dtype, int] = {}
    planned = [_plan(made, adapted, slots, sizes) for made, adapted in layers]
    device = tensor(layers[0][1].layer.args[1]).device  # type: ignore[union-attr]
    memory = {dtype: zeros(size, dtype, device) for dtype, size in sizes.items()}
    constants: dict[Any, fx.Node] = {}

    def constant(value: torch.Tensor) -> fx.Node:
        """An input of this value, one for all small ones that are equal."""
        key = id(value) if len(value) > 64 else (value.dtype, value.shape, *value.flatten().tolist())
        if key not in constants:
            value = value.to(device)
            constants[key] = add_input(graph, f"lora_constant_{len(constants)}", value, value)
        return constants[key]

    table, gates = torch.tensor([1, slots, *range(slots)]), torch.ones(2 + slots)
    mirrored: list[Mirrored] = []
    for layer in planned:
        parts, (x, weight) = layer.adapted.parts, layer.adapted.layer.args[:2]
        numbers = [0.0 if isinstance(part.scale, fx.Node) else float(part.scale) for part in parts]
        scales = torch.tensor([*numbers, *[0.0] * (slots - len(parts))], device=device)
        first = parts[0]
        if layer.direct:
            operands = [first.a, first.b, constant(layer.where)]
            operands.append(first.scale if isinstance(first.scale, fx.Node) else constant(scales[:1]))
        else:
            own = memory[tensor(weight).dtype]  # type: ignore[union-attr]
            operands = [constant(own), constant(own), constant(layer.where)]
            operands.append(add_input(graph, f"lora_scales_{len(mirrored)}", scales, scales))  # which inputs may change
            for i, (part, number) in enumerate(zip(parts, numbers, strict=True)):
                scale = Scale(given[part.scale] if isinstance(part.scale, fx.Node) else None, number)
                mirrored.append(Mirrored(given[part.a], given[part.b], scale, own, layer.where, scales, i))
        lora = [*operands, constant(table), constant(gates)]
        with graph.inserting_before(layer.made):
            node = graph.call_function(
                torch.ops.skipc.lora_linear.default, (x, weight, _bias(layer.adapted.layer), lora)
            )
        node.meta = labels_of(layer.adapted.layer)
        infer(node)
        layer.made.replace_all_uses_with(node)
        erase_unused(layer.made)
    return mirrored


def _plan(made: fx.Node, adapted: _Adapted, slots: int, sizes: dict[torch.dtype, int]) -> _Planned:
    weight = tensor(adapted.layer.args[1])
    assert weight is not None
    values = [(tensor(part.a), tensor(part.b)) for part in adapted.parts]
    where = torch.zeros(slots, 4, dtype=torch.int64)
    where[:, 3] = max(a.shape[0] for a, _ in values)  # type: ignore[union-attr]
    direct = len(values) == 1 and all(t.dtype == weight.dtype and t.is_contiguous() for t in values[0])  # type: ignore[union-attr]
    for i, (a, _) in enumerate(values):
        rank, k = a.shape  # type: ignore[union-attr]
        where[i, 0] = rank
        if not direct:
            where[i, 1] = at = sizes.get(weight.dtype, 0)
            where[i, 2] = at = at + aligned(rank * k)
            sizes[weight.dtype] = at + aligned(rank * (weight.shape[0] + -weight.shape[0] % PACK))
    return _Planned(made, adapted, where, direct)
