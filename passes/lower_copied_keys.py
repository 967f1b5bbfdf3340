"""Run what a skipped attention keeps under kv="copy" as one kernel."""

from __future__ import annotations

import torch
from skipc.kernels.device import on_cpu
from skipc.kernels.library import NATIVE
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import infer, labels_of
from skipc.passes.lower_attention_block import position_of
from skipc.passes.ops import op_name, tensor
from torch import fx


class LowerCopiedKeys(Pass):
    """Turn the copying of rows from one static cache to another, all that a skipped attention does under
    ``kv="copy"``, into one kernel, so that it can be a link of a chain of sublayers.

    Before::

        %k : f32[1, 2, 1, 16] = index_select(%keys, 2, %count + arange(1))
        %a : f32[1, 2, 32, 16] = index_copy_(%keys_1, 2, %count + arange(1), %k)
        %v : f32[1, 2, 1, 16] = index_select(%values, 2, %count + arange(1))
        %b : f32[1, 2, 32, 16] = index_copy_(%values_1, 2, %count + arange(1), %v)

    After::

        skipc.copy_rows(%keys, %values, %keys_1, %values_1, %count, 1)

    Leaves alone: calls of a varying number of tokens, caches that grow, regions that do anything beside.
    """

    name = "lower_copied_keys"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        graph = gm.graph
        pairs = [
            (n.args[3], n)
            for n in graph.nodes
            if op_name(n) == "index_copy_" and len(n.args) == 4 and n.args[1] in (2, -2) and not n.users
        ]
        reads = [r for r, _ in pairs]
        if len(pairs) != 2 or any(not isinstance(r, fx.Node) or op_name(r) != "index_select" for r in reads):
            return PassResult()
        caches = [*(r.args[0] for r in reads), *(w.args[0] for _, w in pairs)]
        places, inside = pairs[0][1].args[2], {n for pair in pairs for n in pair}
        same_places = all(
            r.args[1] == w.args[1] and r.args[2] is w.args[2] is places and len(r.users) == 1 for r, w in pairs
        )
        if not same_places or not _are_caches(graph, caches):
            return PassResult()
        tokens = reads[0].meta["example_value"].shape[2]
        position = position_of(places, tokens, inside) if isinstance(tokens, int) else None
        rest = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in inside]
        count = next((n for n in rest if op_name(n) == "add_" and n.args[0] is position and not n.users), None)
        flow = Dataflow(graph)
        if position is None or any(n is not count for n in rest):
            return PassResult()
        if count is not None and any(flow.depends(w, count) for _, w in pairs):
            return PassResult()
        with graph.inserting_before(count if count is not None else next(iter(reversed(graph.nodes)))):
            made = graph.call_function(torch.ops.skipc.copy_rows.default, (*caches, position, tokens))
        made.meta = labels_of(pairs[0][1])
        infer(made)
        for node in reversed(list(graph.nodes)):
            if node in inside:
                graph.erase_node(node)
        return PassResult(1, True)


def _are_caches(graph: fx.Graph, nodes: list[fx.Node]) -> bool:
    """True for four inputs of the graph, of memory of their own, that hold rows of a known size."""
    values = [tensor(n) for n in nodes]
    first = values[0]
    storages = {t.untyped_storage()._cdata for t in values if t is not None}
    return (
        first is not None
        and all(n.op == "placeholder" for n in nodes)
        and len(storages) == len(nodes)
        and all(
            t is not None
            and on_cpu(t)
            and t.dim() == 4
            and t.dtype == first.dtype in NATIVE
            and t.shape[:2] == first.shape[:2]
            and all(isinstance(n, int) for n in (*t.shape[:2], t.shape[3]))
            and t.stride(3) == 1
            for t in values
        )
    )
