"""Run a gated MLP of a few rows as one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from skipc.kernels import native
from skipc.kernels.linear import ACTIVATIONS
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.evaluate import EXACT, evaluate, random_values, same_values
from skipc.passes.fx_edit import erase_unused, infer, labels_of
from skipc.passes.ops import argument, op_name
from skipc.passes.skinny import adapters_of, bias_of, drop_copies, is_skinny, norm_before, sum_after
from torch import fx

Few = Callable[[Any], bool]  # whether a node is a linear layer of few rows, of those that the kernel takes


class LowerGatedMLP(Pass):
    """Turn ``down(act(gate(x)) * up(x))`` on few rows into one kernel, with the RMS norm before it and the residual sum
    behind it where they are alone with it. The threads meet once, and between the products nothing is stored.

    Before::

        %g : f32[1, 1, 96] = silu(linear(%h, %wg, None))
        %u : f32[1, 1, 96] = linear(%h, %wu, None)
        %d : f32[1, 1, 64] = linear(%g * %u, %wd, None)
        %y : f32[1, 1, 64] = add(%x, %d)

    After::

        %y : f32[1, 1, 64] = skipc.gated_mlp(%x, %n, 1e-5, %wg, %wu, %wd, 0, %x, [])

    One layer for both, whose result is split in halves (as in Phi-3), is read as it is: ``%up`` is then None.

    Leaves alone: what ``lower_linears`` leaves, biases, other activations.
    """

    name = "lower_gated_mlp"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        nodes = [n for n in gm.graph.nodes if read_gated_mlp(n, is_skinny) is not None]
        if not nodes:
            return PassResult()
        reason = native.available()
        if reason is not None:
            return PassResult(notes=(reason,))
        matched = lower_gated_mlps(gm.graph, nodes, is_skinny)
        return PassResult(matched, matched > 0)


def lower_gated_mlps(graph: fx.Graph, nodes: Iterable[fx.Node], few: Few) -> int:
    """Turn those among ``nodes`` that end a gated MLP into kernels. Returns how many."""
    flow, matched = Dataflow(graph), 0
    for node in nodes:
        mlp = read_gated_mlp(node, few)
        if mlp is None:
            continue
        read = (mlp.x, *mlp.weights)
        if not any(flow.storages.get(n, frozenset()) & flow.written for n in read if n is not None):
            _rewrite(graph, mlp, flow)
            matched += 1
    return matched


def _rewrite(graph: fx.Graph, mlp: GatedMLP, flow: Dataflow) -> None:
    norm = norm_before(mlp.x, mlp.readers, flow)
    source = (norm.x, norm.weight, norm.eps) if norm else (mlp.x, None, 0.0)
    total = sum_after(mlp.result)
    last, residual = total if total is not None else (mlp.result, None)
    with graph.inserting_before(last):
        arguments = (*source, *mlp.weights, ACTIVATIONS[mlp.activation], residual, mlp.adapters)
        made = graph.call_function(torch.ops.skipc.gated_mlp.default, arguments)
        made.meta = labels_of(mlp.result)
        infer(made)
    last.replace_all_uses_with(made)
    drop_copies(made)
    erase_unused(last)


@dataclass
class GatedMLP:
    """A gated MLP: its input and the layers that read it, its weights (gate, up, down; without up if the gate's holds
    both), activation and result."""

    x: fx.Node
    weights: tuple[fx.Node, fx.Node | None, fx.Node]
    activation: str
    readers: list[fx.Node]
    result: fx.Node

    @property
    def adapters(self) -> list[Any]:
        """Of its weights, as the kernel takes them."""
        return adapters_of(
            [*self.readers, None, self.result] if self.weights[1] is None else [*self.readers, self.result]
        )


def read_gated_mlp(node: Any, few: Few) -> GatedMLP | None:
    """The gated MLP whose last product ``node`` is, of linear layers that are ``few`` rows."""
    if not few(node) or bias_of(node) is not None:
        return None
    product: Any = node.args[0]
    if op_name(product) not in ("mul", "__mul__") or len(product.args) != 2 or len(product.users) != 1:
        return None
    for act, up in (product.args, product.args[::-1]):
        kind = _activation(act)
        if kind is None or not act.args or len(act.users) != 1:
            continue
        gate: Any = act.args[0]
        if _plain(gate, few) and _plain(up, few) and gate.args[0] is up.args[0]:
            return GatedMLP(gate.args[0], (gate.args[1], up.args[1], node.args[1]), kind, [gate, up], node)
        both = _halved(gate, up, few)
        if both is not None:
            return GatedMLP(both.args[0], (both.args[1], None, node.args[1]), kind, [both], node)  # type: ignore[arg-type]
    return None


def _plain(node: Any, few: Few) -> bool:
    return few(node) and bias_of(node) is None and len(node.users) == 1


def _halved(gate: Any, up: Any, few: Few) -> Any:
    """The layer whose result's first half is ``gate`` and whose second is ``up``."""
    inside: set[fx.Node] = set()
    both: Any = gate
    while isinstance(both, fx.Node) and op_name(both) in EXACT and both.args:
        both = both.args[0]
    if not few(both) or bias_of(both) is not None or not isinstance(up, fx.Node):
        return None
    for half in (gate, up):
        n = half
        while n is not both:
            inside.add(n)
            if op_name(n) not in EXACT or len(n.all_input_nodes) != 1:
                return None
            (n,) = n.all_input_nodes
    read_inside = (n.users for n in (inside | {both}) - {gate, up})
    if any(len(n.users) != 1 for n in (gate, up)) or any(u not in inside for users in read_inside for u in users):
        return None
    numbers = random_values([both])
    first, second = numbers[both].chunk(2, -1)
    return both if same_values(evaluate(gate, numbers), first) and same_values(evaluate(up, numbers), second) else None


def _activation(node: Any) -> str | None:
    name = op_name(node) if isinstance(node, fx.Node) else ""
    if name in ("silu", "relu"):
        return name
    approximate = node.kwargs.get("approximate", argument(node, "approximate", "none")) if name == "gelu" else None
    return "gelu_tanh" if approximate == "tanh" else None
