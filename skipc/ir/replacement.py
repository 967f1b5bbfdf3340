"""What may run in the place of a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from skipc.ir.errors import PlanError
from skipc.ir.site import Source


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

    @classmethod
    def of(cls, site: str, source: Source, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Of tensors that are named ``site/name``."""
        given: dict[str, Any] = {name: tensors[f"{site}/{name}"] for name in cls.names()}
        return cls(source, **given)

    def named(self, site: str) -> dict[str, torch.Tensor]:
        """The tensors as :meth:`of` takes them."""
        return {f"{site}/{name}": value for name, value in self.tensors.items()}

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
class ReplacedSite:
    """What of a replacement changes the compiled program: all but its numbers."""

    site: str
    kind: type[Replacement]
    shapes: tuple[tuple[int, ...], ...]
    source: Source

    @classmethod
    def of(cls, site: str, replacement: Replacement) -> ReplacedSite:
        """That of ``replacement``."""
        shapes = tuple(tuple(t.shape) for t in replacement.tensors.values())
        return cls(site, type(replacement), shapes, replacement.source)


@dataclass(frozen=True)
class Replaced:
    """Sites of a program that are replaced, and whether attentions among them still write their keys and values. (Those
    that the caller or another layer reads are written anyway.)"""

    sites: tuple[ReplacedSite, ...] = ()
    keep_keys: bool = True
