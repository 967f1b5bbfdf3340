"""Which dimension of each value counts tokens, and whether each token's part is made of that token alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from skipc.passes.ops import LINEARS, argument, op_name, same_sizes, tensor, written_arguments
from torch import fx

_ELEMENTWISE = frozenset(
    ["add", "sub", "rsub", "mul", "div", "truediv", "neg", "pow", "square", "sqrt", "rsqrt", "exp", "clamp", "where",
     "masked_fill", "relu", "silu", "gelu", "tanh", "sigmoid", "dropout", "to", "float", "bfloat16", "type", "type_as",
     "contiguous", "clone", "identity"]
)  # fmt: skip
_RESHAPED = frozenset(["view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as"])
_ATTENTION = frozenset(["scaled_dot_product_attention", "grouped_attention", "decode_attention"])


def token_dims(nodes: Iterable[fx.Node], size: torch.SymInt) -> dict[fx.Node, int | None] | None:
    """Follow the tokens through ``nodes``, in order.

    Args:
        nodes: operations. What they read from elsewhere has its tokens where its size is ``size``.
        size: how many tokens there are: a symbol, so that no other size is equal by accident.

    Returns:
        For each tensor, its dimension of tokens, None for what is the same for all; None if some operation is not known
        to treat every token by itself.
    """
    found: dict[fx.Node, Any] = {}
    for node in nodes:
        for outer in node.all_input_nodes:
            if outer not in found and not _enter(outer, size, found):
                return None
        if _is_number(node):
            found[node] = None
            continue
        try:
            found[node] = _follow(node, found, size)
        except (_Mixed, ValueError, IndexError, KeyError, TypeError):  # or arguments given in an unusual way
            return None
    return found


class _Mixed(Exception):
    """Tokens may meet, or it is not known that they do not."""


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), int | torch.SymInt | torch.Size)


def _counts(node: fx.Node, size: torch.SymInt) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.SymInt) and bool(value.node.expr.free_symbols & size.node.expr.free_symbols)


def _enter(node: fx.Node, size: torch.SymInt, found: dict[fx.Node, Any]) -> bool:
    value = tensor(node)
    if value is None:
        found[node] = None
        return node.op == "get_attr" or _is_number(node)
    places = _places(value, size)
    found[node] = places[0] if places else None
    return len(places) < 2


def _places(value: torch.Tensor, size: torch.SymInt) -> list[int]:
    symbols = size.node.expr.free_symbols
    return [d for d, n in enumerate(value.shape) if isinstance(n, torch.SymInt) and n.node.expr.free_symbols & symbols]


def _follow(node: fx.Node, found: dict[fx.Node, Any], size: torch.SymInt) -> Any:
    several: Any = found.get(node.all_input_nodes[0]) if node.target is operator.getitem else None
    if isinstance(several, list):
        return several[node.args[1]]  # type: ignore[index]
    if written_arguments(node):
        raise _Mixed
    given = {n: found[n] for n in node.all_input_nodes if tensor(n) is not None and found[n] is not None}
    if any(_counts(n, size) for n in node.all_input_nodes) and op_name(node) not in (*_RESHAPED, "expand"):
        raise _Mixed  # the number of tokens, as a value
    values = [v for v in torch.utils._pytree.tree_leaves(node.meta.get("example_value")) if isinstance(v, torch.Tensor)]
    if not values or (not given and any(_places(v, size) for v in values)):
        raise _Mixed  # it makes tokens of nothing: positions, say
    if not given:
        return None
    dims = [_dimension(node, given, v) for v in values]
    for v, dim in zip(values, dims, strict=True):
        if _places(v, size) != [dim] or not same_sizes([v.shape[dim]], [size]):
            raise _Mixed
    return dims[0] if isinstance(node.meta.get("example_value"), torch.Tensor) else dims


def _dimension(node: fx.Node, given: dict[fx.Node, int], value: torch.Tensor) -> int:
    """Where the tokens are in ``value``, one of the results of ``node``."""
    name = op_name(node).strip("_")
    first = node.args[0] if node.args else None
    if name in _ELEMENTWISE:
        return _one(value.dim() - (_rank(n) - d) for n, d in given.items())
    if name in ("cat", "concat"):
        axis = argument(node, "dim", node.args[1] if len(node.args) > 1 else 0)
        dim = _one(given.values())
        return dim if axis % value.dim() != dim else _fail()
    if not isinstance(first, fx.Node) or first not in given:
        raise _Mixed
    at, rank = given[first], _rank(first)
    if name in _ATTENTION:
        return _of_queries(node, given, at, rank)
    if name == "matmul" and len(given) == 1 and at == rank - 2:
        return value.dim() - 2
    if len(given) > 1 and name not in ("view_as", "expand_as"):
        raise _Mixed
    if name in LINEARS and at < rank - 1:
        return at
    if name in ("rms_norm", "layer_norm"):
        shape = argument(node, "normalized_shape", node.args[1] if len(node.args) > 1 else ())
        return at if at < rank - len(shape) else _fail()
    if name in ("softmax", "mean", "sum", "chunk", "split", "narrow"):
        axis = argument(node, "dim", dict(enumerate(node.args)).get(2 if name in ("chunk", "split") else 1))
        if not isinstance(axis, int) or axis % rank == at:
            raise _Mixed
        return at if value.dim() == rank or axis % rank > at else at - 1
    if name == "transpose":
        a, b = (int(i) % rank for i in node.args[1:3])  # type: ignore[arg-type]
        return {a: b, b: a}.get(at, at)
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        return [int(i) % rank for i in order].index(at)  # type: ignore[arg-type]
    if name in ("expand", "expand_as"):
        return value.dim() - (rank - at)
    if name == "getitem":
        return _indexed(node.args[1], at, rank)
    if name in _RESHAPED:
        return _reshaped(tensor(first), at, value)
    raise _Mixed


def _of_queries(node: fx.Node, given: dict[fx.Node, int], at: int, rank: int) -> int:
    """Attention of each query by itself: keys and values are the same for all, and a mask has a row for each."""
    keys, values = node.args[1:3]
    mask = argument(node, "attn_mask", node.args[3] if len(node.args) > 3 else None)
    causal = argument(node, "is_causal", node.args[5] if len(node.args) > 5 else False)
    if causal is not False or at != rank - 2 or keys in given or values in given or mask is None:
        raise _Mixed
    if any(n not in (node.args[0], mask) for n in given) or (mask in given and given[mask] != _rank(mask) - 2):
        raise _Mixed
    return at


def _indexed(index: Any, at: int, rank: int) -> int:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, int | slice)) for i in items):
        raise _Mixed
    taken = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in items:
        where = items.index(Ellipsis)
        items[where : where + 1] = [slice(None)] * (rank - taken)
    else:
        items += [slice(None)] * (rank - taken)
    before = after = 0
    for item in items:
        if item is None:
            after += 1
            continue
        if before == at:
            return after if item == slice(None) else _fail()
        before, after = before + 1, after + (not isinstance(item, int))
    raise _Mixed


def _reshaped(before: torch.Tensor | None, at: int, after: torch.Tensor) -> int:
    """The dimension in front of which there are as many elements as before, and which is as long."""
    assert before is not None
    for dim, size in enumerate(after.shape):
        in_front = same_sizes([_product(after.shape[:dim])], [_product(before.shape[:at])])
        if in_front and isinstance(size, torch.SymInt) and same_sizes([size], [before.shape[at]]):
            return dim
    raise _Mixed


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for n in sizes:
        total = total * n
    return total


def _rank(node: Any) -> int:
    value = tensor(node)
    if value is None:
        raise _Mixed
    return value.dim()


def _one(dims: Iterable[int]) -> int:
    different = set(dims)
    return different.pop() if len(different) == 1 else _fail()


def _fail() -> Any:
    raise _Mixed
