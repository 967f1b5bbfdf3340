"""What can be left out of a sublayer one by one: neurons of an MLP, groups of heads of an attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from skipc.passes.attention_forms import read_attention
from skipc.passes.ops import is_parameter_like, op_name, same_sizes, tensor, tensors
from skipc.passes.residual import Term
from skipc.passes.substitute_weights import weight_name
from torch import fx

from skipc.ir.site import HiddenLayer, SiteKind

# Each element of the result is made of the elements at the same place.
_ELEMENTWISE = frozenset(
    ["mul", "__mul__", "add", "__add__", "pow", "square", "neg", "relu", "relu2", "silu", "gelu", "tanh", "sigmoid",
     "clamp", "dropout", "to", "float", "bfloat16", "type_as", "contiguous", "identity"]
)  # fmt: skip


def hidden_layer(term: Term) -> HiddenLayer | None:
    """What can be left out of a branch one by one; None if nothing can."""
    if term.kind is SiteKind.MLP:
        return _neurons(term.branch)
    return _groups_of_heads(term.branch) if term.kind is SiteKind.ATTENTION else None


def _groups_of_heads(branch: Sequence[fx.Node]) -> HiddenLayer | None:
    """The heads of keys and values of one attention, each with its heads of queries; None unless queries, keys, values
    and the output are made by linear layers, with weights that nobody else reads. (Whether heads lie in these as they
    do in most models is not seen here; calibration tries it.)"""
    linears, found = [n for n in branch if op_name(n) == "linear"], [h for n in branch if (h := _heads(n)) is not None]
    if len(linears) != 4 or len(found) != 1:
        return None
    *first, last = linears
    (query, key, value), into = found[0], tensor(last.args[0])
    heads, width = query.shape[1], key.shape[1]
    size, weight = heads // width * value.shape[3], _own_weight(last, 1)
    rows = [name for n in first for name in _own_weights(n)]
    if weight is None or None in rows or into is None or into.shape[-1] != width * size or width < 2:
        return None
    made = sorted(tensor(n).shape[-1] for n in first)  # type: ignore[union-attr]
    if made != sorted([heads * query.shape[3], width * key.shape[3], width * value.shape[3]]):
        return None
    return HiddenLayer(width, tuple((name, 1) for name in rows if name is not None), weight, size)


def _heads(node: fx.Node) -> tuple[torch.Tensor, ...] | None:
    """Queries, keys and values of an attention, ``[batch, heads, tokens, channels]`` each; None if heads have biases of
    their own."""
    if node.target is torch.ops.skipc.grouped_attention.default:
        *parts, mask = node.args[:4]
    else:
        found = read_attention(node)
        if found is None:
            return None
        parts, mask = [found.query, found.key, found.value], found.mask
    bias = tensor(mask)
    if bias is not None and bias.dim() > 2 and not same_sizes(bias.shape[-3:-2], (1,)):
        return None
    return tuple(value for part in parts if (value := tensor(part)) is not None)


def _neurons(branch: Sequence[fx.Node]) -> HiddenLayer | None:
    """The neurons of an MLP; None unless it is plain linear layers, then what treats each neuron by itself, then one
    linear layer, with weights that nobody else reads."""
    linears = [n for n in branch if op_name(n) == "linear"]
    if len(linears) < 2:
        return None
    last, inside = linears[-1], set(branch)
    value = tensor(last.args[0]) if isinstance(last.args[0], fx.Node) else None
    weight = _own_weight(last, 1)
    if value is None or weight is None or not isinstance(value.shape[-1], int):
        return None
    width = value.shape[-1]
    first: dict[fx.Node, None] = {}
    between: set[fx.Node] = set()
    stack = [last.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in between or node in first:
            continue
        if node not in inside:
            if any(t.numel() != 1 for t in tensors(node)):
                return None  # one number for each neuron, which would have to be chosen, too
        elif op_name(node) == "linear":
            first[node] = None
        elif op_name(node) in _ELEMENTWISE or _is_half(node):
            between.add(node)
            stack += node.all_input_nodes
        else:
            return None
    if set(linears) != {last, *first} or any(
        u not in between and u is not last for n in (*first, *between) for u in n.users
    ):
        return None
    rows: list[tuple[str, int]] = []
    for layer in sorted(first, key=branch.index):
        size = tensor(layer).shape[-1]  # type: ignore[union-attr]
        names = _own_weights(layer)
        if size not in (width, 2 * width) or None in names:
            return None
        rows += [(name, size // width) for name in names if name is not None]
    return HiddenLayer(width, tuple(rows), weight)


def _argument(layer: fx.Node, at: int) -> fx.Node | None:
    value = layer.args[at] if len(layer.args) > at else layer.kwargs.get(("input", "weight", "bias")[at])
    return value if isinstance(value, fx.Node) else None


def _own_weights(layer: fx.Node) -> list[str | None]:
    """The names of weight and bias, where there is one; None for what others read, too."""
    return [_own_weight(layer, at) for at in (1, 2) if _argument(layer, at) is not None]


def _own_weight(layer: fx.Node, at: int) -> str | None:
    """The name of a parameter that only ``layer`` reads."""
    node = _argument(layer, at)
    if node is None or not is_parameter_like(node) or len(node.users) != 1:
        return None
    return weight_name(node)


def _is_half(node: fx.Node) -> bool:
    """True for halves of the last dimension, and for one of them."""
    if op_name(node) == "getitem":
        (whole,) = node.all_input_nodes
        return op_name(whole) == "chunk" and isinstance(node.args[1], int)
    if op_name(node) != "chunk":
        return False
    value = tensor(node.args[0])
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    count = node.kwargs.get("chunks", node.args[1] if len(node.args) > 1 else None)
    return value is not None and (count, dim) in ((2, -1), (2, value.dim() - 1))
