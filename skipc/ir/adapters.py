"""What the compiler knows of adapters: layers that may have some, and the tensors that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from skipc.kernels.routing import places

WANTED = "adapters_wanted", "adapters_gates", "adapters_router"  # inputs of graphs that say what rows want


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A linear layer of a model that adapters may add to.

    Attributes:
        path: of its module.
        weights: the names that its weight has in the model, more than one if it is tied.
        shape: of the weight as ``linear`` takes it, ``[out, in]``.
        transposed: whether the module has it the other way round (GPT-2's Conv1D).
        memory: where the matrices of all slots lie, flat; other layers' lie there, too.
        where: int64 ``[slots, 4]``.
        scales: fp32 ``[slots]``; see :mod:`skipc.kernels.lora` for all three. They never move.
    """

    path: str
    weights: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool
    memory: torch.Tensor
    where: torch.Tensor
    scales: torch.Tensor

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As kernels take them."""
        return self.memory, self.memory, self.where, self.scales


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the rows of a call want, as kernels read it: ``table`` and ``gates`` of :mod:`skipc.kernels.lora`, and
    ``router``, of :mod:`skipc.kernels.routing`, which writes both anew at each call if it has experts."""

    table: torch.Tensor
    gates: torch.Tensor
    router: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All, in order."""
        return self.table, self.gates, self.router

    @property
    def routed(self) -> bool:
        """Whether a router decides."""
        return bool(self.router[0])

    @property
    def idle(self) -> bool:
        """Whether nobody wants anything."""
        return not self.routed and not self.table[0]

    def become(self, other: Wanted) -> None:
        """Say what ``other`` says, in place."""
        groups, per = other.table[:2].tolist()
        experts, width = (int(n) for n in other.router[:2].tolist())
        used = 2 + abs(groups) * per
        for mine, theirs, count in zip(self.tensors, other.tensors, (used, used, places(experts, width)), strict=True):
            mine[:count].copy_(theirs[:count])

    @torch.inference_mode(False)
    def copy(self) -> Wanted:
        """The same in tensors of its own."""
        made = Wanted(*map(torch.empty_like, self.tensors))
        made.become(self)
        return made


@dataclass(frozen=True)
class Scale:
    """How much of an adapter: what the input at this position says; where there is none, a number."""

    input: int | None
    number: float


@dataclass(frozen=True, eq=False)
class Mirrored:
    """An adapter that a model has among its parameters, and where a program keeps it as kernels read it.

    Attributes:
        a, b: positions of its matrices among the inputs of a call.
        scale: of it.
        memory, where, scales: constants of the program; see :mod:`skipc.kernels.lora`.
        slot: of these.
    """

    a: int
    b: int
    scale: Scale
    memory: torch.Tensor
    where: torch.Tensor
    scales: torch.Tensor
    slot: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """All that it is made of."""
        return (self.a, self.b) if self.scale.input is None else (self.a, self.b, self.scale.input)


def operands_of(layers: Iterable[AdaptedLayer]) -> list[torch.Tensor]:
    """What the adapters of some layers are held by, each tensor once."""
    return list({id(t): t for layer in layers for t in layer.operands}.values())


@runtime_checkable
class Bank(Protocol):
    """What programs need of a :class:`skipc.AdapterBank`."""

    model: torch.nn.Module | None
    layers: dict[str, AdaptedLayer]
    nobody: Wanted  # no row wants anything

    def blank(self) -> Wanted:
        """One to be filled, in which nobody wants anything."""
        ...
