"""Sites that run on some of the tokens of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from skipc.ir.program import Gather, Queries

_FAR = 1 << 62


def gathered(
    region: Callable[[list[Any]], Sequence[Any]],
    arguments: Sequence[Any],
    gather: Gather,
    rows: torch.Tensor,
) -> torch.Tensor | None:
    """What ``region`` makes of some tokens.

    Args:
        region: of a site that treats every token by itself.
        arguments: of the call on all tokens.
        gather: which of them have a row for each token.
        rows: bool ``[batch, tokens]``, with at least one token.

    Returns:
        ``[chosen tokens, width]``, or None if the region cannot take so few.
    """
    chosen = rows.flatten().nonzero().flatten()
    count, (batch, tokens) = len(chosen), rows.shape
    if gather.varies is None:
        batch, tokens = 1, count
    elif gather.varies == 1:
        tokens = max(2, -(-count // batch))  # Inductor's dynamic sizes are 2 or more
    else:
        batch = max(2, -(-count // tokens))
    if not gather.admits((batch, tokens)) or (gather.varies is not None and batch * tokens >= rows.numel()):
        return None
    if batch * tokens > count:  # filled up with copies, which nobody looks at
        chosen = torch.cat([chosen, chosen[:1].expand(batch * tokens - count)])
    few = list(arguments)
    for i in gather.tokens:
        few[i] = few[i].flatten(0, 1)[chosen].unflatten(0, (batch, tokens))
    for i, which in gather.sizes:
        few[i] = (batch, tokens)[which]
    made, *_ = region(few)
    return made.flatten(0, 1)[:count]  # type: ignore[no-any-return]


def unseen(live: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``live``, int64 ``[batch or 1, 2]``, such that an attention kernel reads no key for rows of the batch of whose
    tokens none is chosen. (What it computes for them beside costs nothing: few rows share the reading of weights.)

    Args:
        rows: bool ``[batch, tokens]``.
    """
    return torch.where(rows.any(1, keepdim=True), live, live.new_tensor([_FAR, 0]))


def queried(
    region: Callable[[list[Any]], Sequence[Any]], arguments: Sequence[Any], queries: Queries, rows: torch.Tensor
) -> torch.Tensor:
    """What ``region``, which must admit so few, makes of the queries of some tokens, whose keys are in the cache.

    Args:
        region: of an attention that treats every query by itself.
        arguments: of the call on all tokens.
        queries: which of them have a row for each token.
        rows: bool ``[1, tokens]``, with at least one token.

    Returns:
        ``[chosen tokens, width]``.
    """
    chosen = rows[0].nonzero().flatten()
    count = len(chosen)
    if count == 1:  # Inductor's dynamic sizes are 2 or more
        chosen = chosen.repeat(2)
    few = list(arguments)
    for i, dim in queries.tokens:
        few[i] = few[i].index_select(dim, chosen)
    for i in queries.sizes:
        few[i] = len(chosen)
    (made,) = region(few)
    return made[0, :count]  # type: ignore[no-any-return]
