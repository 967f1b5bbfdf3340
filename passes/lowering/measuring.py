"""Similarity from inside a region: the moments of the stream around a sublayer, where both points are in registers."""

from __future__ import annotations

from skipc.kernels.similarity import stream_moments
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import infer
from skipc.passes.lowering.arms import ArmGraph
from skipc.passes.lowering.regions import Region, kernel_calls
from skipc.passes.ops import same_sizes, tensor
from torch import fx


def points_of(arm: ArmGraph, before: fx.Node, after: fx.Node, flow: Dataflow) -> tuple[int, int] | None:
    """Where the stream ``before`` a slot is among the inputs of ``arm``, and ``after`` it among its outputs; None if
    the arm does not have both, or they cannot be compared token by token."""
    if before not in arm.inputs or after not in arm.outputs or flow.storages[before] & flow.written:
        return None
    x, y = tensor(before), tensor(after)
    if x is None or y is None or x.dim() < 2 or not same_sizes(x.shape, y.shape):
        return None
    if not (x.is_floating_point() and y.is_floating_point()):
        return None
    return arm.inputs.index(before), arm.outputs.index(after)


def measure(region: Region, points: tuple[int, int]) -> None:
    """Make ``region`` return moments, fp32 ``[..., 3]``, behind its other results. Inductor computes them in the loop
    that adds to the stream, so that nothing reads the stream once more. Regions that Inductor has no part in are left
    as they are."""
    if region.interpreted or kernel_calls(region.gm.graph):
        return
    graph = region.gm.graph
    output = next(iter(reversed(graph.nodes)))
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    results = output.args[0]
    with graph.inserting_before(output):
        found = graph.call_function(stream_moments, (inputs[points[0]], results[points[1]]))  # type: ignore[index]
    infer(found)
    output.args = ((*results, found),)  # type: ignore[misc]
    region.gm.recompile()
    region.measures = True
