"""Run linear layers of a few rows at the speed of memory."""

from __future__ import annotations

from typing import Any

import torch
from skipc.kernels import native
from skipc.kernels.linear import MAX_ROWS
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import erase_unused, infer, labels_of
from skipc.passes.ops import op_name, tensor
from torch import fx


class LowerLinears(Pass):
    """Turn linear layers of few rows (fp32: 16, bf16: 8) into the native kernel, those that share an input into one
    call.

    Before::

        %q : bf16[1, 1, 64] = linear(%x, %wq, None)
        %k : bf16[1, 1, 16] = linear(%x, %wk, None)

    After::

        %qk : bf16[1, 1, 80] = skipc.skinny_linear(%x, [%wq, %wk], [None, None])
        %q : bf16[1, 1, 64] = narrow(%qk, -1, 0, 64)
        %k : bf16[1, 1, 16] = narrow(%qk, -1, 64, 16)

    The weights stay where they are. Runs on each region by itself, so that a skipped attention that still projects its
    keys does not pay for the query.

    Leaves alone: more rows or a number known only at the call, dtypes but fp32 and bf16, devices but the CPU, weights
    whose rows are not contiguous, machines without a C++ compiler.
    """

    name = "lower_linears"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        linears = [n for n in gm.graph.nodes if _is_skinny(n)]
        reason = native.available() if linears else None
        if reason is not None:
            return PassResult(notes=(reason,))
        groups: dict[fx.Node, list[fx.Node]] = {}
        flow = Dataflow(gm.graph) if linears else None
        for node in linears:
            assert flow is not None
            written = any(flow.storages[a] & flow.written for a in node.all_input_nodes)
            groups.setdefault(node if written else node.args[0], []).append(node)  # grouped, all run with the first
        for group in groups.values():
            self._rewrite(gm.graph, group)
        return PassResult(len(linears), bool(linears))

    @staticmethod
    def _rewrite(graph: fx.Graph, linears: list[fx.Node]) -> None:
        weights, biases = [n.args[1] for n in linears], [_bias(n) for n in linears]
        first = linears[0]
        x = first.args[0]
        with graph.inserting_before(first):
            made = graph.call_function(torch.ops.skipc.skinny_linear.default, (x, weights, biases))
            made.meta = labels_of(first)
            infer(made)
            begin = 0
            for node in linears:
                width = tensor(node).shape[-1]  # type: ignore[union-attr]
                part = made
                if len(linears) > 1:
                    part = graph.call_function(torch.narrow, (made, -1, begin, width))
                    part.meta = labels_of(node)
                    infer(part)
                begin += width
                node.replace_all_uses_with(part)
        for node in linears:
            erase_unused(node)


def _bias(node: fx.Node) -> Any:
    return node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)


def _is_skinny(node: fx.Node) -> bool:
    if op_name(node) != "linear" or node.op != "call_function" or len(node.args) < 2 or set(node.kwargs) - {"bias"}:
        return False
    x, w, b = tensor(node.args[0]), tensor(node.args[1]), tensor(_bias(node))
    if x is None or w is None or (_bias(node) is not None and b is None):
        return False
    if any(t.device.type != "cpu" or t.dtype != x.dtype for t in (x, w, b) if t is not None):
        return False
    if x.dtype not in MAX_ROWS or w.dim() != 2 or x.dim() < 1 or w.stride(1) != 1:
        return False
    if not all(isinstance(n, int) for n in (*x.shape, *w.shape)) or (b is not None and b.stride(0) != 1):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    # Weights come before the first of the group only if they are inputs.
    inputs = all(a.op in ("placeholder", "get_attr") for a in node.all_input_nodes[1:])
    return 1 <= rows <= MAX_ROWS[x.dtype] and x.is_contiguous() and x.shape[-1] > 0 and inputs
