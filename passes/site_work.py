"""How much each site computes and reads, as expressions in the sizes of a call."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import sympy
from skipc.passes.ops import argument, is_parameter_like, op_name, tensor
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
    """

    weights: int
    products: sympy.Expr
    attention: sympy.Expr
    cached: sympy.Expr


def site_work(streams: Streams) -> dict[str, Work]:
    """The work of all sites of a graph of a call without caches, by name."""
    found = {}
    for junction in streams.junctions:
        point = tensor(junction.point)
        if point is None:
            continue
        sizes = {_expression(point.shape[0]): BATCH}
        if point.dim() > 2:
            sizes[_expression(point.shape[1])] = TOKENS
        names = {size: symbol for size, symbol in sizes.items() if isinstance(size, sympy.Symbol)}
        for term in junction.terms:
            found[term.name] = _work(term.branch, names)
    return found


def _work(branch: list[fx.Node], names: dict[sympy.Expr, sympy.Symbol]) -> Work:
    weights: dict[fx.Node, None] = {}
    products = attention = cached = sympy.Integer(0)
    for node in branch:
        own = [n for n in node.all_input_nodes if is_parameter_like(n)]
        weights |= dict.fromkeys(own)
        out, name = tensor(node), op_name(node)
        if name in ("scaled_dot_product_attention", "grouped_attention"):
            named = name != "grouped_attention"  # torch's op may be given its operands by name
            operands = [argument(node, p) for p in ("query", "key", "value")] if named else node.args[:3]
            q, k, v = (tensor(a) for a in operands)
            if q is not None and k is not None and v is not None:
                rows, seen = _numel(q.shape[:-1]), _expression(k.shape[-2])
                attention += 2 * rows * seen * (_expression(q.shape[-1]) + _expression(v.shape[-1]))
                cached += _numel(k.shape) + _numel(v.shape)
        elif name in _PRODUCTS and out is not None:
            inner = tensor(node.args[0])
            if inner is not None and inner.dim() and out.dim():
                flops = 2 * _numel(out.shape) * _expression(inner.shape[-1])
                if own:
                    products += flops
                else:
                    attention += flops
                    operand = tensor(node.args[1]) if len(node.args) > 1 else None
                    cached += _numel(operand.shape) if operand is not None else 0
    products, attention, cached = (sympy.expand(e.subs(names)) for e in (products, attention, cached))
    # Without a cache the context is the call's own tokens: what grows with their square is tokens times context.
    attention = attention.subs(TOKENS**2, TOKENS * CONTEXT)
    return Work(sum(_count(n) for n in weights), products, attention, cached.subs(TOKENS, CONTEXT))


_PRODUCTS = frozenset(["linear", "matmul", "__matmul__", "bmm", "addmm", "mm", "baddbmm"])


def _count(weight: fx.Node) -> int:
    value = tensor(weight)
    return int(prod(value.shape)) if value is not None else 0


def _expression(size: Any) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _numel(shape: Any) -> sympy.Expr:
    return sympy.Mul(*(_expression(s) for s in shape))
