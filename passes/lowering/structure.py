"""When two regions may share one compiled function: equal code, literals, dtypes, strides, aliasing and symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx


def structure_of(graph: fx.Graph, owner: torch.nn.Module) -> tuple[str, list[sympy.Symbol]]:
    """A key, equal for interchangeable regions, and the region's size symbols in the order in which the key names
    them, so that facts about one region's symbols can be asked of another's."""
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    storages: dict[int, int] = {}
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for i, node in enumerate(graph.nodes):
        names[node] = f"%{i}"
        target = _target(node, owner)
        arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(names[n]))  # type: ignore[arg-type,return-value]
        line = f"%{i} {node.op} {target} {_literal(arguments, symbols)}"
        if node.op == "placeholder":
            line += " : " + _value(node.meta.get("example_value"), symbols, storages)
        lines.append(line)
    lines.append(f"autocast {torch.is_autocast_enabled('cpu')} {torch.is_autocast_enabled('cuda')}")
    return "\n".join(lines), list(symbols)


class _Name:
    """A node's name that prints bare."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _target(node: fx.Node, owner: torch.nn.Module) -> str:
    if node.op == "placeholder":
        return ""
    if node.op == "get_attr":
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return f"{type(value).__name__}@{id(value)}"
    if callable(node.target):
        return f"{getattr(node.target, '__module__', '')}.{node.target!r}"
    return str(node.target)


def _literal(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_literal(v, symbols) for v in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}={_literal(v, symbols)}' for k, v in value.items())}}}"
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(_renamed(value.node.expr, symbols))
    return f"{type(value).__name__}:{value!r}"


def _value(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol], storages: dict[int, int]) -> str:
    if not isinstance(value, torch.Tensor):
        return _literal(value, symbols)
    storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
    sizes = [_literal(s, symbols) for s in (*value.shape, "|", *value.stride(), "|", value.storage_offset())]
    flags = f"{value.layout} {value.is_conj()} {value.is_neg()} {value.is_inference()}"
    return f"{value.dtype} {value.device} [{' '.join(sizes)}] storage{storage} {flags}"


def _renamed(expr: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> Any:
    for symbol in sorted(expr.free_symbols, key=str):
        symbols.setdefault(symbol, sympy.Symbol(f"n{len(symbols)}", integer=True))
    return expr.xreplace(symbols)


def translate(exprs: Sequence[Any], mine: list[sympy.Symbol], theirs: list[sympy.Symbol]) -> list[Any]:
    """``exprs`` over ``theirs`` said of ``mine``."""
    mapping = dict(zip(theirs, mine, strict=True))
    return [e.xreplace(mapping) for e in exprs]
