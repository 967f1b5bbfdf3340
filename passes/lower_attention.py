"""Call skipc's own kernel for attention of a few queries."""

from __future__ import annotations

import torch
from skipc.kernels import native
from skipc.kernels.attention import MAX_ROWS
from skipc.kernels.device import on_cpu
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.ops import tensor
from torch import fx


class LowerAttention(Pass):
    """Turn grouped attention of a known, small number of queries into the native kernel, or the one for GPUs. It reads
    each key once for all queries that share it.

    Before::

        %a : f32[2, 4, 1, 16] = skipc.grouped_attention(%q, %k, %v, %m, %live, False, 0.25, 0.0)

    After::

        %a : f32[2, 4, 1, 16] = skipc.decode_attention(%q, %k, %v, %m, %live, False, 0.25, 0.0)

    Leaves alone: a number of queries that is large or known only at the call, and machines without a C++ compiler.
    (Both still run ``grouped_attention``, which decides at the call.)
    """

    name = "lower_attention"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        every = [n for n in gm.graph.nodes if n.target is torch.ops.skipc.grouped_attention.default]
        nodes = [n for n in every if _small(n)]
        reason = native.available() if any(on_cpu(tensor(n)) for n in nodes) else None  # type: ignore[arg-type]
        if every and not nodes:
            reason = f"torch's attention for more than {MAX_ROWS} queries of a key head, or a number not known yet"
        if reason is not None:
            return PassResult(notes=(reason,))
        for node in nodes:
            node.target = torch.ops.skipc.decode_attention.default
        return PassResult(len(nodes), bool(nodes))


def _small(node: fx.Node) -> bool:
    q, k = tensor(node.args[0]), tensor(node.args[1])
    assert q is not None
    assert k is not None
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return isinstance(rows, int) and rows <= MAX_ROWS
