"""What the passes that lower linear layers of few rows have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from skipc.kernels.device import on_cpu, on_gpu
from skipc.kernels.library import NATIVE, TRITON
from skipc.kernels.linear import MOST_ROWS, max_rows
from skipc.kernels.lora import OPERANDS
from skipc.passes.dataflow import Dataflow
from skipc.passes.norms import RMSNorm, read_rms_norm
from skipc.passes.ops import LINEARS, is_add, op_name, same_sizes, tensor
from torch import fx


def bias_of(linear: fx.Node) -> Any:
    """The bias of a linear layer, or None."""
    return linear.kwargs.get("bias", linear.args[2] if len(linear.args) > 2 else None)


def adapters_of(linears: Sequence[fx.Node | None]) -> list[Any]:
    """The operand ``lora`` of a kernel that runs these layers, None for a weight that is another's second half."""
    return joined_adapters([n.args[3] if n is not None and op_name(n) == "lora_linear" else () for n in linears])


def joined_adapters(parts: Sequence[Any]) -> list[Any]:
    """The operands ``lora`` of several kernels' weights as one, in order; empty for a weight without adapters."""
    wanted = next((list(lora[-2:]) for lora in parts if lora), None)
    if wanted is None:
        return []
    return [t for lora in parts for t in lora[:OPERANDS] or [None] * OPERANDS] + wanted


def is_skinny(node: Any) -> bool:
    """True for a linear layer of few rows that the native kernels take."""
    rows = native_rows(node)
    return rows is not None and isinstance(rows, int) and 1 <= rows <= max_rows(tensor(node).dtype)  # type: ignore[union-attr]


def is_few_on_gpu(node: Any) -> bool:
    """True for a linear layer of few rows that Triton kernels take."""
    rows = native_rows(node, on_gpu, TRITON)
    return isinstance(rows, int) and 1 <= rows <= MOST_ROWS


def native_rows(
    node: Any, ours: Callable[[torch.Tensor], bool] = on_cpu, dtypes: Collection[torch.dtype] = NATIVE
) -> Any:
    """The number of rows of a linear layer that the native kernels could take, but for that number; else None.
    ``ours``: whether a tensor is on their device; ``dtypes``: that they take."""
    if not isinstance(node, fx.Node) or op_name(node) not in LINEARS or node.op != "call_function":
        return None
    if len(node.args) < 2 or set(node.kwargs) - {"bias"}:
        return None
    x, w, b = tensor(node.args[0]), tensor(node.args[1]), tensor(bias_of(node))
    if x is None or w is None or (bias_of(node) is not None and b is None):
        return None
    if any(not ours(t) or t.dtype != x.dtype for t in (x, w, b) if t is not None):
        return None
    if x.dtype not in dtypes or w.dim() != 2 or x.dim() < 1 or w.stride(1) != 1:
        return None
    if not all(isinstance(n, int) for n in (x.shape[-1], *w.shape)) or (b is not None and b.stride(0) != 1):
        return None
    # Grouped or fused, layers run earlier or later than where they stood: their weights must be inputs.
    inputs = all(a.op in ("placeholder", "get_attr") for a in node.all_input_nodes[1:])
    rows = math.prod(x.shape[:-1])
    contiguous = not isinstance(rows, int) or x.is_contiguous()  # asking a symbolic size would add a guard
    return rows if contiguous and x.shape[-1] > 0 and inputs else None


def norm_before(x: fx.Node, readers: list[fx.Node], flow: Dataflow) -> RMSNorm | None:
    """The norm that makes ``x``, if nobody but ``readers`` reads it, and what it reads is written nowhere."""
    found = read_rms_norm(x) if set(x.users) <= set(readers) else None
    if found is None or found.x not in flow.storages:  # made by this pass: nobody knows who writes it
        return None
    return None if (flow.storages[found.x] | flow.storages[found.weight]) & flow.written else found


def sum_after(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum that alone reads ``node``, and what it adds, if that is a value of the same form."""
    add = next(iter(node.users)) if len(node.users) == 1 else None
    if add is None or not is_add(add) or add.kwargs or add.args[0] is add.args[1]:  # `alpha` scales one of them
        return None
    other = add.args[1] if add.args[0] is node else add.args[0]
    made, before, total = tensor(node), tensor(other), tensor(add)
    if made is None or before is None or total is None:
        return None
    same = all(t.dtype == made.dtype and same_sizes(t.shape, made.shape) and t.is_contiguous() for t in (before, total))
    return (add, other) if same else None  # type: ignore[return-value]


def drop_copies(made: fx.Node) -> None:
    """Remove calls of ``contiguous`` on what a kernel made, which is contiguous."""
    for user in [u for u in made.users if u.op == "call_method" and u.target == "contiguous" and not u.kwargs]:
        user.replace_all_uses_with(made)
        made.graph.erase_node(user)
