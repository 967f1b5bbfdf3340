"""What gated calls write to, made for many calls at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from skipc.ir.gating import GateTable

_MOST = 64  # calls at a time
_KEPT = 4  # kinds of calls for which there are buffers in stock
_FEW = 64  # tokens of a call that is worth it


class Buffers(NamedTuple):
    """What one gated call writes to.

    Attributes:
        skipped: bool ``[sites]``, the table's.
        block: fp32 ``[sites, batch, tokens, 3]``, NaN.
        rows: the same as ``[sites, batch * tokens, 3]``.
    """

    skipped: torch.Tensor
    block: torch.Tensor
    rows: torch.Tensor


class Stock:
    """Buffers for coming calls. Between decode steps, with the processor's caches full of weights, an operation of
    torch takes ten times as long as in a loop: the first call of a kind makes its own buffers, later ones those of
    their successors, too."""

    def __init__(self) -> None:
        self._ready: dict[object, tuple[int, list[Buffers]]] = {}

    def take(self, table: GateTable, extent: tuple[int, int], device: torch.device | None) -> Buffers:
        """Buffers of the next call under ``table``, of ``extent``: batch and tokens."""
        # (Outside inference mode, tensors made in it may not be written to.)
        kind = table, extent, device, torch.is_inference_mode_enabled()
        count, ready = self._ready.get(kind, (0, []))
        try:
            return ready.pop()
        except IndexError:
            many = extent[0] * extent[1] <= _FEW and count > 0
            count = min(_MOST, 4 * count) if many else 1
            made = self._made(table, extent, device, count)
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            self._ready[kind] = count, made[1:]
            return made[0]

    @staticmethod
    def _made(table: GateTable, extent: tuple[int, int], device: torch.device | None, count: int) -> list[Buffers]:
        with torch.no_grad():
            sites = len(table.sites)
            blocks = torch.full((count, sites, *extent, 3), torch.nan, device=device)
            skipped = table.skip.repeat(count, 1)
            return [Buffers(*made) for made in zip(skipped, blocks, blocks.flatten(2, -2), strict=True)]
