"""What to run instead of the whole model: sites to skip or to replace, and other weights for those that run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from skipc.ir.errors import PlanError
from skipc.ir.program import KVPolicy
from skipc.ir.site import Source

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of parameters, by name and in order


@dataclass(frozen=True, eq=False)
class Replacement:
    """Something cheap that adds to the stream in the place of a site: its module's output is made of what the site's
    branch reads. ``source`` says where that is in eager; compiled programs look for it in the graph."""

    source: Source

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The tensors that it is made of, in order."""
        return tuple(f.name for f in fields(cls) if f.name != "source")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those tensors, by name."""
        return {name: getattr(self, name) for name in self.names()}

    def made(self, stream: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The module's output, ``[..., width]``, of the stream before the site and of what its branch reads (the same
        behind a norm, where there is one), ``[..., width]`` both."""
        raise NotImplementedError

    def check(self, site: str) -> None:
        """Refuse tensors of shapes that do not fit the stream.

        Raises:
            PlanError: naming ``site``.
        """
        width, wrong = self.source.width, None
        for name, value in self.tensors.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} of the replacement for {site} is no floating tensor")
            if tuple(value.shape) not in self._shapes(name, width):
                wrong = f"{name} of shape {list(value.shape)}"
        if wrong is not None:
            raise PlanError(f"the replacement for {site} has {wrong}, which does not fit a stream of width {width}")

    def _shapes(self, name: str, width: int) -> tuple[tuple[int, ...], ...]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Affine(Replacement):
    """``scale * stream + shift``. With one number for ``scale`` and no shift this is AdaSkip's compensation (arXiv
    2501.02336, section 3.3), which makes the stream ``1 + scale`` times as large.

    Attributes:
        scale: ``[width]`` or ``[1]``.
        shift: ``[width]`` or ``[1]``.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def made(self, stream: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return stream * self.scale + self.shift

    def _shapes(self, name: str, width: int) -> tuple[tuple[int, ...], ...]:
        return (width,), (1,)


@dataclass(frozen=True, eq=False)
class LowRank(Replacement):
    """``up @ (down @ read) + shift``, a linear map of low rank.

    Attributes:
        down: ``[rank, width]``.
        up: ``[width, rank]``.
        shift: ``[width]``.
    """

    down: torch.Tensor
    up: torch.Tensor
    shift: torch.Tensor

    @property
    def rank(self) -> int:
        """Of the map."""
        return self.down.shape[0]

    def made(self, stream: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(read, self.down), self.up, self.shift)

    def _shapes(self, name: str, width: int) -> tuple[tuple[int, ...], ...]:
        rank = self.down.shape[0] if self.down.dim() == 2 else 0
        return ({"down": (rank, width), "up": (width, rank), "shift": (width,)}[name],)


@dataclass(frozen=True)
class Action:
    """What a plan does with a site.

    Attributes:
        kind: ``run`` (as it is), ``thin`` (an MLP of fewer neurons), ``lowrank``, ``affine`` or ``scale`` (see
            :class:`LowRank` and :class:`Affine`, of which ``scale`` has one number and no shift), or ``skip``.
        size: neurons of a thin MLP; rank of a map of low rank.
    """

    kind: ActionKind = "run"
    size: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.size}" if self.size else self.kind


ActionKind = Literal["run", "thin", "lowrank", "affine", "scale", "skip"]
RUN, SKIP = Action("run"), Action("skip")

REPLACEMENTS: dict[str, type[Replacement]] = {"affine": Affine, "lowrank": LowRank}


def kind_of(replacement: Replacement) -> str:
    """Its name in :data:`REPLACEMENTS`."""
    return next(name for name, kind in REPLACEMENTS.items() if type(replacement) is kind)


@dataclass(frozen=True)
class ReplacedSite:
    """What of a replacement changes the compiled program: all but its numbers."""

    site: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    source: Source

    @classmethod
    def of(cls, site: str, replacement: Replacement) -> ReplacedSite:
        """That of ``replacement``."""
        shapes = tuple(tuple(t.shape) for t in replacement.tensors.values())
        return cls(site, kind_of(replacement), shapes, replacement.source)


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
        replace: what runs in the place of a site, by its name.
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
    def trained(self) -> dict[str, torch.Tensor]:
        """All its tensors: weights by the parameter's name, those of replacements by ``site/name``."""
        own = {f"{site}/{n}": t for site, r in self.replace.items() for n, t in r.tensors.items()}
        return {**self.weights, **own}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Plan:
        """The same plan with other numbers, named as :attr:`trained` has them."""
        weights = {name: tensors[name] for name in self.weights}
        replace: dict[str, Replacement] = {}
        for site, old in self.replace.items():
            given: dict[str, Any] = {n: tensors[f"{site}/{n}"] for n in old.names()}
            replace[site] = type(old)(old.source, **given)
        return Plan(self.skip, weights, self.expected, self.kv, replace)

    def __repr__(self) -> str:
        about = f", {self.expected}" if self.expected is not None else ""
        other = f", {len(self.replace)} replaced" if self.replace else ""
        return f"Plan({len(self.skip)} sites skipped{other}, {len(self.weights)} weights replaced{about})"
