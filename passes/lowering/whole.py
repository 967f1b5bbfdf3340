"""The ``cond`` and ``static`` lowerings: the graph stays one graph, which Inductor compiles as a whole."""

from __future__ import annotations

from collections.abc import Iterable

from skipc.passes.dataflow import Dataflow
from skipc.passes.insert_gates import GatedGraph, insert_gates
from skipc.passes.lowering.arms import ArmBuilder
from skipc.passes.lowering.inductor import Compiled, compile_region
from skipc.passes.partition import Partition
from skipc.passes.residual import Streams
from torch import fx

from skipc.ir.config import Config
from skipc.ir.errors import UnknownSiteError
from skipc.ir.program import KVPolicy


def lower_cond(gm: fx.GraphModule, streams: Streams, config: Config) -> tuple[Compiled, GatedGraph]:
    """``gm`` with gates, as one Inductor graph."""
    gated = insert_gates(gm, streams, config.kv)
    return compile_region(gated.gm, config), gated


def lower_static(gm: fx.GraphModule, streams: Streams, config: Config) -> Compiled:
    """``gm`` without the sites of ``config.plan``, as one Inductor graph."""
    return compile_region(without(gm, streams, config.plan, config.kv), config)


def without(gm: fx.GraphModule, streams: Streams, plan: Iterable[str], kv: KVPolicy) -> fx.GraphModule:
    """``gm`` without the sites of ``plan``, and without what only they need.

    Raises:
        UnknownSiteError: for a name that is no site of the graph.
        PlanError: if ``kv`` would leave keys out that somebody reads.
    """
    gone, flow = frozenset(plan), Dataflow(gm.graph)
    known = [t.name for j in streams.junctions for t in j.terms]
    for name in sorted(gone.difference(known)):
        raise UnknownSiteError(name, known)
    partition = Partition(gm.graph, flow, streams.junctions)
    builder = ArmBuilder(partition)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}

    def lift(node: fx.Node) -> fx.Node:
        if node not in env and node.op == "get_attr":
            env[node] = graph.node_copy(node)
        return env[node]

    for node in flow.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
            env[node].meta = dict(node.meta)
            env[node]._dynamo_source = getattr(node, "_dynamo_source", None)  # type: ignore[attr-defined]
    for slot in partition.slots:
        skipped = [t for t in slot.junction.terms if t.name in gone] if slot.junction is not None else []
        arm = builder.allowed(slot, skipped, kv)
        env.update(arm.copy_into(graph, lift))
        env.update((escape, lift(twin)) for escape, twin in arm.copies)
    graph.output(fx.map_arg(flow.nodes[-1].args[0], lift))
    made = fx.GraphModule(gm, graph)
    made.graph.lint()
    return made
