"""Small edits of FX graphs that keep ``meta["example_value"]`` right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from skipc.passes.ops import written_arguments
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode in which Dynamo made the example values of ``graph``. (AOTAutograd's is another one: never mix.)"""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def values_of(args: Any) -> Any:
    """``args`` of a node with every node in them replaced by its example value."""
    return fx.map_arg(args, lambda n: n.meta["example_value"])


def infer(node: fx.Node) -> None:
    """Set the example value of ``node`` by running it on those of its arguments."""
    mode = fake_mode_of(node.graph)
    assert mode is not None, "graph without tensors"
    args, kwargs = values_of(node.args), values_of(node.kwargs)
    shape_env = mode.shape_env
    assert shape_env is not None
    with mode, torch.no_grad(), shape_env.ignore_fresh_unbacked_symbols():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta["example_value"] = value


def infer_new(graph: fx.Graph, inherit: fx.Node) -> None:
    """Infer every node that has no metadata yet, giving it the labels (module, stack trace) of ``inherit``."""
    for node in graph.nodes:
        if (
            "example_value" in node.meta
            or node.op in ("placeholder", "output", "get_attr")
            or node.meta.get("statement")
        ):
            continue
        for label, value in labels_of(inherit).items():
            node.meta.setdefault(label, value)
        infer(node)


def labels_of(node: fx.Node) -> dict[str, Any]:
    """The labels (module, stack trace) of ``node``, for a node that takes its place."""
    return {k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "source_fn_stack") if k in node.meta}


def last_input(graph: fx.Graph) -> fx.Node:
    """The last placeholder: inputs stay together."""
    return next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")


def add_input(
    graph: fx.Graph,
    name: str,
    like: torch.Tensor,
    constant: torch.Tensor | None = None,
    device: torch.device | None = None,
    parameter: bool = True,
) -> fx.Node:
    """An input of the form of ``like`` (on another device, if that is given) behind all others. A ``constant`` is what
    the program passes at each call; a ``parameter`` is part of the model, as far as passes ask."""
    mode, last = fake_mode_of(graph), last_input(graph)
    assert mode is not None
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with mode:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device or like.device)
    made._is_param = parameter  # type: ignore[attr-defined]
    node.meta["example_value"] = made
    node._dynamo_source = None  # type: ignore[attr-defined]
    if constant is not None:
        node.meta["constant"] = constant
    return node


def constants_of(graph: fx.Graph) -> list[torch.Tensor]:
    """What passes made inputs of that are the same at each call, in order. They lie behind the inputs of calls."""
    return [n.meta["constant"] for n in graph.nodes if n.op == "placeholder" and "constant" in n.meta]


def erase_unused(node: fx.Node) -> None:
    """Erase ``node`` and then, one by one, the arguments that nobody else uses and that do nothing but compute.
    (``eliminate_dead_code`` would take writes to caches with it.)"""
    waiting, erased = [node], set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method") or written_arguments(node):
            continue
        waiting += node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)


def replace_uses_after(node: fx.Node, old: fx.Node, new: fx.Node, order: dict[fx.Node, int]) -> None:
    """Make the users of ``old`` that run after ``node`` use ``new``."""
    for user in list(old.users):
        if user is not new and order[user] > order[node]:
            user.replace_input_with(old, new)


def positions(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """The place of each node in its graph."""
    return {node: i for i, node in enumerate(nodes)}


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares parameters and example values, and keeps Dynamo's marks on placeholders (which FX drops)."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(iter(reversed(gm.graph.nodes)))
    graph.output(output).meta.update(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy
