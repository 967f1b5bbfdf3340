"""Make in-place arithmetic on intermediate values functional."""

from __future__ import annotations

from torch import fx

from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import infer, replace_uses_after
from skipc.passes.ops import out_of_place, tensor, written_arguments


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
        flow = Dataflow(gm.graph)
        for node in list(flow.writes):
            base = node.args[0] if node.args else None
            twin = out_of_place(node)
            if twin is None or not isinstance(base, fx.Node) or written_arguments(node) != [base]:
                continue
            if flow.storages[base] & flow.input_storages or self._viewed_later(node, base, flow):
                continue
            with gm.graph.inserting_before(node):
                kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
                args = tuple(False if i > 0 and a is True and "inplace" not in node.kwargs and twin[1] is node.target
                             else a for i, a in enumerate(node.args))
                new = gm.graph.create_node(twin[0], twin[1], args, kwargs)
            new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
            infer(new)
            before, after = tensor(base), tensor(new)
            assert before is not None
            same = after is not None and before.dtype == after.dtype and str(before.shape) == str(after.shape)
            if not same or written_arguments(new):
                gm.graph.erase_node(new)
                continue
            replace_uses_after(node, base, new, flow.order)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            matched += 1
        return PassResult(matched, matched > 0)

    @staticmethod
    def _viewed_later(node: fx.Node, base: fx.Node, flow: Dataflow) -> bool:
        """True if, after ``node``, someone reads the written storage by another name than ``base`` or ``node``."""
        storage = flow.storages[base]
        aliases = [n for n in flow.nodes if n not in (base, node) and flow.storages[n] & storage]
        aliases = [n for n in aliases if not flow.depends(n, node)]
        return any(flow.order[user] > flow.order[node] for alias in aliases for user in alias.users)
