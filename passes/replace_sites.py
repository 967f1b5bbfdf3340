"""A graph in which replacements run in the place of some sites."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from skipc.passes.branch_spans import Span, Spans
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import add_input, erase_unused, infer, labels_of
from skipc.passes.ops import tensor
from skipc.passes.residual import Streams
from torch import fx

from skipc.ir.errors import PlanError
from skipc.ir.replacement import Affine, LowRank, Replaced


def replace_sites(gm: fx.GraphModule, streams: Streams, replaced: Replaced) -> None:
    """Edit ``gm``: each replaced site's module gives what its replacement makes. The tensors of the replacements become
    inputs of the graph, behind all others, in the order of ``replaced``. Sites keep their names and kinds.

    Args:
        gm: after the passes over whole graphs.
        streams: of ``gm``; edited, too.
        replaced: sites of ``gm``.

    Raises:
        PlanError: for a site whose branch does not begin and end where eager's modules do, or reads something else than
            its replacement was made of.
    """
    graph, terms = gm.graph, {t.name: (t, j) for j in streams.junctions for t in j.terms}
    flow = Dataflow(graph)
    spans, every = Spans(flow, streams.junctions), []
    for one in replaced.sites:
        span = spans.of(*terms[one.site])
        if span is None:
            raise PlanError(f"{one.site} cannot be replaced: its branch has no modules of its own in this graph")
        if span.source != one.source:
            raise PlanError(f"{one.site} reads {span.source}, and its replacement was made for {one.source}")
        every.append((one, span, [] if replaced.keep_keys else _private_writes(span, flow)))
    made_of: dict[fx.Node, fx.Node] = {}
    for one, span, writes in every:
        inputs = []
        for name, shape in zip(one.kind.names(), one.shapes, strict=True):
            inputs.append(_input(graph, f"{one.site}_{name}", shape, span))
        made = made_of[span.made] = _EMIT[one.kind](graph, span, inputs)
        span.made.replace_all_uses_with(made)
        erase_unused(span.made)
        for node in reversed(writes):
            sources = node.all_input_nodes
            graph.erase_node(node)
            for source in sources:
                erase_unused(source)
    graph.lint()
    gm.recompile()
    flow = Dataflow(graph)
    for term, junction in terms.values():
        term.value = made_of.get(term.value, term.value)
        term.branch = flow.between(junction.point, term.value)


def _input(graph: fx.Graph, name: str, shape: Sequence[int], span: Span) -> fx.Node:
    """A parameter of a replacement."""
    value = tensor(span.point)
    assert value is not None
    like = torch.empty(tuple(shape), dtype=value.dtype, device="meta")
    return add_input(graph, re.sub(r"\W+", "_", name), like, device=value.device)


def _affine(graph: fx.Graph, span: Span, inputs: Sequence[fx.Node]) -> fx.Node:
    scale, shift = inputs
    product = _call(graph, span, torch.mul, (span.point, scale))
    return _call(graph, span, torch.add, (product, shift))


def _low_rank(graph: fx.Graph, span: Span, inputs: Sequence[fx.Node]) -> fx.Node:
    down, up, shift = inputs
    inner = _call(graph, span, F.linear, (span.read, down, None))
    return _call(graph, span, F.linear, (inner, up, shift))


_EMIT = {Affine: _affine, LowRank: _low_rank}


def _call(graph: fx.Graph, span: Span, function: object, arguments: tuple[object, ...]) -> fx.Node:
    with graph.inserting_before(span.made):
        node = graph.call_function(function, arguments)  # type: ignore[arg-type]
    node.meta = labels_of(span.made)
    infer(node)
    return node


def _private_writes(span: Span, flow: Dataflow) -> list[fx.Node]:
    """Writes to caches that are made of the stream for this site, and that nobody else reads."""
    writes = [n for n, to in flow.writes.items() if to & flow.input_storages and flow.depends(n, span.point)]
    return [n for n in writes if flow.depends(span.made, n) and _only_for(n, span.made, flow)]


def _only_for(write: fx.Node, made: fx.Node, flow: Dataflow) -> bool:
    """Whether what ``write`` leaves behind goes into ``made`` and nowhere else."""
    waiting, seen = list(flow.users[write]), set()
    while waiting:
        node = waiting.pop()
        if node is made or node in seen:
            continue
        if not flow.depends(made, node):
            return False
        seen.add(node)
        waiting += flow.users[node]
    return True
