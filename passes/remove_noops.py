"""Remove operations that do nothing in inference."""

from __future__ import annotations

import operator

import torch
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.ops import argument, is_random, op_name, same_sizes, switches_autocast_off, tensor
from torch import fx

_ALIAS_IF_SAME = frozenset(
    ["to", "type", "float", "half", "bfloat16", "double", "contiguous", "type_as", "identity", "detach"]
)
_DROPOUTS = frozenset(["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"])


class RemoveNoops(Pass):
    """Drop dropout in evaluation mode, casts and copies that return their input, slices that take everything,
    API-usage logging, and switches of autocast and gradients that switch nothing.

    Before::

        %h : f32[2, 7, 64] = dropout(%x, 0.1, False, False)
        %c : f32[2, 7, 64] = to(%h, torch.float32)
        %y : f32[2, 7, 64] = add(%c, %x)

    After::

        %y : f32[2, 7, 64] = add(%x, %x)

    Leaves alone: dropout in training, casts that convert, ``clone``, autocast regions that change dtypes.
    """

    name = "remove_noops"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched = 0
        for node in list(gm.graph.nodes):
            source = self._identity_of(node)
            if source is not None:
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                matched += 1
            elif op_name(node) == "_log_api_usage_once" or (
                op_name(node) == "_set_grad_enabled" and node.args == (False,) and not torch.is_grad_enabled()
            ):
                gm.graph.erase_node(node)
                matched += 1
            elif op_name(node) == "_exit_autocast" and _disables(node.args[0]):
                enter = node.args[0]
                gm.graph.erase_node(node)
                gm.graph.erase_node(enter)
                matched += 1
        return PassResult(matched, matched > 0)

    @staticmethod
    def _identity_of(node: fx.Node) -> fx.Node | None:
        if node.op not in ("call_function", "call_method"):
            return None
        name = op_name(node)
        source = node.args[0] if node.args else argument(node, "input")
        if not isinstance(source, fx.Node):
            return None
        if name in _DROPOUTS:
            return None if is_random(node) or argument(node, "inplace") is True else source
        if _takes_slices(node):
            if any(user.op == "output" for user in node.users):
                return None  # the caller gets an object of its own
        elif name not in _ALIAS_IF_SAME or node.kwargs.get("copy") or node.args[3:4] == (True,):
            return None
        before, after = tensor(source), tensor(node)
        if before is None or after is None:
            return None
        same = (
            before.dtype == after.dtype
            and before.device == after.device
            and same_sizes(before.shape, after.shape)
            and same_sizes(before.stride(), after.stride())
            and before.untyped_storage()._cdata == after.untyped_storage()._cdata
        )
        return source if same else None


def _takes_slices(node: fx.Node) -> bool:
    """True for ``x[a:b, ...]``, which takes everything if it is as large as ``x``."""
    if node.target is not operator.getitem:
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is Ellipsis or isinstance(i, slice) for i in index)


def _disables(enter: object) -> bool:
    """True if ``enter`` switches off an autocast that is off anyway (the backend refuses graphs where it is on)."""
    return isinstance(enter, fx.Node) and len(enter.users) == 1 and switches_autocast_off(enter)
