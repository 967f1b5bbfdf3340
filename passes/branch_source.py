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


class Spans:
    """The spans of the branches of one graph."""

    def __init__(self, flow: Dataflow):
        self.flow = flow
        self.paths = {n: module_paths(n) for n in flow.nodes}
        calls = [n for n in flow.nodes if n.op.startswith("call")]
        self.last = {path: n for n in calls for path in self.paths[n]}  # of the nodes of a module
        self.first = {path: n for n in reversed(calls) for path in self.paths[n]}

    def of(self, term: Term, junction: Junction) -> Span | None:
        """The span of a branch; None if eager has no modules with these values, or they are not alike."""
        point, read = junction.point, _read(term, junction.point, self.flow)
        made = next((n for n in reversed(term.branch) if term.name in self.paths[n]), None)
        value = tensor(point)
        if made is None or value is None or value.dim() < 2 or not isinstance(value.shape[-1], int):
            return None
        for other in map(tensor, (made, read)):
            if other is None or other.dtype != value.dtype or not same_sizes(other.shape, value.shape):
                return None
        if not self.flow.depends(made, read) or any(map(is_heavy, term.branch[term.branch.index(made) + 1 :])):
            return None
        module = self.paths[read][-1] if self.paths[read] else ""
        if not module or self.last.get(module) is not read or f"{module}.".startswith(f"{term.name}."):
            return None
        if read is not point and point not in self.first[module].all_input_nodes:
            return None  # not the stream itself goes into that module
        return Span(point, read, made, Source(module, read is not point, value.shape[-1]))


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
