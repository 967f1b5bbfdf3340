"""Where a branch of the residual stream begins and ends, in terms of modules: what a replacement reads and makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skipc.passes.classify import dominators, is_heavy, module_paths
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

    def __init__(self, flow: Dataflow, junctions: Iterable[Junction]):
        self.flow = flow
        names = [t.name.split("#") for j in junctions for t in j.terms]
        self.shared = {name for name, *again in names if again}  # modules that run several times
        self.paths = {n: module_paths(n) for n in flow.nodes}
        calls = [n for n in flow.nodes if n.op.startswith("call")]
        self.last = {path: n for n in calls for path in self.paths[n]}  # of the nodes of a module
        self.first = {path: n for n in reversed(calls) for path in self.paths[n]}

    def of(self, term: Term, junction: Junction) -> Span | None:
        """The span of a branch; None if eager has no modules with these values, or they are not alike."""
        point, read = junction.point, _read(term, junction.point, self.flow)
        made = next((n for n in reversed(term.branch) if term.name in self.paths[n]), None)
        value = tensor(point)
        if term.name.split("#")[0] in self.shared:
            return None
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
    above = dominators(term.branch, point, flow)
    chains = [_chain(node, point, above) for node in term.branch if is_heavy(node) and node in above]
    common = set.intersection(*map(set, chains)) if chains else {point}
    value = tensor(point)
    alike = [
        n for n in common if (t := tensor(n)) is not None and value is not None and same_sizes(t.shape, value.shape)
    ]
    return max(alike, key=flow.order.__getitem__, default=point)


def _chain(node: fx.Node, start: fx.Node, above: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The nodes that everything on the way from ``start`` to ``node`` goes through."""
    chain = []
    while node is not start:
        node = above[node]
        chain.append(node)
    return chain
