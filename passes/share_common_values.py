"""Compute once what a model computes in every layer: masks, positions, rotary tables."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import PARTS, VIEWS, is_random, op_name, tensors
from torch import fx
from torch._ops import HigherOrderOperator

# What turns inputs into hidden states. Equal values behind it are sublayers, which are not for this pass to join.
_LAYERS = frozenset(["embedding", "linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution"])
# What a region makes for itself at no cost. Equal, but not shared.
_CONSTANTS = frozenset(["arange", "full", "zeros", "ones"])
_FREE = VIEWS | PARTS | _CONSTANTS


class ShareCommonValues(Pass):
    """Compute once what several layers compute alike, if it does not depend on hidden states. Inductor does so in a
    whole graph; cut into regions, each layer would have its own.

    Before::

        %p : i64[7] = arange(7)
        %m : bool[7, 7] = ge(unsqueeze(%p, 1), %p)
        %p2 : i64[7] = arange(7)
        %m2 : bool[7, 7] = ge(unsqueeze(%p2, 1), %p2)
        %y : f32[2, 4, 7, 7] = where(%m, %a, where(%m2, %b, %c))

    After::

        %p : i64[7] = arange(7)
        %m : bool[7, 7] = ge(unsqueeze(%p, 1), %p)
        %y : f32[2, 4, 7, 7] = where(%m, %a, where(%m, %b, %c))

    Leaves alone: views and constants, which cost a region nothing; what depends on an embedding or a layer, is written,
    random or returned; what ``vmap`` computes.
    """

    name = "share_common_values"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        flow = Dataflow(gm.graph)
        apart = flow.written.union(*(flow.storages[n] for n in flow.nodes[-1].all_input_nodes))
        hidden: set[fx.Node] = set()
        first: dict[Hashable, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}  # the first node with the same value
        matched = 0
        for node in flow.nodes:
            if op_name(node) in _LAYERS or not hidden.isdisjoint(node.all_input_nodes):
                hidden.add(node)
            elif _is_value(node) and all(flow.storages[n].isdisjoint(apart) for n in (node, *node.all_input_nodes)):
                kinds = [(t.dtype, t.device) for t in tensors(node)]
                key = _key((node.op, node.target, node.args, node.kwargs, kinds), same)
                same[node] = first.setdefault(key, node)
                if same[node] is not node and op_name(node) not in _FREE:
                    node.replace_all_uses_with(same[node])
                    matched += 1
        for node in reversed(list(same)):
            if same[node] is not node and not node.users:
                gm.graph.erase_node(node)
        return PassResult(matched, matched > 0)


def _is_value(node: fx.Node) -> bool:
    """True for a call that makes plain tensors, the same ones each time."""
    made = tensors(node)
    return (
        node.op in ("call_function", "call_method")
        and bool(made)
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, made))
        and not isinstance(node.target, HigherOrderOperator)
        and not op_name(node).startswith(("empty", "new_empty"))
        and not is_random(node)
    )


def _key(value: Any, same: dict[fx.Node, fx.Node]) -> Hashable:
    """Equal for equal arguments only: not for 1, 1.0 and True, nor for 0.0 and -0.0."""
    if isinstance(value, tuple | list):
        return (type(value), *(_key(v, same) for v in value))
    if isinstance(value, dict):
        return tuple((k, _key(v, same)) for k, v in value.items())
    if isinstance(value, slice):
        return (slice, _key((value.start, value.stop, value.step), same))
    return same.get(value, value) if isinstance(value, fx.Node) else (type(value), repr(value))
