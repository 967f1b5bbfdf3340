"""Open opaque fast paths, so that the sublayers inside them can be seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.fx_edit import infer_new
from skipc.passes.ops import op_name, tensor
from torch import fx


class DecomposeFastPaths(Pass):
    """Replace ``torch._transformer_encoder_layer_fwd``, the fused inference path of ``nn.TransformerEncoderLayer``,
    by the attention, MLP and norms that it stands for.

    Before::

        %y : f32[2, 7, 64] = _transformer_encoder_layer_fwd(%x, 64, 4, %w_in, %b_in, %w_out, %b_out, True, True, ...)

    After (norm first)::

        %n : f32[2, 7, 64] = layer_norm(%x, (64,), %g1, %c1, 1e-05)
        %a : f32[2, 4, 7, 16] = scaled_dot_product_attention(%q, %k, %v, attn_mask=None)
        %o : f32[2, 7, 64] = linear(%a2, %w_out, %b_out)
        %h : f32[2, 7, 64] = add(%x, %o)
        %y : f32[2, 7, 64] = add(%h, %mlp)

    Leaves alone: nested tensors.
    """

    name = "decompose_fast_paths"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched = 0
        for node in list(gm.graph.nodes):
            if op_name(node) != "_transformer_encoder_layer_fwd":
                continue
            value = tensor(node)
            if value is None or value.is_nested:
                continue
            with gm.graph.inserting_before(node):
                out = _encoder_layer(node)
            infer_new(gm.graph, node)
            node.replace_all_uses_with(out.node)
            gm.graph.erase_node(node)
            matched += 1
        return PassResult(matched, matched > 0)


def _encoder_layer(node: fx.Node) -> Any:
    """The layer in terms of public functions. Positions follow the schema of ``aten::_transformer_encoder_layer_fwd``;
    ``mask`` is true where attention is forbidden; ``mask_type`` 0 is [L, L], 1 is [B, L] over keys, 2 is both."""
    tracer = fx.proxy.GraphAppendingTracer(node.graph)
    lift = lambda a: fx.Proxy(a, tracer) if isinstance(a, fx.Node) else a  # noqa: E731
    args: list[Any] = [lift(a) for a in node.args]
    args += [lift(node.kwargs.get(k)) for k in ("mask", "mask_type")[len(args) - 18 :]] if len(args) < 20 else []
    x, width, heads, w_in, b_in, w_out, b_out, use_gelu, norm_first, eps, g1, c1, g2, c2, w1, b1, w2, b2 = args[:18]
    mask, mask_type = args[18], args[19]
    inside = _Labels(node)

    def attend(y: Any) -> Any:
        thirds = F.linear(y, w_in, b_in).chunk(3, dim=-1)
        q, k, v = (thirds[i].unflatten(-1, (heads, width // heads)).transpose(1, 2) for i in range(3))
        allowed = None
        if mask is not None:
            forbidden = mask.to(torch.bool)
            if mask_type == 1:
                forbidden = forbidden.unsqueeze(1).unsqueeze(1)
            allowed = torch.logical_not(forbidden)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return inside("self_attn", F.linear(y.transpose(1, 2).flatten(2), w_out, b_out))

    def feed_forward(y: Any) -> Any:
        y = F.linear(y, w1, b1)
        return inside("linear2", F.linear(F.gelu(y) if use_gelu else F.relu(y), w2, b2))

    norm1 = lambda y: F.layer_norm(y, (width,), g1, c1, eps)  # noqa: E731
    norm2 = lambda y: F.layer_norm(y, (width,), g2, c2, eps)  # noqa: E731
    if norm_first:
        x = x + attend(norm1(x))
        return x + feed_forward(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed_forward(x))


class _Labels:
    """Marks a value as made by a child of the module that ``node`` was traced in."""

    def __init__(self, node: fx.Node):
        self.stack = dict(node.meta.get("nn_module_stack") or {})

    def __call__(self, child: str, value: Any) -> Any:
        if self.stack:
            key, entry = list(self.stack.items())[-1]
            path, kind = entry if isinstance(entry, tuple) else (entry, None)
            value.node.meta["nn_module_stack"] = {**self.stack, f"{key}.{child}": (f"{path}.{child}", kind)}
        return value
