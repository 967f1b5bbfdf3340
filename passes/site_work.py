"""How much each site computes and reads, as expressions in the sizes of a call."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
from skipc.passes.hidden_layers import hidden_layer
from skipc.passes.ops import LINEARS, is_parameter_like, op_name, tensor
from skipc.passes.residual import Streams
from torch import fx

BATCH, TOKENS, CONTEXT = sympy.symbols("B T C", positive=True, integer=True)


@dataclass(frozen=True)
class Work:
    """What one call of a site does.

    Attributes:
        weights: numbers in its weights, each read once.
        products: floating-point operations with those weights, in ``B`` rows of ``T`` tokens.
        attention: floating-point operations between tokens, which also depend on the context ``C``: the tokens that
            are attended to, those of the call included.
        cached: numbers in the keys and values of the context.
        width: of the stream.
        neurons: of an MLP that can be made thinner; of an attention, groups of heads; else 0.
    """

    weights: int
    products: sympy.Expr
    attention: sympy.Expr
    cached: sympy.Expr
    width: int = 0
    neurons: int = 0


def site_work(streams: Streams) -> dict[str, Work]:
    """The work of all sites of a graph of a call without caches, by name."""
    found = {}
    known = _parameters_behind(streams.junctions[0].add.graph) if streams.junctions else {}
    for junction in streams.junctions:
        point = tensor(junction.point)
        if point is None:
            continue
        sizes = {_expression(point.shape[0]): BATCH}
        if point.dim() > 2:
            sizes[_expression(point.shape[1])] = TOKENS
        names = {size: symbol for size, symbol in sizes.items() if isinstance(size, sympy.Symbol)}
        for term in junction.terms:
            hidden = hidden_layer(term)
            width = point.shape[-1] if isinstance(point.shape[-1], int) else 0
            found[term.name] = _work(term.branch, names, known, width, hidden.width if hidden is not None else 0)
    return found


def _work(
    branch: list[fx.Node],
    names: dict[sympy.Expr, sympy.Symbol],
    known: dict[fx.Node, list[fx.Node]],
    width: int,
    neurons: int,
) -> Work:
    weights: dict[fx.Node, None] = {}
    products = attention = cached = sympy.Integer(0)
    for node in branch:
        for operand in node.all_input_nodes:
            weights |= dict.fromkeys(known.get(operand, []))
        out, name = tensor(node), op_name(node)
        if name in _ATTENTIONS:
            q, k, v = (tensor(_operand(node, i, p)) for i, p in enumerate(("query", "key", "value")))
            if q is not None and k is not None and v is not None:
                rows, seen = _numel(q.shape[:-1]), _expression(k.shape[-2])
                attention += 2 * rows * seen * (_expression(q.shape[-1]) + _expression(v.shape[-1]))
                cached += _numel(k.shape) + _numel(v.shape)
        elif name in _PRODUCTS and out is not None:
            first = 1 if name in _WITH_SUM else 0
            left, right = (_operand(node, first + i, p) for i, p in enumerate(("input", "weight")))
            inner, other = tensor(left), tensor(right)
            if inner is None or other is None or not inner.dim():
                continue
            flops = 2 * _numel(out.shape) * _expression(inner.shape[-1])
            if right in known or left in known:
                products += flops
            else:
                attention += flops
                cached += _numel(other.shape)
    products, attention, cached = (sympy.expand(e.subs(names)) for e in (products, attention, cached))
    count = sum(_count(n) for n in weights)
    return Work(count, products, _over_context(attention), cached.subs(TOKENS, CONTEXT), width, neurons)


_ATTENTIONS = frozenset(["scaled_dot_product_attention", "grouped_attention"])
_PRODUCTS = LINEARS | frozenset(["matmul", "__matmul__", "bmm", "addmm", "mm", "baddbmm"])
_WITH_SUM = frozenset(["addmm", "baddbmm"])  # what is added comes first


def _operand(node: fx.Node, at: int, name: str) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _parameters_behind(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For values that are made of parameters and nothing else, the parameters that they are made of."""
    known: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if is_parameter_like(node):
            known[node] = [node]
        elif inputs and all(n in known for n in inputs):
            known[node] = list(dict.fromkeys(p for n in inputs for p in known[n]))
    return known


def _over_context(attention: sympy.Expr) -> sympy.Expr:
    """Without a cache the context is the call's own tokens: what grows with their square is tokens times context."""
    found = sympy.Integer(0)
    for (power,), factor in sympy.Poly(attention, TOKENS).terms():
        found += factor * (TOKENS**power if power < 2 else TOKENS ** (power - 1) * CONTEXT)
    return sympy.expand(found)


def _count(weight: fx.Node) -> int:
    value = tensor(weight)
    return int(prod(value.shape)) if value is not None else 0


def _expression(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _numel(shape: Any) -> sympy.Expr:
    return sympy.Mul(*(_expression(s) for s in shape))
