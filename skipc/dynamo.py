"""``torch.compile`` as skipc calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile_isolated(function: Any, **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with compilations of its own: two models of one class, one model under two configs, or a trace
    made for an explanation never spend each other's recompile limit or take each other's code.

    The limit is raised: beyond it Dynamo runs eager in silence, and batch sizes and cache types add up.
    """
    return torch.compile(function, isolate_recompiles=True, recompile_limit=64, **options)  # type: ignore[call-overload]
