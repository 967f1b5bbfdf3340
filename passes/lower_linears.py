"""Run linear layers of a few rows at the speed of memory."""

from __future__ import annotations

import torch
from skipc.kernels import native
from skipc.kernels.linear import max_rows
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import erase_unused, infer, labels_of
from skipc.passes.ops import tensor
from skipc.passes.skinny import adapters_of, bias_of, drop_copies, is_skinny, native_rows, norm_before, sum_after
from torch import fx


class LowerLinears(Pass):
    """Turn linear layers of few rows (16; bf16 on CPUs without tile registers: 8) into the native kernel: those that
    share an input into one call, with the RMS norm before them, and a residual sum behind a single one.

    Before::

        %h : bf16[1, 1, 64] = rms_norm(%x, (64,), %n, 1e-5)
        %q : bf16[1, 1, 64] = linear(%h, %wq, None)
        %k : bf16[1, 1, 16] = linear(%h, %wk, None)

    After::

        %qk : bf16[1, 1, 80] = skipc.skinny_linear(%x, [%wq, %wk], [None, None], %n, 1e-5, None, [])
        %q : bf16[1, 1, 64] = narrow(%qk, -1, 0, 64)
        %k : bf16[1, 1, 16] = narrow(%qk, -1, 64, 16)

    The weights stay where they are. Runs on each region by itself, so that a skipped attention that still projects its
    keys does not pay for the query.

    Leaves alone: more rows or a number known only at the call, dtypes but fp32 and bf16, devices but the CPU, weights
    whose rows are not contiguous, machines without a C++ compiler.
    """

    name = "lower_linears"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        linears = [n for n in gm.graph.nodes if is_skinny(n)]
        if not linears:
            return PassResult(notes=tuple({_why_not(n): None for n in gm.graph.nodes if native_rows(n) is not None}))
        reason = native.available()
        if reason is not None:
            return PassResult(notes=(reason,))
        groups: dict[tuple[bool, fx.Node], list[fx.Node]] = {}
        flow = Dataflow(gm.graph)
        for node in linears:
            alone = any(flow.storages[a] & flow.written for a in node.all_input_nodes)
            alone |= any(is_skinny(u) and u.args[0] is node for u in node.users)  # its part of a group has gaps
            key = (alone, node if alone else node.args[0])
            groups.setdefault(key, []).append(node)  # grouped, all run with the first
        for group in groups.values():
            self._rewrite(gm.graph, group, flow)
        return PassResult(len(linears), True)

    @staticmethod
    def _rewrite(graph: fx.Graph, linears: list[fx.Node], flow: Dataflow) -> None:
        first, x = linears[0], linears[0].args[0]
        weights, biases = [n.args[1] for n in linears], [bias_of(n) for n in linears]
        norm = norm_before(x, linears, flow)  # type: ignore[arg-type]
        source = (norm.x, weights, biases, norm.weight, norm.eps) if norm else (x, weights, biases, None, 0.0)
        total = sum_after(first) if len(linears) == 1 else None
        last = first
        if total is not None:
            last, residual = total
        with graph.inserting_before(last):
            made = graph.call_function(
                torch.ops.skipc.skinny_linear.default,
                (*source, residual if total is not None else None, adapters_of(linears)),
            )
            made.meta = labels_of(first)
            infer(made)
            begin = 0
            for node in linears:
                part, replaced = made, last if total is not None else node
                if len(linears) > 1:
                    width = tensor(node).shape[-1]  # type: ignore[union-attr]
                    part = graph.call_function(torch.narrow, (made, -1, begin, width))
                    part.meta = labels_of(node)
                    infer(part)
                    begin += width
                replaced.replace_all_uses_with(part)
            drop_copies(made)
        for node in [last] if total is not None else linears:
            erase_unused(node)


def _why_not(linear: fx.Node) -> str:
    rows, dtype = native_rows(linear), tensor(linear).dtype  # type: ignore[union-attr]
    if not isinstance(rows, int):
        return "linear layers whose number of rows is known only at the call stay with torch"
    return f"linear layers of {rows} rows stay with torch, whose products are faster above {max_rows(dtype)} ({dtype})"
