"""Some rows of a tensor, when which ones they are is known on the device alone: a list of them, a copy, and back.

Sizes do not say how many rows are chosen: lists and copies have room for all, and a count says how much of it is used.
So nothing waits for the device, and a captured graph serves any choice.
"""

from __future__ import annotations

import torch
from skipc.kernels.library import library

library.define("compact_rows(Tensor mask) -> (Tensor, Tensor)")
library.define("gather_rows(Tensor x, Tensor index, Tensor count) -> Tensor")
library.define("scatter_rows_(Tensor(a!) base, Tensor rows, Tensor index, Tensor count, bool add) -> ()")

MOST_ROWS = 1 << 16  # that a list is made of


def compact_rows(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are chosen.

    Args:
        mask: bool, at most :data:`MOST_ROWS`, of any shape; rows are counted as if it were flat.

    Returns:
        int32 ``[rows]``, the places of those that are, in order, and then zeros; and int32 ``[1]``, how many they are.

    Raises:
        RuntimeError: for more rows.
    """
    if mask.numel() > MOST_ROWS:
        raise RuntimeError(f"{mask.numel()} rows are more than the {MOST_ROWS} that can be chosen among")
    chosen = mask.flatten().nonzero().flatten().int()
    index = torch.zeros(mask.numel(), dtype=torch.int32, device=mask.device)
    index[: len(chosen)] = chosen
    return index, torch.full((1,), len(chosen), dtype=torch.int32, device=mask.device)


def gather_rows(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The rows that are chosen.

    Args:
        x: ``[..., width]``.
        index: int32 ``[room]``, places of rows. count: int32 ``[1]``, how many of them; no more than ``room``.

    Returns:
        ``[room, width]``, of which the first ``count`` rows are written.
    """
    out, chosen = x.new_empty(len(index), x.shape[-1]), index[: int(count)].long()
    out[: len(chosen)] = x.reshape(-1, x.shape[-1])[chosen]
    return out


def scatter_rows_(base: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, count: torch.Tensor, add: bool) -> None:
    """Put rows where they were taken from, or add them there, in fp32 and rounded once.

    Args:
        base: ``[..., width]``, which can be viewed as rows; written.
        rows: ``[room, width]``, of its dtype.
        index, count: as in :func:`gather_rows`; no row twice.
    """
    chosen = index[: int(count)].long()
    flat, rows = base.view(-1, base.shape[-1]), rows[: len(chosen)]
    if add:
        rows = flat[chosen] + rows  # both of one dtype: torch adds in fp32
    flat[chosen] = rows


library.impl("compact_rows", compact_rows, "CompositeExplicitAutograd")
library.impl("gather_rows", gather_rows, "CompositeExplicitAutograd")
library.impl("scatter_rows_", scatter_rows_, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::compact_rows")
def _(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return mask.new_empty(mask.numel(), dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


@torch.library.register_fake("skipc::gather_rows")
def _(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return x.new_empty(index.shape[0], x.shape[-1])


@torch.library.register_fake("skipc::scatter_rows_")
def _(*_: object) -> None:
    return None
