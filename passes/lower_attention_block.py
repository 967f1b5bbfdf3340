"""Run an attention sublayer of a few tokens over a static cache as one kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from skipc.kernels.blocks import rotate, split_heads
from skipc.kernels.lora import OPERANDS
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.dataflow import Dataflow
from skipc.passes.evaluate import EXACT, evaluate, is_static, leaves_of, random_values, same_values
from skipc.passes.fx_edit import infer, labels_of
from skipc.passes.ops import op_name, same_sizes, tensor
from skipc.passes.skinny import joined_adapters
from torch import fx


class LowerAttentionBlock(Pass):
    """Turn a whole attention sublayer (norm, projections, rotary embedding, writes to a static cache, attention,
    output, residual sum) into one kernel, so that one call and one meeting of threads a stage is all that is left.

    Before::

        %p : f32[1, 1, 128] = skipc.skinny_linear(%x, [%wq, %wk, %wv], [None, None, None], %n, 1e-6, None, [])
        %q : f32[1, 4, 1, 16] = %p[..., :64] viewed by heads * cos + rotate_half(...) * sin
        %w : f32[1, 2, 32, 16] = index_copy_(%keys, 2, %count + arange(1), %k)
        %a : f32[1, 4, 1, 16] = skipc.decode_attention(%q, %keys, %values, %mask, %live, False, 0.25, 0.0)
        %y : f32[1, 1, 64] = skipc.skinny_linear(%a viewed by tokens, [%wo], [None], None, 0.0, %x, [])

    After::

        %y : f32[1, 1, 64] = skipc.attention_block(%x, %n, 1e-6, [%wq, %wk, %wv], ..., %keys, %values, ..., %x, [])

    What a skipped attention leaves, keys and values written to the cache, becomes a ``skipc.cache_block`` likewise.

    What lies between the kernels is recognised by what it computes, not by how it is written: it is evaluated on random
    fp64 numbers and compared with the kernel's definition.

    Of a cache that is narrowed to its first heads, the kernel takes all: how many heads there are, weights tell.

    Leaves alone: rotary embeddings of interleaved pairs, norms of the form ``1 + weight`` before or behind, caches that
    grow or slide, regions that do anything beside.
    """

    name = "lower_attention_block"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        target = torch.ops.skipc.decode_attention.default
        nodes = [n for n in gm.graph.nodes if n.target is target]
        found = _read(gm.graph, nodes[0] if nodes else None) if len(nodes) <= 1 else None
        if found is None:
            return PassResult()
        _rewrite(gm.graph, found)
        return PassResult(1, True)


@dataclass
class _Block:
    projection: fx.Node
    order: list[int]  # of its weights, so that they make queries, keys, values
    q_norm: fx.Node | None
    k_norm: fx.Node | None
    head_eps: float
    cos: fx.Node | None
    sin: fx.Node | None
    position: fx.Node
    writes: tuple[fx.Node, fx.Node]  # of keys and values
    attention: fx.Node | None  # None, and no output: only the cache is written
    output: fx.Node | None
    count: fx.Node | None  # the increment of the position


def _read(graph: fx.Graph, attention: fx.Node | None) -> _Block | None:
    writes = [n for n in graph.nodes if op_name(n) == "index_copy_" and len(n.args) == 4 and n.args[1] in (2, -2)]
    output = _output_of(attention) if attention is not None else None
    if len(writes) != 2 or (attention is not None and output is None):
        return None
    inside: set[fx.Node] = {*writes}
    if attention is not None and output is not None:
        read = [next((w for w in writes if a in (w, w.args[0])), None) for a in attention.args[1:3]]
        pairs = [(read[0], read[1])]
        inside |= {attention, output, *_between(output.args[0], attention)}  # type: ignore[arg-type]
        queries = [attention.args[0]]
    else:
        pairs, queries = [(writes[0], writes[1]), (writes[1], writes[0])], []
    for k, v in pairs:  # which is which, if nobody attends to them: by trying
        if k is None or v is None or k is v or k.args[2] is not v.args[2]:
            continue
        found = _read_inputs(graph, [*queries, k.args[3], v.args[3]], (k, v), attention, output, set(inside))
        if found is not None:
            return found
    return None


def _read_inputs(
    graph: fx.Graph,
    inputs: list[Any],
    writes: tuple[fx.Node, fx.Node],
    attention: fx.Node | None,
    output: fx.Node | None,
    inside: set[fx.Node],
) -> _Block | None:
    flow = Dataflow(graph)
    keys, values = (w.args[0] for w in writes)
    if not isinstance(keys, fx.Node) or not isinstance(values, fx.Node):
        return None
    inside |= {n for n in (keys, values) if cache_of(n) is not n}
    leaves = [leaves_of(n, inside) if isinstance(n, fx.Node) else None for n in inputs]
    projection = next((n for n in leaves[-1] or () if n.target is torch.ops.skipc.skinny_linear.default), None)
    if any(found is None for found in leaves) or projection is None or projection.args[5] is not None:
        return None
    inside.add(projection)
    x = tensor(projection.args[0])
    if set(leaves[-1] or ()) != {projection} or x is None or x.dim() != 3 or not is_static(projection):
        return None
    position = position_of(writes[0].args[2], x.shape[1], inside)
    if position is None or not _fits(projection, keys, values, position, inputs, output):
        return None
    rest = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in inside]
    count = next((n for n in rest if op_name(n) == "add_" and n.args[0] is position and not n.users), None)
    last = output if output is not None else writes[1]
    if any(n is not count for n in rest) or any(u not in inside for n in inside - {last} for u in n.users):
        return None
    if attention is not None and any(flow.order[w] > flow.order[attention] for w in writes):
        return None  # it attends to what was there before
    if count is not None and any(flow.depends(w, count) for w in writes):
        return None  # the places are those after counting
    written = flow.written - flow.storages[keys] - flow.storages[values]
    written -= flow.storages[position] if count is not None else frozenset()
    if any(flow.storages[n] & written for n in graph.nodes if n.op == "placeholder"):
        return None
    if flow.storages[keys] & flow.storages[values] or (output is None and writes[1].users):
        return None
    return _roles(inputs, leaves, projection, position, writes, attention, output, count)  # type: ignore[arg-type]


def _output_of(attention: fx.Node) -> fx.Node | None:
    """The linear layer that reads the result, heads side by side."""
    node = attention
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is torch.ops.skipc.skinny_linear.default:
            break
        if op_name(node) not in EXACT:
            return None
    if node.target is not torch.ops.skipc.skinny_linear.default or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    if node.args[3] is not None:
        return None
    if not is_static(attention):
        return None
    numbers = random_values([attention])
    found = evaluate(node.args[0], numbers)
    return node if same_values(found, numbers[attention].transpose(1, 2).flatten(2)) else None


def _fits(
    projection: fx.Node,
    keys: fx.Node,
    values: fx.Node,
    position: fx.Node,
    inputs: list[fx.Node],
    output: fx.Node | None,
) -> bool:
    x, k, v, p = tensor(projection.args[0]), tensor(keys), tensor(values), tensor(position)
    made = tensor(output) if output is not None else x
    if x is None or k is None or v is None or p is None or made is None:
        return False
    batch, tokens, _ = x.shape
    heads = [tensor(n) for n in inputs[:-1]]
    sizes = (*x.shape, *k.shape[:2], k.shape[3], *v.shape[:2], v.shape[3], k.stride(3), v.stride(3))
    return (
        all(isinstance(n, int) for n in sizes)  # the length of the cache may vary
        and all(n.op == "placeholder" for n in (cache_of(keys), cache_of(values), position))
        and k.dtype == v.dtype == x.dtype == made.dtype
        and k.stride(3) == v.stride(3) == 1
        and same_sizes(k.shape[:3], v.shape[:3])
        and all(h is not None and (h.shape[0], *h.shape[2:]) == (batch, tokens, k.shape[3]) for h in heads)
        and k.shape[0] == batch
        and made.dim() == 3
    )


def cache_of(node: fx.Node) -> fx.Node:
    """The cache of whose first heads ``node`` is a view; else ``node``."""
    if op_name(node) == "narrow" and len(node.args) == 4 and node.args[1:3] == (1, 0):
        return node.args[0]  # type: ignore[return-value]
    return node


def position_of(places: Any, tokens: int, inside: set[fx.Node]) -> fx.Node | None:
    """Where ``tokens`` go: an input that names all places, or the first. What computes the places joins ``inside``."""
    if not isinstance(places, fx.Node):
        return None
    leaves = leaves_of(places, inside)
    if leaves is None or len(leaves) != 1:
        return None
    leaf = next(iter(leaves))
    value = tensor(leaf)
    if value is None or not is_static(leaf) or not value.is_contiguous():
        return None
    if value.dtype != torch.int64 or tuple(value.shape) not in ((), (tokens,)):
        return None
    for first in (3, 11):
        given = first + (torch.arange(tokens) if value.dim() else torch.tensor(0))
        if not same_values(evaluate(places, {leaf: given}), first + torch.arange(tokens)):
            return None
    return leaf


def _roles(
    inputs: list[fx.Node],
    leaves: list[dict[fx.Node, None]],
    projection: fx.Node,
    position: fx.Node,
    writes: tuple[fx.Node, fx.Node],
    attention: fx.Node | None,
    output: fx.Node | None,
    count: fx.Node | None,
) -> _Block | None:
    """Find out which input is what, by trying. ``inputs`` are what becomes queries (if there are any), keys, values."""
    tables = [n for n in leaves[0] if n is not projection and tensor(n).dim() == 3]  # type: ignore[union-attr]
    norms = [[n for n in found if n is not projection and n not in tables] for found in leaves[:-1]]
    if len(tables) not in (0, 2) or any(not set(tables) <= set(found) for found in leaves[:-1]):
        return None
    keys, values, projected = tensor(writes[0].args[0]), tensor(writes[1].args[0]), tensor(projection)
    assert keys is not None
    assert values is not None
    assert projected is not None
    dim = keys.shape[-1]
    given = {n: tensor(n) for n in (*tables, *(n for found in norms for n in found))}
    if any(t is None or t.stride(-1) != 1 or t.dtype != projected.dtype for t in given.values()):
        return None
    if any(len(found) > 1 or any(tuple(tensor(n).shape) != (dim,) for n in found) for found in norms):  # type: ignore[union-attr]
        return None
    if not all(map(is_static, given)):
        return None
    numbers = random_values([projection, *given])
    found = [evaluate(n, numbers) for n in inputs]
    if any(f is None for f in found):
        return None
    widths = [tensor(w).shape[0] for w in projection.args[1]]  # type: ignore[union-attr]
    rows = sum(widths) - keys.shape[1] * (dim + values.shape[-1])
    if rows < 0 or rows % dim or (rows == 0) != (attention is None):
        return None
    parts = numbers[projection].split(widths, -1)
    weights = [n[0] if n else None for n in norms]
    epsilons = _epsilons(inputs) if any(norms) else [0.0]
    pairs: list[Any] = list(itertools.permutations(tables)) if tables else [(None, None)]
    for order in itertools.permutations(range(len(widths))):
        *heads, v = split_heads(torch.cat([parts[i] for i in order], -1), keys, values)
        heads = heads[2 - len(norms) :]
        if not same_values(found[-1], v) or heads[0].shape != found[0].shape:
            continue
        for eps, (cos, sin) in itertools.product(epsilons, pairs):
            made = [
                h if w is None else torch.rms_norm(h, (dim,), numbers[w], eps)
                for h, w in zip(heads, weights, strict=True)
            ]
            if cos is not None:
                made = [rotate(h, numbers[cos], numbers[sin]) for h in made]
            if all(same_values(a, b) for a, b in zip(found[:-1], made, strict=True)):
                q_norm, k_norm = [None, *weights][-2:]
                return _Block(
                    projection, list(order), q_norm, k_norm, eps, cos, sin, position, writes, attention, output, count
                )
    return None


def _rewrite(graph: fx.Graph, block: _Block) -> None:
    ops = torch.ops.skipc
    given: Any = block.projection.args
    x, weights, biases, norm, eps, _, lora = given
    weights, biases = ([list(values)[i] for i in block.order] for values in (weights, biases))
    wanted = lora[-2:]
    parts = [[*lora[OPERANDS * i : OPERANDS * (i + 1)], *wanted] for i in block.order]
    keys, values = (cache_of(w.args[0]) for w in block.writes)  # type: ignore[arg-type]
    source, cache = (x, norm, eps, weights, biases), (block.cos, block.sin, keys, values, block.position)
    last = block.output if block.output is not None else next(iter(reversed(graph.nodes)))
    with graph.inserting_before(last):
        if block.attention is None or block.output is None:
            adapters = joined_adapters(parts)
            made = graph.call_function(
                ops.cache_block.default, (*source, block.k_norm, block.head_eps, *cache, adapters)
            )
        else:
            _, _, _, mask, live, causal, scale, softcap = block.attention.args
            given = block.output.args
            _, (out,), (out_bias,), _, _, residual, last = given
            adapters = joined_adapters([*parts, last])
            made = graph.call_function(
                ops.attention_block.default,
                (*source, block.q_norm, block.k_norm, block.head_eps, *cache, mask, live, causal, scale, softcap,
                 out, out_bias, residual, adapters),
            )  # fmt: skip
    made.meta = labels_of(block.writes[0])
    infer(made)
    if block.count is not None:
        made.append(block.count)  # the kernel reads the position where the output was computed
    if block.output is not None:
        block.output.replace_all_uses_with(made)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and node not in (made, block.count):
            graph.erase_node(node)


def _between(node: fx.Node, start: fx.Node) -> set[fx.Node]:
    found = set()
    while node is not start:
        found.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _epsilons(inputs: list[fx.Node]) -> list[float]:
    """Small constants in the arithmetic of ``inputs``."""
    found: dict[float, None] = {}
    nodes: set[fx.Node] = set()
    for node in inputs:
        leaves_of(node, nodes)
    for node in nodes:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, float) and 0 < value < 0.1:
                found[value] = None
    return list(found)
