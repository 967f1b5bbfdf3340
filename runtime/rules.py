"""What a request for text asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

OnToken = Callable[[torch.Tensor], Any]
Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids [rows, n], logits [rows, vocabulary]) -> logits


@dataclass
class Rules:
    """How a request goes on from its prompts.

    Attributes:
        most: new tokens of each row, at most.
        ends: tokens that end a row.
        pad: what comes behind them.
        process: what shapes logits, if anything does.
        sample: whether tokens are drawn; otherwise the likeliest come.
        generator: source of randomness.
        on_token: called with each step's tokens, int64 ``[batch]``; a true result stops.
        watched: whether code outside may edit the model between calls.
        advance: called for each step's tokens.
    """

    most: int
    ends: frozenset[int]
    pad: int
    process: Process | None
    sample: bool
    generator: torch.Generator | None
    on_token: OnToken | None
    watched: bool
    advance: Callable[[], None]
