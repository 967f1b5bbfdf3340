"""Add what adapters say to layers that share an input by one launch."""

from __future__ import annotations

from typing import Any

import torch
from skipc.kernels.device import on_gpu
from skipc.kernels.library import TRITON
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import infer, labels_of
from skipc.passes.ops import op_name, tensor
from skipc.passes.skinny import bias_of, joined_adapters
from torch import fx


class GroupAdapters(Pass):
    """On a GPU, take adapted linear layers apart: products stay with torch, and what adapters add to those that share
    an input is one launch for up to three of them, in place.

    Before::

        %q : f32[1, 1, 64] = skipc.lora_linear(%h, %wq, None, [%a, %b, %p, %s, %t, %g])
        %k : f32[1, 1, 16] = skipc.lora_linear(%h, %wk, None, [%c, %d, %r, %u, %t, %g])

    After::

        %q : f32[1, 1, 64] = linear(%h, %wq, None)
        %k : f32[1, 1, 16] = linear(%h, %wk, None)
        skipc.add_adapters([%q, %k], %h, [%a, %b, %p, %s, %c, %d, %r, %u, %t, %g])

    Leaves alone: devices but GPUs, dtypes but fp32, bf16 and fp16, weights that the region computes or writes.
    """

    name = "group_adapters"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        flow = Dataflow(gm.graph)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if op_name(node) == "lora_linear" and _takes(node, flow):
                groups.setdefault(node.args[0], []).append(node)
        for group in groups.values():
            _rewrite(gm.graph, group)
        count = sum(map(len, groups.values()))
        return PassResult(count, count > 0)


def _takes(node: fx.Node, flow: Dataflow) -> bool:
    x = tensor(node.args[0])
    if x is None or not on_gpu(x) or x.dtype not in TRITON:
        return False
    others = [n for n in node.all_input_nodes if n is not node.args[0]]
    return all(n.op in ("placeholder", "get_attr") and not flow.storages[n] & flow.written for n in others)


def _rewrite(graph: fx.Graph, group: list[fx.Node]) -> None:
    """All of a group run where the first of them stands."""
    first, x = group[0], group[0].args[0]
    made: list[Any] = []
    with graph.inserting_before(first):
        for node in group:
            linear = graph.call_function(torch._C._nn.linear, (x, node.args[1], bias_of(node)))
            linear.meta = labels_of(node)
            infer(linear)
            made.append(linear)
        lora = joined_adapters([node.args[3] for node in group])
        added = graph.call_function(torch.ops.skipc.add_adapters.default, (made, x, lora))
        added.meta = {**labels_of(first), "example_value": None}
    for node, linear in zip(group, made, strict=True):
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
