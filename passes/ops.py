"""What the operations of a Dynamo graph do, told by the operation alone: names of torch functions, never of users.

Dynamo graphs are taken before AOTAutograd: they mix Python operators, ``torch`` functions, tensor methods and
``torch.ops`` overloads. Everything here speaks of an operation by one short name, the same for all of these forms.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import statically_known_true

LINEARS = frozenset({"linear", "lora_linear"})
HEAVY = LINEARS | frozenset(
    [
        "matmul",
        "__matmul__",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addmv",
        "baddbmm",
        "addbmm",
        "einsum",
        "tensordot",
        "bilinear",
        "inner",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "conv_depthwise",
        "convolution",
        "scaled_dot_product_attention",
        "grouped_attention",
        "_transformer_encoder_layer_fwd",
        "multi_head_attention_forward",
        "flex_attention",
        "grouped_mm",
        "_grouped_mm",
        "grouped_mm_fallback",
        "scan",
        "associative_scan",
    ]
)
ATTENTION = frozenset(
    {"scaled_dot_product_attention", "grouped_attention", "flex_attention", "multi_head_attention_forward"}
)
SOFTMAX = frozenset({"softmax", "_softmax"})
MATMUL = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
ROUTING = frozenset({"topk", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
TOKEN_MIXING = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "cumsum",
        "cumprod",
        "logcumsumexp",
        "fft_fft",
        "fft_fftn",
        "fft_rfft",
        "fft_rfft2",
        "fft_fft2",
        "scan",
        "associative_scan",
    ]
)
CASTS = frozenset(
    [
        "to",
        "type",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "double",
        "contiguous",
        "clone",
        "detach",
        "identity",
        "alias",
        "dropout",
    ]
)
VIEWS = frozenset(["view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "_unsafe_view"])
PARTS = frozenset(
    ["getitem", "narrow", "chunk", "split", "transpose", "permute", "expand"]
)  # views that take apart or reorder
SCALES = frozenset(["mul", "__mul__", "div", "truediv", "__truediv__"])

_RANDOM = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "rand_like",
        "randn_like",
        "randint_like",
        "randperm",
        "bernoulli",
        "bernoulli_",
        "multinomial",
        "normal",
        "normal_",
        "uniform_",
        "exponential_",
        "random_",
        "cauchy_",
        "geometric_",
        "log_normal_",
        "poisson",
        "binomial",
        "rrelu",
        "feature_dropout",
        "alpha_dropout",
    ]
)
_IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}


_NAMED_BESIDE_KEYWORDS = (operator.and_, operator.or_, operator.not_, operator.is_)  # they write nothing


def op_name(node: fx.Node) -> str:
    """The short name of what ``node`` calls: ``"add"`` for ``+``, ``torch.add``, ``.add`` and ``aten.add.Tensor``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def decides(node: fx.Node) -> bool:
    """Whether all that ``node`` is for is what a router of adapters decides, which belongs to no site."""
    if op_name(node) == "route_tokens":
        return True
    return op_name(node) in CASTS and bool(node.users) and all(map(decides, node.users))


def is_add(node: fx.Node) -> bool:
    """True for an out-of-place sum of two graph values."""
    return (
        op_name(node) in ("add", "__add__") and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
    )


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor that ``node`` stands for, if it is one tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """All fake tensors in the value of ``node``."""
    value = node.meta.get("example_value")
    if value is None or isinstance(value, torch.Tensor):
        return [] if value is None else [value]
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """True if two shapes, or strides, are known to be equal, without adding a guard on a symbol."""
    return len(a) == len(b) and all(
        x == y if isinstance(x, int) and isinstance(y, int) else statically_known_true(x == y)
        for x, y in zip(a, b, strict=True)
    )


# What Dynamo calls the model: `self`, `fn`, or the first argument of a wrapper around forward (transformers 5.24).
_MODEL = re.compile(r"^[LG]\['(?:args'\]\[0|[^']*')\]")


# How Dynamo names a submodule of a module that looks up attributes by a method of its own (PEFT's).
_IN_DICT = re.compile(r"\.__dict__\['_modules'\]\['([^']*)'\]")


def in_model(path: str) -> str | None:
    """The part of a path from Dynamo behind the model (``.model.layers.3``); None if it does not begin with one."""
    path = _IN_DICT.sub(r".\1", path)
    found = _MODEL.match(path)
    return path[found.end() :] if found else None


def path_of(node: fx.Node) -> str:
    """Where Dynamo got an input from, as one would write it: ``L['self'].model.layers.3.weight``; empty if unknown."""
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    return re.sub(r"_(?:modules|parameters|buffers)\['([^']*)'\]", r"\1", source)


def is_parameter_like(node: fx.Node) -> bool:
    """True for an input that belongs to the model rather than to the call (weights, and also buffers)."""
    if node.op == "get_attr":
        return True
    if node.op != "placeholder":
        return False
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    from_module = source.endswith("']") and ("._parameters[" in source or "._buffers[" in source)
    return from_module or isinstance(tensor(node), torch.nn.Parameter)


@lru_cache(maxsize=4096)
def _parameter_index(target: Callable[..., Any], parameter: str) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index(parameter) if parameter in names else None


def argument(node: fx.Node, parameter: str, default: Any = None) -> Any:
    """The value of a named parameter of a Python-level torch function, however it was passed."""
    if parameter in node.kwargs:
        return node.kwargs[parameter]
    index = _parameter_index(node.target, parameter) if callable(node.target) else None
    return node.args[index] if index is not None and index < len(node.args) else default


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes in place."""
    written: list[Any] = [node.kwargs.get("out")]
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    name, target = op_name(node), node.target
    in_place_name = name.endswith("_") and not name.endswith("__") and target not in _NAMED_BESIDE_KEYWORDS
    if node.op == "call_method":
        if in_place_name or name == "__setitem__" or re.fullmatch(r"__i\w+__", name):
            written.append(first)
    elif node.op == "call_function" and isinstance(target, OpOverload | OpOverloadPacket):
        packet = target if isinstance(target, OpOverloadPacket) else None
        overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else [target]
        for overload in overloads:
            for i, arg in enumerate(overload._schema.arguments):  # type: ignore[union-attr]
                if arg.alias_info is not None and arg.alias_info.is_write:
                    positional = node.args[i] if i < len(node.args) and not arg.kwarg_only else None
                    written.append(node.kwargs.get(arg.name, positional))
    elif node.op == "call_function" and isinstance(target, HigherOrderOperator):
        if "mutation" in name or _writes_inside(node):
            written += node.all_input_nodes
    elif node.op == "call_function":
        if target is operator.setitem or target in _IN_PLACE_OPERATORS or in_place_name:
            written.append(first)
        elif argument(node, "inplace") is True or argument(node, "max_norm") is not None:
            written += [first, argument(node, "weight") if name == "embedding" else None]
        elif name in ("batch_norm", "instance_norm"):
            written += _running_statistics(node)
    if written == [None]:
        return []
    flat = torch.utils._pytree.tree_leaves(written)
    return list(dict.fromkeys(a for a in flat if isinstance(a, fx.Node) and tensors(a)))


def _running_statistics(node: fx.Node) -> list[Any]:
    """The running mean and variance that a norm updates: in training, and in instance norms that use the input's."""
    if getattr(node.target, "__module__", "") == "torch.nn.functional":
        updates = argument(node, "training") or argument(node, "use_input_stats")
        return [argument(node, "running_mean"), argument(node, "running_var")] if updates else []
    return list(node.args[3:5])  # the builtin: (input, weight, bias, running_mean, running_var, ...)


def _writes_inside(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    for arg in node.all_input_nodes:
        sub = getattr(owner, str(arg.target), None) if arg.op == "get_attr" else None
        if isinstance(sub, fx.GraphModule) and any(written_arguments(n) for n in sub.graph.nodes):
            return True
    return False


_ARITHMETIC = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "neg",
        "relu",
        "silu",
        "gelu",
        "tanh",
        "sigmoid",
        "clamp",
        "masked_fill",
        "addcmul",
        "addmm",
    ]
)


def out_of_place(node: fx.Node) -> tuple[str, Any] | None:
    """The op and target of the out-of-place twin of in-place arithmetic; None for other writes (caches stay so)."""
    if node.op == "call_method":
        base = str(node.target)[:-1]
        return ("call_method", base) if base in _ARITHMETIC else None
    target: Any = node.target
    if target in _IN_PLACE_OPERATORS:
        return "call_function", _IN_PLACE_OPERATORS[target]
    if argument(node, "inplace") is True:
        return "call_function", target
    return None


def is_random(node: fx.Node) -> bool:
    """True if ``node`` draws random numbers."""
    name = op_name(node)
    if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "native_dropout"):
        probability = argument(node, "p", 0.5)
        return bool(argument(node, "training", True)) and probability != 0
    if name == "scaled_dot_product_attention":
        dropout = argument(node, "dropout_p", 0.0) if "dropout_p" in node.kwargs or len(node.args) > 4 else 0.0
        return dropout != 0.0
    if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    return name in _RANDOM


def switches_autocast_off(node: fx.Node) -> bool:
    """True for ``_enter_autocast(device, dtype, enabled=False, ...)``."""
    return op_name(node) == "_enter_autocast" and (node.args[2:3] == (False,) or node.kwargs.get("enabled") is False)


def is_statement(node: fx.Node) -> bool:
    """True for a call made for what it does rather than for its value, other than a write: assertions, switches."""
    if node.op != "call_function" or node.users:
        return False
    return node.meta.get("example_value") is None and not written_arguments(node)
