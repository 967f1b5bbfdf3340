"""What a branch of the residual stream is: its kind, its name, its layer. Kinds come from operations alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import networkx as nx
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import (
    ATTENTION,
    CASTS,
    HEAVY,
    MATMUL,
    ROUTING,
    SCALES,
    SOFTMAX,
    TOKEN_MIXING,
    VIEWS,
    argument,
    in_model,
    is_parameter_like,
    op_name,
    tensor,
)
from torch import fx

from skipc.ir.site import SiteKind


def is_heavy(node: fx.Node) -> bool:
    """True for operations whose cost is worth skipping: matrix products, convolutions, attention."""
    return op_name(node) in HEAVY


def attention_keys(branch: Iterable[fx.Node], flow: Dataflow) -> list[fx.Node]:
    """The key operands of the attentions in ``branch``: fused ones, and ``softmax(q @ k) @ v`` spelled out."""
    branch = list(branch)
    keys = []
    for node in branch:
        name = op_name(node)
        if name in ATTENTION:
            key = argument(node, "key", node.args[1] if len(node.args) > 1 else None)
            if isinstance(key, fx.Node):
                keys.append(key)
        elif name in SOFTMAX:
            scores = [
                m
                for m in branch
                if op_name(m) in MATMUL
                and flow.depends(node, m)
                and len(m.all_input_nodes) >= 2
                and not any(is_parameter_like(a) for a in m.all_input_nodes)
            ]
            mixed = [m for m in branch if op_name(m) in MATMUL and flow.depends(m, node)]
            if scores and mixed:
                keys.append(scores[-1].all_input_nodes[1])
    return keys


def kind_of(branch: Sequence[fx.Node], flow: Dataflow, stream: Iterable[fx.Node]) -> SiteKind:
    """The kind of a branch, given the nodes that open its residual stream (keys that depend on none are foreign)."""
    names = {op_name(n) for n in branch}
    keys = attention_keys(branch, flow)
    if keys:
        stream = list(stream)
        # Keys read straight from a cache depend on the stream through what was written there.
        writers = [w for w, storages in flow.writes.items() if any(storages & flow.storages[k] for k in keys)]
        own = any(k is s or flow.depends(k, s) for k in (*keys, *writers) for s in stream)
        return SiteKind.ATTENTION if own else SiteKind.CROSS_ATTENTION
    if names & ROUTING:
        return SiteKind.MOE
    if names & TOKEN_MIXING or _multiplies_activations(branch) or _mixes_transposed(branch, flow):
        return SiteKind.MIXER
    if names & HEAVY:
        return SiteKind.MLP
    return SiteKind.OTHER


def _multiplies_activations(branch: Sequence[fx.Node]) -> bool:
    """A matrix product of two values of the branch: linear attention."""
    inside = set(branch)
    return any(op_name(n) in MATMUL and len([a for a in n.all_input_nodes if a in inside]) >= 2 for n in branch)


def _mixes_transposed(branch: Sequence[fx.Node], flow: Dataflow) -> bool:
    """A linear over the token axis (MLP-Mixer): a transpose that moves the last axis, then a linear."""
    moved = [
        n
        for n in branch
        if op_name(n) in ("transpose", "swapaxes", "permute", "mT") and (t := tensor(n)) is not None and t.dim() >= 3
    ]
    for node in moved:
        base = tensor(node.args[0])
        if base is None or base.stride()[-1:] == tensor(node).stride()[-1:]:  # type: ignore[union-attr]
            continue
        if any(op_name(n) == "linear" and flow.depends(n, node) for n in branch):
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Names. Module paths label a site; nothing is decided by them.


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules that ``node`` was traced in, outermost first."""
    paths: list[str] = []
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
        path = path if (inside := in_model(path)) is None else inside
        path = re.sub(r"(?:\._modules)?\['?([^'\]]+)'?\]", r".\1", path)
        path = re.sub(r"@\d+", "", path).strip(".")
        path = re.sub(r"\.\w*forward\.__self__", "", path)  # a forward that somebody wrapped and set on the instance
        if path and (not paths or paths[-1] != path):
            paths.append(path)
    return paths


def branch_module(node: fx.Node, frame: Sequence[str]) -> str | None:
    """The outermost module that ``node`` was traced in but the addition, whose modules are ``frame``, was not."""
    return next((p for p in module_paths(node) if p not in frame), None)


def dominators(branch: Iterable[fx.Node], start: fx.Node, flow: Dataflow) -> dict[fx.Node, fx.Node]:
    """For each node of a branch, the next one towards ``start`` that all paths from there go through."""
    inside = {*branch, start}
    graph = nx.DiGraph([(s, n) for n in branch for s in flow.sources[n] if s in inside])
    return dict(nx.immediate_dominators(graph, start))


def name_of(add: fx.Node, start: fx.Node, branch: Sequence[fx.Node], kind: SiteKind, flow: Dataflow) -> str:
    """The module whose output, set to zero, makes ``branch`` vanish: walk from the addition towards the heavy work,
    through scales and norms that keep zero, and take the outermost module there."""
    frame = module_paths(add)
    above = dominators(branch, start, flow)
    heavy_modules = {p for n in branch if is_heavy(n) for p in module_paths(n)}
    best: str | None = None
    node = branch[-1]
    while node is not start and _keeps_zero(node, branch, flow):
        module = branch_module(node, frame)
        if module is not None:
            best = module
            if module in heavy_modules:
                break
        elif is_heavy(node):
            break
        node = above[node]
    return best or ".".join([*frame[-1:], f"<{kind.value}>"])  # no module's path: nothing in eager to zero


_ZERO_IF_ANY = SCALES - {"div", "truediv", "__truediv__"} | MATMUL | {"mm"}
_ZERO_IF_FIRST = (
    CASTS
    | VIEWS
    | frozenset(
        [
            "div",
            "truediv",
            "__truediv__",
            "neg",
            "abs",
            "square",
            "sqrt",
            "mean",
            "sum",
            "transpose",
            "permute",
            "expand",
            "getitem",
            "gelu",
            "silu",
            "relu",
            "tanh",
            "rms_norm",
            "_fused_rms_norm",
            "roll",
            "repeat",
            "drop_path",
        ]
    )
)


def _keeps_zero(node: fx.Node, branch: Sequence[fx.Node], flow: Dataflow) -> bool:
    """True if the branch is zero wherever ``node`` is: evaluate the rest of it with zero for ``node``."""
    zero = {node}
    for n in branch:
        if n is node or not flow.depends(n, node):
            continue
        name = op_name(n)
        operands = [a for a in n.args if isinstance(a, fx.Node)]
        first = operands[0] if operands else None
        if name in _ZERO_IF_ANY:
            is_zero = any(a in zero for a in operands)
        elif name == "linear":  # a builtin: no signature to ask
            is_zero = first in zero and (n.args[2] if len(n.args) > 2 else n.kwargs.get("bias")) is None
        elif name in ("layer_norm", "group_norm"):
            is_zero = first in zero and argument(n, "bias") is None
        elif name == "pow":
            is_zero = first in zero and isinstance(n.args[-1], int | float) and n.args[-1] > 0
        elif name in ("add", "sub", "__add__", "cat", "stack"):
            is_zero = bool(n.all_input_nodes) and all(a in zero for a in n.all_input_nodes)
            is_zero = is_zero and not any(isinstance(a, int | float) and a != 0 for a in n.args)
        else:
            is_zero = name in _ZERO_IF_FIRST and first in zero
        if is_zero:
            zero.add(n)
    return branch[-1] in zero


def layers_of(names: Sequence[str], kinds: Sequence[SiteKind]) -> list[int]:
    """Layer of each site of one stream: the first index in its module path where that counts layers, otherwise by
    structure, a layer beginning wherever a kind of sublayer comes again."""
    from_path = [int(m.group(1)) if (m := re.search(r"(?:^|\.)(\d+)(?=\.|$)", n)) else -1 for n in names]
    steps_up = from_path[0] == 0 and all(0 <= b - a <= 1 for a, b in pairwise(from_path))
    attentions = [n for n, k in zip(from_path, kinds, strict=True) if k == SiteKind.ATTENTION]
    if steps_up and len(set(attentions)) == len(attentions) and len(set(names)) == len(names):
        return from_path
    layers: list[int] = []
    layer = 0
    seen: set[SiteKind] = set()
    for kind in kinds:
        if kind in seen:
            layer += 1
            seen.clear()
        seen.add(kind)
        layers.append(layer)
    return layers
