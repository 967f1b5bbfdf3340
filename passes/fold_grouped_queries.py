"""Attend to shared key heads where they lie, instead of copying them for every query head."""

from __future__ import annotations

import skipc.kernels.attention  # noqa: F401  (defines torch.ops.skipc.grouped_attention)
import torch
from skipc.passes.attention_forms import Attention, read_attention, undisturbed
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import erase_unused, infer, labels_of
from skipc.passes.ops import same_sizes, tensor
from torch import fx


class FoldGroupedQueries(Pass):
    """Turn attention over repeated key and value heads into one that shares them. The copies cost a read and a write
    of the whole cache for each group, each step.

    Before::

        %k5 : f32[2, 2, 2, 512, 16] = expand(unsqueeze(%k, 2), (2, 2, 2, 512, 16))
        %k4 : f32[2, 4, 512, 16] = reshape(%k5, (2, 4, 512, 16))
        %a : f32[2, 4, 1, 16] = scaled_dot_product_attention(%q, %k4, %v4, attn_mask=%m)

    After::

        %a : f32[2, 4, 1, 16] = skipc.grouped_attention(%q, %k, %v, %m, None, False, 0.25, 0.0)

    Also ``repeat_interleave``, ``enable_gqa=True``, and ``softmax(q @ k.T * scale + mask) @ v`` spelled out, with soft
    caps. Sums are in fp32, so bf16 results are closer to the truth than those of the spelled-out form.

    Leaves alone: attention whose heads are not repeated, dropout, weights that are returned, devices but the CPU,
    dtypes but fp32 and bf16.
    """

    name = "fold_grouped_queries"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        matched, flow = 0, Dataflow(gm.graph)
        for node in list(gm.graph.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            found = read_attention(node)
            if found is not None and (found.repeated or found.softcap):
                matched += replace_attention(node, found, None, flow)
        return PassResult(matched, matched > 0)


def replace_attention(node: fx.Node, found: Attention, live: fx.Node | None, flow: Dataflow) -> bool:
    """Put ``grouped_attention`` in the place of ``node``, with its layout; False if that would change what it reads."""
    if not undisturbed(node, found, flow):
        return False
    graph = node.graph
    arguments = (found.query, found.key, found.value, found.mask, live, found.causal, found.scale, found.softcap)
    with graph.inserting_before(node):
        made = graph.call_function(torch.ops.skipc.grouped_attention.default, arguments)
        made.meta = labels_of(node)
        infer(made)
        before, after = tensor(node), tensor(made)
        assert before is not None
        assert after is not None
        if not same_sizes(before.stride(), after.stride()):
            made = graph.call_method("contiguous", (made,))
            made.meta = labels_of(node)
            infer(made)
    node.replace_all_uses_with(made)
    erase_unused(node)
    return True
