"""Read only the part of a static cache that the mask lets anyone see."""

from __future__ import annotations

from typing import Any

import torch
from skipc.passes.attention_forms import read_attention
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fold_grouped_queries import replace_attention
from skipc.passes.fx_edit import infer, labels_of, last_input
from skipc.passes.ops import same_sizes, tensor
from torch import fx


class NarrowKVCache(Pass):
    """Give attention over a cache the range of keys that its mask allows, found once for each mask in a step.

    Before::

        %a : f32[2, 4, 1, 16] = skipc.grouped_attention(%q, %k, %v, %m, None, False, 0.25, 0.0)

    After::

        %live : i64[2, 2] = live_range(%m)    (in torch operations, which Inductor fuses)
        %a : f32[2, 4, 1, 16] = skipc.grouped_attention(%q, %k, %v, %m, %live, False, 0.25, 0.0)

    The range comes from the mask's values at each call, so it is exact whoever made the mask, for padded rows and rows
    of different lengths, and no compiled variant depends on it. The mask is still applied inside the range.

    Leaves alone: attention without a mask, keys that are no input of the graph (growing caches hold no dead part).
    """

    name = "narrow_kv_cache"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched = 0
        flow = Dataflow(gm.graph)
        ranges: dict[fx.Node, fx.Node] = {}
        for node in list(gm.graph.nodes):
            grouped = node.target is torch.ops.skipc.grouped_attention.default
            found = None if grouped or node.op not in ("call_function", "call_method") else read_attention(node)
            if not grouped and found is None:
                continue
            key, mask = (node.args[1], node.args[3]) if grouped else (found.key, found.mask)  # type: ignore[union-attr]
            if mask is None or (grouped and node.args[4] is not None) or not self._narrows(key, mask, flow):
                continue
            if mask not in ranges:
                ranges[mask] = _live_range(mask)
            if grouped:
                node.update_arg(4, ranges[mask])
            else:
                assert found is not None
                if not replace_attention(node, found, ranges[mask], flow):
                    continue
            matched += 1
        return PassResult(matched, matched > 0)

    @staticmethod
    def _narrows(key: fx.Node, mask: fx.Node, flow: Dataflow) -> bool:
        """True if the keys lie in an input of the graph, and the mask speaks of each of them and is written nowhere."""
        k, m = tensor(key), tensor(mask)
        assert k is not None
        assert m is not None
        in_cache = bool(flow.storages[key] & flow.input_storages)
        if flow.storages[mask] & flow.written:
            return False
        return in_cache and m.dim() == 4 and same_sizes(m.shape[-1:], k.shape[2:3])


def _live_range(mask: fx.Node) -> fx.Node:
    """:func:`skipc.kernels.attention.live_range` of ``mask`` as nodes, right behind it."""
    graph, value = mask.graph, tensor(mask)
    assert value is not None
    after = last_input(graph) if mask.op == "placeholder" else mask
    labels = labels_of(mask)

    def call(method: str, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal after
        with graph.inserting_after(after):
            after = graph.call_method(method, args, kwargs)
        after.meta = dict(labels)
        infer(after)
        return after

    def function(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal after
        with graph.inserting_after(after):
            after = graph.call_function(target, args, kwargs)
        after.meta = dict(labels)
        infer(after)
        return after

    length: Any = value.shape[-1]
    if not isinstance(length, int):
        length = call("size", mask, -1)
    additive = value.dtype != torch.bool
    allowed = function(torch.gt, mask, torch.finfo(value.dtype).min / 2) if additive else mask
    keys = function(torch.arange, length, device=value.device)
    seen = call("any", call("any", allowed, 2), 1)
    start = call("amin", function(torch.where, seen, keys, length), -1)
    stop = call("amax", function(torch.where, seen, function(torch.add, keys, 1), 0), -1)
    if additive:
        sighted = call("all", call("all", call("any", allowed, -1), 2), 1)
        start = function(torch.where, sighted, start, 0)
        stop = function(torch.where, sighted, stop, length)
    return function(torch.stack, [start, stop], -1)
