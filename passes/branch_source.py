"""Where a branch of the residual stream begins and ends, in terms of modules: what a replacement reads and makes."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from skipc.passes.classify import is_heavy, module_paths
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import same_sizes, tensor
from skipc.passes.residual import Junction, Term
from torch import fx

from skipc.ir.site import Source


@dataclass(frozen=True)
class Span:
    """What a replacement reads, ``point`` (the stream) and ``read`` (which its branch reads, behind a norm if there is
    one), and the value ``made`` that it takes the place of: the output of the module that the site is named after."""

    point: fx.Node
    read: fx.Node
    made: fx.Node
    source: Source


def span_of(term: Term, junction: Junction, flow: Dataflow) -> Span | None:
    """The span of a branch; None if eager has no modules with these values, or they are not alike."""
    made = next((n for n in reversed(term.branch) if term.name in module_paths(n)), None)
    point, read = junction.point, _read(term, junction.point, flow)
    value, width = tensor(point), 0
    if made is None or value is None or value.dim() < 2:
        return None
    for other in map(tensor, (made, read)):
        if other is None or other.dtype != value.dtype or not same_sizes(other.shape, value.shape):
            return None
    if not isinstance(width := value.shape[-1], int) or not flow.depends(made, read) or not _all_through(made, term):
        return None
    paths = module_paths(read)
    if not paths or read.op == "placeholder":
        return None
    module = paths[-1]
    last = max((n for n in flow.nodes if module in module_paths(n)), key=flow.order.__getitem__)
    if last is not read or module == term.name or module.startswith(f"{term.name}."):
        return None
    return Span(point, read, made, Source(module, read is not point, width))


def _read(term: Term, point: fx.Node, flow: Dataflow) -> fx.Node:
    """The last value that everything heavy in a branch is made of."""
    inside = {*term.branch, point}
    graph = nx.DiGraph([(s, n) for n in term.branch for s in flow.sources[n] if s in inside])
    dominators = nx.immediate_dominators(graph, point)
    chains = []
    for node in term.branch:
        if is_heavy(node) and node in dominators:
            chain = []
            while node is not point:
                node = dominators[node]
                chain.append(node)
            chains.append(chain)
    common = set(chains[0]).intersection(*chains[1:]) if chains else {point}
    value = tensor(point)
    alike = [
        n for n in common if (t := tensor(n)) is not None and value is not None and same_sizes(t.shape, value.shape)
    ]
    return max(alike, key=flow.order.__getitem__, default=point)


def _all_through(made: fx.Node, term: Term) -> bool:
    """Whether nothing heavy of the branch comes after ``made``."""
    return not any(is_heavy(n) for n in term.branch[term.branch.index(made) + 1 :])
