"""The ways in which models spell attention, read into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from skipc.kernels.device import on_cpu, on_gpu
from skipc.kernels.library import NATIVE, TRITON
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import argument, op_name, same_sizes, tensor
from torch import fx

_SUM = frozenset(["add", "__add__"])
_PRODUCT = frozenset(["mul", "__mul__"])
_QUOTIENT = frozenset(["div", "truediv", "__truediv__"])
_MATMUL = frozenset(["matmul", "__matmul__"])


@dataclass
class Attention:
    """Softmax attention over four-dimensional heads. ``key`` and ``value`` are taken before heads are repeated."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    softcap: float
    repeated: bool  # heads were repeated in memory, or would be by ``enable_gqa``
    parts: tuple[Any, ...]  # nodes whose reads move to where the result is computed


def read_attention(node: Any) -> Attention | None:
    """The attention whose result ``node`` is, if it has a form known here and dtypes that our kernels take."""
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        found = _fused(node)
    elif name in _MATMUL:
        found = _spelled_out(node)
    else:
        return None
    return found if found is not None and _supported(found) else None


def _fused(node: Any) -> Attention | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if len(node.args) > len(names) or given.get("dropout_p", 0.0) != 0.0:
        return None
    query, mask, scale = given["query"], given.get("attn_mask"), given.get("scale")
    key, value, gqa = given["key"], given["value"], bool(given.get("enable_gqa", False))
    causal = given.get("is_causal", False)
    q = tensor(query)
    if q is None or not isinstance(causal, bool) or not isinstance(q.shape[-1], int) or q.dim() != 4:
        return None
    if scale is None:
        scale = q.shape[-1] ** -0.5
    parts = (key, value)
    key, value, repeated = _unrepeated_pair(key, value)
    return Attention(query, key, value, mask, causal, scale, 0.0, repeated or gqa, parts if repeated else ())


def _spelled_out(node: Any) -> Attention | None:
    """``softmax(softcap * tanh(q @ k.T * scale / softcap) + mask) @ v``, each part but the products optional."""
    weights, value = node.args
    weights = _through(weights, {"to", "type_as"})
    softmax = weights if op_name(weights) in ("softmax", "_softmax") else None
    if softmax is None or argument(softmax, "dim", softmax.args[1] if len(softmax.args) > 1 else None) not in (-1, 3):
        return None
    at = softmax.args[0]
    mask, scale, softcap = None, 1.0, 0.0
    if op_name(at) in _SUM and isinstance(at.args[1], fx.Node) and not at.kwargs:
        at, mask = at.args
        added = tensor(mask)
        if added is None or added.dtype == torch.bool:  # adds 0 or 1, forbids nothing
            return None
    if op_name(at) in _PRODUCT and _number(at.args[1]) and op_name(at.args[0]) == "tanh":
        tanh = at.args[0]
        softcap, inner = at.args[1], tanh.args[0]
        if op_name(inner) not in _QUOTIENT or inner.args[1] != softcap or inner.kwargs or softcap <= 0:
            return None
        at = inner.args[0]
    if op_name(at) in _PRODUCT and _number(at.args[1]):
        at, scale = at.args
    elif op_name(at) in _QUOTIENT and _number(at.args[1]) and not at.kwargs:
        at, scale = at.args[0], 1.0 / at.args[1]
    if op_name(at) not in _MATMUL:
        return None
    query, turned = at.args
    if not _swaps_last(turned):
        return None
    parts = (at, turned.args[0], value)
    key, value, repeated = _unrepeated_pair(turned.args[0], value)
    return Attention(query, key, value, mask, False, float(scale), float(softcap), repeated, parts)


def undisturbed(node: fx.Node, found: Attention, flow: Dataflow) -> bool:
    """True if nothing that ``found`` reads is written between where it is read now and ``node``, where it will be."""
    start = min((flow.order[p] for p in found.parts if p in flow.order), default=flow.order[node])
    between = flow.nodes[start : flow.order[node]]
    written = frozenset().union(*(flow.writes[n] for n in between if n in flow.writes))
    read = (n for n in (found.query, found.key, found.value, found.mask) if n is not None)
    return not any(flow.storages.get(n, frozenset()) & written for n in read)


def _supported(a: Attention) -> bool:
    q, k, v = tensor(a.query), tensor(a.key), tensor(a.value)
    if q is None or k is None or v is None or not q.dim() == k.dim() == v.dim() == 4:
        return False
    if any(t.device != q.device or t.dtype != q.dtype for t in (q, k, v)):
        return False
    if not (on_cpu(q) and q.dtype in NATIVE) and not (on_gpu(q) and q.dtype in TRITON):
        return False
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return False
    if not all(isinstance(n, int) for t in (q, k, v) for n in (t.shape[1], t.shape[3])):
        return False
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1] or q.shape[3] != k.shape[3]:
        return False
    if not isinstance(a.scale, int | float) or q.stride(-1) != 1:
        return False
    if not same_sizes((q.shape[0], k.shape[2], k.shape[0]), (k.shape[0], v.shape[2], v.shape[0])):
        return False
    if a.mask is None:
        return True
    mask = tensor(a.mask)
    return mask is not None and mask.dim() <= 4 and mask.dtype in (torch.bool, q.dtype) and not a.causal


def _unrepeated_pair(key: Any, value: Any) -> tuple[Any, Any, bool]:
    """Keys and values before their heads were repeated, if both were, alike."""
    k, v = _unrepeated(key), _unrepeated(value)
    if k is None or v is None or tensor(k) is None or tensor(v) is None:
        return key, value, False
    if tensor(k).shape[1] != tensor(v).shape[1]:  # type: ignore[union-attr]
        return key, value, False
    return k, v, True


def _unrepeated(node: Any) -> fx.Node | None:
    """What ``repeat_kv`` or ``repeat_interleave`` over heads was given."""
    after = tensor(node)
    if after is None or after.dim() != 4:
        return None
    if op_name(node) == "repeat_interleave":
        source, count = node.args[0], argument(node, "repeats", node.args[1] if len(node.args) > 1 else None)
        axis = argument(node, "dim", node.args[2] if len(node.args) > 2 else node.kwargs.get("dim"))
        return source if isinstance(count, int) and axis in (1, -3) and isinstance(source, fx.Node) else None
    if op_name(node) not in ("reshape", "view", "flatten"):
        return None
    expanded = node.args[0]
    if op_name(expanded) not in ("expand", "broadcast_to"):
        return None
    wide, inserted = tensor(expanded), expanded.args[0]
    narrow = tensor(inserted)
    if wide is None or narrow is None or wide.dim() != 5 or narrow.dim() != 5 or narrow.shape[2] != 1:
        return None
    source = inserted.args[0] if _inserts_axis_two(inserted) else None
    before = tensor(source)
    if before is None or before.dim() != 4:
        return None
    same = same_sizes((*wide.shape[:2], *wide.shape[3:]), before.shape)
    merged = same_sizes(after.shape, (wide.shape[0], wide.shape[1] * wide.shape[2], *wide.shape[3:]))
    return source if same and merged else None


def _inserts_axis_two(node: Any) -> bool:
    if op_name(node) == "unsqueeze":
        return argument(node, "dim", node.args[1] if len(node.args) > 1 else None) == 2
    index = node.args[1] if op_name(node) in ("getitem", "__getitem__") else None
    full = slice(None, None, None)
    return isinstance(index, tuple) and index[:3] == (full, full, None) and all(i == full for i in index[3:])


def _swaps_last(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    arguments: Any = node.args
    if op_name(node) in ("transpose", "swapaxes") and len(arguments) == 3:
        return {arguments[1] % 4, arguments[2] % 4} == {2, 3}
    return op_name(node) == "permute" and tuple(arguments[1:]) in ((0, 1, 3, 2), ((0, 1, 3, 2),))


def _through(node: Any, names: set[str]) -> Any:
    """``node``, or what it casts."""
    while isinstance(node, fx.Node) and op_name(node) in names:
        node = node.args[0]
    return node


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
