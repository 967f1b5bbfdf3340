"""Make in-place arithmetic on intermediate values functional."""

from __future__ import annotations

from typing import Any

from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import infer, replace_uses_after
from skipc.passes.ops import out_of_place, tensor, written_arguments
from torch import fx


class FunctionalizeInplace(Pass):
    """Turn ``a += b`` on a value made in the graph into ``c = a + b``, so that residual sums are values.

    Before::

        %m : f32[2, 7, 64] = linear(%h, %w)
        %s : f32[2, 7, 64] = iadd(%m, %a)
        %y : f32[2, 7, 64] = add(%m, %x)

    After::

        %m : f32[2, 7, 64] = linear(%h, %w)
        %s : f32[2, 7, 64] = add(%m, %a)
        %y : f32[2, 7, 64] = add(%s, %x)

    Leaves alone: writes to inputs (KV caches), indexed writes, values of which a view is used later, and sums whose
    dtype or shape the in-place form would have held back.
    """

    name = "functionalize_inplace"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched = 0
        candidates = [n for n in gm.graph.nodes if written_arguments(n) and out_of_place(n) is not None]
        flow = Dataflow(gm.graph) if candidates else None
        for node in candidates:
            assert flow is not None
            if self._rewrite(gm.graph, node, flow):
                matched += 1
                flow = Dataflow(gm.graph)  # a rewrite changes who shares storage with whom
        return PassResult(matched, matched > 0)

    def _rewrite(self, graph: fx.Graph, node: fx.Node, flow: Dataflow) -> bool:
        """Replace ``node`` by its out-of-place twin, if that changes nothing that anyone sees."""
        base, twin = node.args[0] if node.args else None, out_of_place(node)
        if twin is None or not isinstance(base, fx.Node) or written_arguments(node) != [base]:
            return False
        if flow.storages[base] & flow.input_storages or not self._only_by_name(node, base, flow):
            return False
        with graph.inserting_before(node):
            new = graph.create_node(*twin, *self._arguments(node, twin[1]))
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        infer(new)
        before, after = tensor(base), tensor(new)
        same = before is not None and after is not None and before.dtype == after.dtype
        if not same or str(before.shape) != str(after.shape) or written_arguments(new):  # type: ignore[union-attr]
            graph.erase_node(new)
            return False
        replace_uses_after(node, base, new, flow.order)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        for later in flow.nodes[flow.order[node] + 1 :]:  # views of the sum are views of the new value now
            if later.op != "output" and flow.storages[later] & flow.storages[base]:
                infer(later)
        return True

    @staticmethod
    def _arguments(node: fx.Node, target: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``node`` without a request to work in place."""
        kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if target is not node.target or "inplace" in node.kwargs:
            return node.args, kwargs
        return tuple(False if i > 0 and a is True else a for i, a in enumerate(node.args)), kwargs

    @staticmethod
    def _only_by_name(node: fx.Node, base: fx.Node, flow: Dataflow) -> bool:
        """True if, from ``node`` on, the written storage is read and written through ``base``, ``node`` and views made
        later only, and none of those views is written."""
        shared = [n for n in flow.nodes if flow.storages[n] & flow.storages[base] and n not in (base, node)]
        for alias in shared:
            if flow.order[alias] < flow.order[node]:
                if any(flow.order[user] > flow.order[node] for user in alias.users):
                    return False
            elif alias in flow.writes and not {base, node}.issuperset(written_arguments(alias)):
                return False
        later = [n for n in flow.writes if flow.order[n] > flow.order[node] and flow.writes[n] & flow.storages[base]]
        return all({base, node}.issuperset(written_arguments(n)) for n in later)
