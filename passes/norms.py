"""RMS norms, however they are spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from skipc.passes.evaluate import is_idle_cast
from skipc.passes.ops import op_name, tensor
from torch import fx

_PRODUCT = frozenset(["mul", "__mul__"])
_SUM = frozenset(["add", "__add__"])


@dataclass
class RMSNorm:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` over the last axis."""

    x: fx.Node
    weight: fx.Node
    eps: float


def read_rms_norm(node: fx.Node) -> RMSNorm | None:
    """The norm whose result ``node`` is: ``torch.rms_norm``, or its arithmetic in fp32 with casts around it."""
    if op_name(node) == "rms_norm":
        return _fused(node)
    if op_name(node) not in _PRODUCT or len(node.args) != 2:
        return None
    for weight, scaled in (node.args, node.args[::-1]):
        if isinstance(weight, fx.Node) and isinstance(scaled, fx.Node) and _is_weight(weight):
            found = _arithmetic(_through_casts(scaled, node), node)
            if found is not None and _fits(node, found[0], weight):
                return RMSNorm(found[0], weight, found[1])
    return None


def _fused(node: Any) -> RMSNorm | None:
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False)) | node.kwargs
    x, shape, weight, eps = map(given.get, ("input", "normalized_shape", "weight", "eps"))
    if (
        not isinstance(x, fx.Node)
        or not isinstance(weight, fx.Node)
        or shape is None
        or len(shape) != 1
        or not _is_weight(weight)
    ):
        return None
    value = tensor(x)
    if eps is None and value is not None:
        eps = torch.finfo(value.dtype).eps
    return RMSNorm(x, weight, eps) if isinstance(eps, float) and _fits(node, x, weight) else None


def _arithmetic(node: Any, result: fx.Node) -> tuple[fx.Node, float] | None:
    """``x * rsqrt(mean(x ** 2, -1, keepdim) + eps)``: x before any cast, and eps."""
    if op_name(node) not in _PRODUCT or len(node.args) != 2:
        return None
    for wide, root in (node.args, node.args[::-1]):
        if not isinstance(root, fx.Node) or not isinstance(wide, fx.Node) or op_name(root) != "rsqrt":
            continue
        total: Any = root.args[0]
        if op_name(total) not in _SUM or total.kwargs or not isinstance(total.args[1], float):
            continue
        mean, eps = total.args
        if op_name(mean) != "mean" or not over_last(mean):
            continue
        square = mean.args[0]
        squared = op_name(square) in ("pow", "square") and (op_name(square) == "square" or square.args[1] in (2, 2.0))
        twice = op_name(square) in _PRODUCT and square.args[0] is square.args[1]
        if (squared or twice) and square.args[0] is wide and _wide(wide):
            return _through_casts(wide, result), eps
    return None


def _wide(node: Any) -> bool:
    value = tensor(node)
    return value is not None and value.dtype == torch.float32


def over_last(mean: Any) -> bool:
    """True for a mean over the last axis that keeps it."""
    dim = mean.kwargs.get("dim", mean.args[1] if len(mean.args) > 1 else None)
    keep = mean.kwargs.get("keepdim", mean.args[2] if len(mean.args) > 2 else False)
    value = tensor(mean.args[0])
    rank = value.dim() if value is not None else 0
    return keep is True and dim in (-1, (-1,), [-1], rank - 1)


def _through_casts(node: Any, result: fx.Node) -> Any:
    while isinstance(node, fx.Node) and is_idle_cast(node, result):
        node = node.args[0]
    return node


def _is_weight(node: fx.Node) -> bool:
    value = tensor(node)
    return node.op in ("placeholder", "get_attr") and value is not None and value.dim() == 1


def _fits(node: fx.Node, x: fx.Node, weight: fx.Node) -> bool:
    """One dtype all through (but for what is inside), one width, contiguous."""
    out, value, w = tensor(node), tensor(x), tensor(weight)
    if out is None or value is None or w is None:
        return False
    return (
        out.dtype == value.dtype == w.dtype
        and out.shape == value.shape
        and tuple(w.shape) == tuple(value.shape[-1:])
        and w.stride(0) == 1
        and value.is_contiguous()
    )
