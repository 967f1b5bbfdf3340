"""Find the skippable sublayers of a graph."""

from __future__ import annotations

from itertools import groupby

from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.classify import layers_of, name_of
from skipc.passes.dataflow import Dataflow
from skipc.passes.residual import StreamFinder
from torch import fx


class FindSites(Pass):
    """Find the residual streams and the branches that rejoin them, and give each a name, a kind and a layer.

    Before::

        %n : f32[2, 7, 64] = layer_norm(%x, (64,), %g, %b)
        %o : f32[2, 7, 64] = linear(%n, %w)
        %y : f32[2, 7, 64] = add(%x, %o)

    After: the graph as it was, and one junction: point %x, sum %y, branch [%n, %o], an MLP.

    Leaves alone: everything; what looks like a site and is none is reported with its reason.
    """

    name = "find_sites"
    optional = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        flow = Dataflow(gm.graph)
        streams = StreamFinder(gm.graph, flow).find()
        terms = [(j, t) for j in streams.junctions for t in j.terms]
        seen: dict[str, int] = {}
        for junction, term in terms:
            name = name_of(junction.add, junction.point, term.branch, term.kind, flow)
            seen[name] = seen.get(name, 0) + 1
            term.name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        by_stream = sorted(terms, key=lambda jt: jt[0].stream)
        for _, members in groupby(by_stream, key=lambda jt: jt[0].stream):
            stream = [term for _, term in members]
            for term, layer in zip(stream, layers_of([t.name for t in stream], [t.kind for t in stream]), strict=True):
                term.layer = layer
        ctx.streams = streams
        return PassResult(len(terms), notes=tuple(map(str, streams.rejected)))
