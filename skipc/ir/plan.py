"""What to run instead of the whole model: sites to skip, and other weights for those that run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of parameters, by name and in order


class Plan:
    """Sites to skip, and weights to run with in the place of the model's, on any compiled program of the checkpoint.

    Weights may have other shapes than those that they replace, as long as what leaves their sublayer has not: an MLP
    with fewer neurons is ``gate`` and ``up`` of fewer rows and ``down`` of fewer columns. New shapes are compiled once.

    Args:
        skip: names of sites.
        weights: by the parameter's name in the model (``model.layers.3.mlp.down_proj.weight``), floating. They are
            read, not copied.
    """

    def __init__(self, skip: Iterable[str] = (), weights: Mapping[str, torch.Tensor] | None = None):
        if isinstance(skip, str):
            raise TypeError("skip is a collection of site names, not one string")
        self.skip = frozenset(skip)
        self.weights = dict(weights or {})
        for name, value in self.weights.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"the weight for {name} is no floating tensor")

    def __repr__(self) -> str:
        return f"Plan({len(self.skip)} sites skipped, {len(self.weights)} weights replaced)"
