"""Sublayers in a form that looks at a gate on the device before it runs."""

from __future__ import annotations

from skipc.passes.fx_edit import copy_graph
from skipc.passes.lower_gated_mlp import lower_gated_mlps
from skipc.passes.lowering.regions import kernel_calls
from skipc.passes.ops import tensor
from skipc.passes.skinny import is_few_on_gpu
from torch import fx

from skipc.ir.program import Input, KernelCall


def predicated(gm: fx.GraphModule) -> KernelCall | None:
    """What ``gm`` does as one kernel that a gate can turn into ``stream = residual``: a gated MLP of few rows on a GPU,
    added to the stream. It may name adapters, which Triton's kernel does not know. None if ``gm``, which stays as it
    was, does anything else."""
    if not any(map(is_few_on_gpu, gm.graph.nodes)):
        return None
    graph = copy_graph(gm).graph
    lower_gated_mlps(graph, list(graph.nodes), is_few_on_gpu)
    calls = kernel_calls(graph)
    if len(calls) != 1 or calls[0].name != "gated_mlp":
        return None
    values = [tensor(n) for n in graph.nodes if n.op == "placeholder"]
    x, *_, residual, _ = calls[0].arguments
    rows = [values[a.index] if isinstance(a, Input) else None for a in (x, residual)]
    return calls[0] if all(t is not None and t.is_contiguous() for t in rows) else None
