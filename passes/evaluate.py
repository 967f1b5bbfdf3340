"""What a few nodes compute, found out by computing it: on random fp64 numbers, against a definition.

Only rational functions and views are let through. Two of these that agree on random numbers are the same, but for an
event of probability zero (Schwartz, J. ACM 27(4), 1980), so what is recognised does not depend on how it is spelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from skipc.passes.ops import PARTS, VIEWS, op_name, tensor, written_arguments
from torch import fx

_CASTS = frozenset(["to", "float", "bfloat16", "type", "type_as"])
_ARITHMETIC = frozenset(["mul", "__mul__", "add", "__add__", "sub", "neg", "__neg__", "pow", "square", "mean", "rsqrt"])
EXACT = VIEWS | PARTS | _ARITHMETIC | {"contiguous", "cat", "rms_norm", "arange"}


def leaves_of(node: fx.Node, inside: set[fx.Node]) -> dict[fx.Node, None] | None:
    """What ``node`` is computed from by exact operations, all of which are added to ``inside``: inputs of the graph and
    native linear layers. None if other operations take part."""
    leaves: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "placeholder" or n.target is torch.ops.skipc.skinny_linear.default:
            leaves[n] = None
        elif _is_exact(n, node):
            inside.add(n)
            stack += n.all_input_nodes
        else:
            return None
    return leaves


def _is_exact(node: fx.Node, result: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or written_arguments(node):
        return False
    return is_idle_cast(node, result) if op_name(node) in _CASTS else op_name(node) in EXACT


def is_idle_cast(node: fx.Node, result: fx.Node) -> bool:
    """True for a cast that may be passed over on the way to ``result``, because it rounds no more than the dtype of
    ``result`` does. (A cast to fewer bits is meant: quantised keys, say.)"""
    if op_name(node) not in _CASTS:
        return False
    before, after, last = tensor(node.args[0]), tensor(node), tensor(result)
    if before is None or after is None or last is None or before.is_floating_point() != after.is_floating_point():
        return False
    return not after.is_floating_point() or torch.finfo(after.dtype).eps <= torch.finfo(last.dtype).eps


def evaluate(node: Any, numbers: dict[fx.Node, torch.Tensor]) -> Any:
    """``node`` on the given values of its leaves, in fp64 all through; None if that fails."""
    known: dict[fx.Node, Any] = dict(numbers)

    def value(n: fx.Node) -> Any:
        if n not in known:
            args, kwargs = fx.map_arg((n.args, n.kwargs), value)  # type: ignore[arg-type]
            if op_name(n) in _CASTS:
                known[n] = args[0]
            elif n.op == "call_method":
                known[n] = getattr(args[0], str(n.target))(*args[1:], **kwargs)
            else:
                known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return known[n]

    try:
        return value(node)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return None


def is_static(node: fx.Node) -> bool:
    """True for a tensor whose sizes are numbers."""
    value = tensor(node)
    return value is not None and all(isinstance(n, int) for n in value.shape)


def random_values(nodes: Iterable[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Random fp64 numbers for some tensors."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(tensor(n).shape, dtype=torch.float64, generator=generator) for n in nodes}  # type: ignore[union-attr]


def same_values(a: Any, b: torch.Tensor) -> bool:
    """True if ``a`` is a tensor that equals ``b`` up to fp64's rounding."""
    return isinstance(a, torch.Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-10, 1e-10)
