"""A graph for weights of other shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from skipc.passes.fx_edit import copy_graph, fake_mode_of, infer
from skipc.passes.ops import in_model, is_parameter_like, path_of, same_sizes, tensors
from torch import fx

from skipc.ir.errors import PlanError


def weight_name(node: fx.Node) -> str | None:
    """The name in the model of the parameter that an input of a graph is; None for other inputs."""
    if node.op != "placeholder" or not is_parameter_like(node):
        return None
    path = in_model(path_of(node))
    return path[1:] if path is not None and path[:1] == "." and len(path) > 1 else None


def substitute_weights(gm: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> fx.GraphModule:
    """A copy of ``gm``, as Dynamo made it, in which the parameters of these names have these shapes.

    Raises:
        PlanError: if the graph cannot run with them, or if they change the shape of something that the caller sees.
    """
    gm = copy_graph(gm)
    mode = fake_mode_of(gm.graph)
    changed: dict[fx.Node, str] = {}  # nodes of another shape, and the parameter that is why
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name, old = weight_name(node), node.meta.get("example_value")
            if name is not None and name in shapes and tuple(old.shape) != tuple(shapes[name]):
                assert mode is not None
                with mode:
                    node.meta["example_value"] = torch.empty(shapes[name], dtype=old.dtype, device=old.device)
                changed[node] = name
            continue
        why = next((changed[n] for n in node.all_input_nodes if n in changed), None)
        if why is None:
            continue
        if node.op == "output":
            raise PlanError(f"the weight for {why} changes the shape of what the model returns")
        before, value = tensors(node), node.meta.get("example_value")
        try:
            infer(node)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PlanError(
                f"a weight of shape {list(shapes[why])} does not fit {why}: {node.format_node()}: {reason}"
            ) from error
        after = tensors(node)
        if len(before) == len(after) and all(_alike(a, b) for a, b in zip(before, after, strict=True)):
            node.meta["example_value"] = value  # whose storage later values share
        else:
            changed[node] = why
    gm.recompile()
    return gm


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return same_sizes(a.shape, b.shape) and same_sizes(a.stride(), b.stride())
