"""What to run instead of the whole model: sites to skip, and other weights for those that run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from skipc.ir.program import KVPolicy

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of parameters, by name and in order


@dataclass(frozen=True)
class Expectation:
    """What a profile says about a plan of its menu.

    Attributes:
        name: of the plan in the profile.
        loss: on text that the plan was not made from; see ``Judgement``.
        low, high: 95 % interval of the loss.
        speedup: over skipc's exact mode, in the calls that the plan was chosen for.
    """

    name: str
    loss: float
    low: float
    high: float
    speedup: float

    def __str__(self) -> str:
        return f"{self.name}: {self.speedup:.2f}x at a loss of {self.loss:.1%} [{self.low:.1%}, {self.high:.1%}]"


class Plan:
    """Sites to skip, and weights to run with in the place of the model's, on any compiled program of the checkpoint.

    Weights may have other shapes than those that they replace, as long as what leaves their sublayer has not: an MLP
    with fewer neurons is ``gate`` and ``up`` of fewer rows and ``down`` of fewer columns. New shapes are compiled once.

    Args:
        skip: names of sites.
        weights: by the parameter's name in the model (``model.layers.3.mlp.down_proj.weight``), floating. They are
            read, not copied.
        expected: what it loses and saves, where that was measured.
        kv: what attentions that are left out write to their caches, where the session does not say: ``"none"`` suits a
            plan that holds for whole requests.
    """

    def __init__(
        self,
        skip: Iterable[str] = (),
        weights: Mapping[str, torch.Tensor] | None = None,
        expected: Expectation | None = None,
        kv: KVPolicy | None = None,
    ):
        if isinstance(skip, str):
            raise TypeError("skip is a collection of site names, not one string")
        self.skip = frozenset(skip)
        self.weights = dict(weights or {})
        self.expected = expected
        self.kv = kv
        for name, value in self.weights.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"the weight for {name} is no floating tensor")

    def __repr__(self) -> str:
        about = f", {self.expected}" if self.expected is not None else ""
        return f"Plan({len(self.skip)} sites skipped, {len(self.weights)} weights replaced{about})"
