"""Which drafted tokens are what the full model would have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from skipc.runtime.drawing import draw_by


def greedy(drafted: Sequence[int], likeliest: Callable[[int, Sequence[int]], int]) -> list[int]:
    """The tokens that come: those of ``drafted`` that are likeliest, and the likeliest behind them.

    Args:
        likeliest: token behind so many of ``drafted``, given those.
    """
    made: list[int] = []
    for token in drafted:
        made.append(likeliest(len(made), made))
        if made[-1] != token:
            return made
    return [*made, likeliest(len(made), made)]


def sampled(
    drafted: Sequence[int], weights: Callable[[int, Sequence[int]], torch.Tensor], generator: torch.Generator | None
) -> list[int]:
    """Tokens with the distribution of the full model: a drafted token is kept with the model's own probability, and
    otherwise one of the others drawn (rejection sampling, arXiv 2211.17192 and 2302.01318, for drafts that are sure of
    their token).

    Args:
        weights: probabilities, float ``[vocabulary]``, behind so many tokens of ``drafted``, given those.
    """
    made: list[int] = []
    for token in drafted:
        odds = weights(len(made), made)
        if not float(torch.rand((), generator=generator, device=odds.device)) < float(odds[token] / odds.sum()):
            others = odds.clone()
            others[token] = 0
            if float(others.sum()) != 0:  # else it was the only one, but for rounding
                return [*made, int(draw_by(others[None], generator))]
        made.append(token)
    return [*made, int(draw_by(weights(len(made), made)[None], generator))]
