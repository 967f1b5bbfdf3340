"""What to run instead of the whole model: sites to skip or to replace, and other weights for those that run."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from skipc.ir.errors import PlanError
from skipc.ir.program import KVPolicy
from skipc.ir.replacement import Affine, LowRank, Replacement

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of parameters, by name and in order


@dataclass(frozen=True)
class Action:
    """What a plan does with a site.

    Attributes:
        kind: ``run`` (as it is), ``thin`` (an MLP of fewer neurons, an attention of fewer groups of heads),
            ``lowrank``, ``affine`` or ``scale`` (see :class:`LowRank` and :class:`Affine`, of which ``scale`` has one
            number and no shift), or ``skip``.
        size: neurons of a thin MLP, groups of a thin attention; rank of a map of low rank.
    """

    kind: ActionKind = "run"
    size: int = 0

    @property
    def replacement(self) -> type[Replacement] | None:
        """What runs in the place of the site; None if nothing does."""
        return {"lowrank": LowRank, "affine": Affine, "scale": Affine}.get(self.kind)

    @classmethod
    def of(cls, replacement: Replacement) -> Action:
        """The one whose replacement that is."""
        if isinstance(replacement, LowRank):
            return cls("lowrank", replacement.rank)
        return cls("scale" if all(t.numel() == 1 for t in replacement.tensors.values()) else "affine")

    def __str__(self) -> str:
        return f"{self.kind} {self.size}" if self.size else self.kind


ActionKind = Literal["run", "thin", "lowrank", "affine", "scale", "skip"]
RUN, SKIP = Action("run"), Action("skip")


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
    with fewer neurons is ``gate`` and ``up`` of fewer rows and ``down`` of fewer columns; an attention with fewer heads
    leaves the rest of its cache as it is, from which only calls under the same plan can go on. New shapes are compiled
    once.

    Args:
        skip: names of sites.
        weights: by the parameter's name in the model (``model.layers.3.mlp.down_proj.weight``), floating. They are
            read, not copied.
        expected: what it loses and saves, where that was measured.
        kv: what attentions that are left out write to their caches, where the session does not say: ``"none"`` suits a
            plan that holds for whole requests.
        replace: what runs in the place of a site, by its name.
    """

    def __init__(
        self,
        skip: Iterable[str] = (),
        weights: Mapping[str, torch.Tensor] | None = None,
        expected: Expectation | None = None,
        kv: KVPolicy | None = None,
        replace: Mapping[str, Replacement] | None = None,
    ):
        if isinstance(skip, str):
            raise TypeError("skip is a collection of site names, not one string")
        self.skip = frozenset(skip)
        self.weights = dict(weights or {})
        self.replace = dict(replace or {})
        self.expected = expected
        self.kv = kv
        for name, value in self.weights.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"the weight for {name} is no floating tensor")
        for site, replacement in self.replace.items():
            replacement.check(site)
            if site in self.skip:
                raise PlanError(f"the plan both skips and replaces {site}")

    @property
    def whole(self) -> bool:
        """Whether it runs the model's own sites in the model's own weights, but for those that it skips."""
        return not self.weights and not self.replace

    @property
    def key(self) -> Hashable:
        """Equal for plans under which the same runs: those that skip the same sites and change nothing else; any other
        is its own."""
        return self.skip if self.whole else self

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """All its tensors: weights by the parameter's name, those of replacements by ``site/name``."""
        own = [replacement.named(site) for site, replacement in self.replace.items()]
        return {name: value for tensors in (self.weights, *own) for name, value in tensors.items()}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Plan:
        """The same plan with other numbers, named as :attr:`trained` has them."""
        weights = {name: tensors[name] for name in self.weights}
        replace = {site: type(old).of(site, old.source, tensors) for site, old in self.replace.items()}
        return Plan(self.skip, weights, self.expected, self.kv, replace)

    def __repr__(self) -> str:
        about = f", {self.expected}" if self.expected is not None else ""
        other = f", {len(self.replace)} replaced" if self.replace else ""
        return f"Plan({len(self.skip)} sites skipped{other}, {len(self.weights)} weights replaced{about})"
