"""How a step can run on some of the tokens of a call: which inputs have a row for each, how many there may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from skipc.passes.lowering.arms import ArmGraph
from skipc.passes.lowering.regions import Region, kernel_calls
from skipc.passes.ops import op_name, same_sizes
from skipc.passes.token_wise import token_dims
from torch import fx
from torch._prims_common import is_contiguous_or_false

from skipc.ir.adapters import WANTED
from skipc.ir.program import Gather, Queries, Step
from skipc.ir.site import SiteKind


def gather_of(
    step: Step, kinds: Sequence[SiteKind], values: Mapping[str, Any], stream: torch.Tensor | None, region: Region
) -> Gather | None:
    """For an MLP, which treats each token by itself, so that a region which takes fewer is all that is needed.

    Args:
        kinds: of the step's sites.
        values: fake values of the run arm's inputs by name, but for parameters.
        stream: its fake value before the step.
        region: that the run arm calls.
    """
    run = step.arms[0]
    wise = [kind in (SiteKind.MLP, SiteKind.MOE) for kind in kinds] == [True]
    results = [name for name in run.outputs if name != step.moments]
    if not (wise and step.scalable) or stream is None or len(results) != 1 or run.copies:
        return None
    tokens: list[int] = []
    sizes: list[tuple[int, int]] = []
    for i, name in enumerate(run.inputs):
        if name not in values:
            continue
        value = values[name]
        which = [d for d in (0, 1) if isinstance(value, torch.SymInt) and same_sizes((value,), stream.shape[d : d + 1])]
        if isinstance(value, torch.Tensor) and value.dim() >= 2 and same_sizes(value.shape[:2], stream.shape[:2]):
            tokens.append(i)
        elif len(which) == 1:
            sizes.append((i, which[0]))
        else:
            return None
    if kernel_calls(region.gm.graph):
        return Gather(tuple(tokens), tuple(sizes))
    if stream.dim() != 3:
        return None
    extent: tuple[Any, ...] = tuple(stream.shape[:2])
    symbols = [(n.node.expr, d) for d, n in enumerate(extent) if isinstance(n, torch.SymInt)]
    if not symbols or {s for s, _ in symbols} != set(region.symbols):
        return None
    return Gather(tuple(tokens), tuple(sizes), symbols[-1][1], tuple(symbols), tuple(region.guards))


def queries_of(
    arm: ArmGraph, stream: torch.Tensor | None
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], sympy.Symbol] | None:
    """For what is left of an attention whose keys are in the cache: tokens, sizes and symbol of
    :class:`~skipc.ir.program.Queries`, provided that it treats each query by itself, and takes any number of them."""
    size = stream.shape[1] if stream is not None and stream.dim() == 3 else None
    if arm.graph is None or not isinstance(size, torch.SymInt) or not isinstance(size.node.expr, sympy.Symbol):
        return None
    *nodes, output = arm.graph.nodes
    dims = token_dims([n for n in nodes if n.op.startswith("call")], size)
    (result,) = output.args[0]
    if dims is None or dims[result] != 1:
        return None
    inputs = [n for n in nodes if n.op == "placeholder"]
    if any(n.name in WANTED for n in inputs):  # of all rows: those that are taken could not tell which they are
        return None
    tokens = tuple((i, dim) for i, n in enumerate(inputs) if (dim := dims.get(n)) is not None)
    given = [n.meta["example_value"] for n in inputs]
    if not all(is_contiguous_or_false(given[i]) for i, _ in tokens):  # as the rows that are taken of them will be
        return None
    sizes = tuple(i for i, v in enumerate(given) if isinstance(v, torch.SymInt) and v.node.expr == size.node.expr)
    return tokens, sizes, size.node.expr


def live_of(region: Region) -> int | None:
    """Which input of an attention kernel says what keys the queries of each row may see."""
    places = {"attention_block": 14, "decode_attention": 4, "grouped_attention": 4}
    nodes = list(region.gm.graph.nodes)
    given = [n.args[places[op_name(n)]] for n in nodes if op_name(n) in places]
    if len(given) != 1 or not isinstance(given[0], fx.Node) or given[0].op != "placeholder" or len(given[0].users) != 1:
        return None
    return [n for n in nodes if n.op == "placeholder"].index(given[0])


def with_guards(queries: Queries, guards: Sequence[Any]) -> Queries | None:
    """``queries`` under what compiling their region assumed; None if that ties their number to other sizes."""
    mine = [g for g in guards if queries.symbol in g.free_symbols]
    return replace(queries, guards=tuple(mine)) if all(len(g.free_symbols) == 1 for g in mine) else None
