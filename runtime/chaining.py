"""Which steps of a program one kernel call can run: sublayers one after the other, with no host code between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from skipc.kernels.chain import ENTRY, NOTHING, BoundChain, Links

from skipc.ir.program import Arm, Input, KernelCall, ProgramSpec, Var

BoundCall = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Chain:
    """Steps ``first`` to ``last`` of a program, each in its chosen arm, as one call.

    Attributes:
        entry: variable that the first link reads.
        result: index of the last result in ``links``.
        outputs: variables that later steps read: (variable, True if it takes the result, False if the entry).
        fixed: positions of ``links.tensors`` (variables, here) that are parameters of the model.
        changing: positions of the other operands.
        written: which of ``changing`` are written.
    """

    first: int
    last: int
    entry: str
    outputs: tuple[tuple[str, bool], ...]
    links: Links
    fixed: tuple[int, ...]
    changing: tuple[int, ...]
    written: tuple[int, ...]

    def operands(self, positions: Sequence[int]) -> list[str]:
        """The variables at some positions."""
        return [self.links.tensors[i] for i in positions]

    def operands_in(self, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions of the operands among ``names``, and of the others."""
        known, every = frozenset(names), sorted((*self.fixed, *self.changing))
        inside = tuple(i for i in every if self.links.tensors[i] in known)
        return inside, tuple(i for i in every if i not in inside)

    def bind(self, names: Sequence[str]) -> Callable[[Sequence[torch.Tensor]], BoundCall]:
        """For operands that stay, those among ``names``: the chain as a function of its entry and the others."""
        inside, others = self.operands_in(names)
        written = {self.changing[i] for i in self.written}
        written_later = [i for i, at in enumerate(others) if at in written]

        def bind(operands: Sequence[torch.Tensor]) -> BoundCall:
            given: list[Any] = [None] * len(self.links.tensors)
            for at, value in zip(inside, operands, strict=True):
                given[at] = value
            chain, touched = BoundChain(self.links, given, others), [given[at] for at in inside if at in written]

            def call(x: torch.Tensor, changing: Sequence[torch.Tensor]) -> torch.Tensor:
                torch._C._increment_version([*touched, *(changing[i] for i in written_later)])
                return chain(x, changing)

            return call

        return bind

    def function(self) -> Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]:
        """The chain as a function of its entry and its operands, fixed and changing."""
        bound: tuple[weakref.ref[torch.Tensor], tuple[int, ...], BoundChain] | None = None
        # What is bound is kept alive by it. So that it dies with the model, the first parameter is not bound, but
        # handed over at each call, and its death ends the binding.
        anchor, *kept = self.fixed
        given = (anchor, *self.changing)

        def end(_: object) -> None:
            nonlocal bound
            bound = None

        def call(x: torch.Tensor, fixed: Sequence[torch.Tensor], changing: Sequence[torch.Tensor]) -> torch.Tensor:
            nonlocal bound
            now, identities = bound, tuple(map(id, fixed))
            if now is None or now[0]() is not fixed[0] or now[1] != identities:  # another instance, or it was edited
                tensors: list[Any] = [None] * len(self.links.tensors)
                for i, value in zip(kept, fixed[1:], strict=True):
                    tensors[i] = value
                now = bound = weakref.ref(fixed[0], end), identities, BoundChain(self.links, tensors, given)
            torch._C._increment_version([changing[i] for i in self.written])
            return now[2](x, (fixed[0], *changing))

        return call


def chains_of(spec: ProgramSpec, arms: Sequence[int]) -> list[Chain]:
    """The longest chains in ``spec`` with one arm chosen for each step, in order."""
    chosen = [step.arms[a] for step, a in zip(spec.steps, arms, strict=True)]
    last_use = {v.name: len(chosen) for v in spec.outputs if isinstance(v, Var)}
    for i in reversed(range(len(chosen))):
        for name in (*chosen[i].inputs, *(source for _, source in chosen[i].copies)):
            last_use.setdefault(name, i)
    chains: list[Chain] = []
    i = 0
    while i < len(chosen):
        chain = _Builder(spec, chosen, last_use, i).longest()
        if chain is not None:
            chains.append(chain)
        i = chain.last + 1 if chain is not None else i + 1
    return chains


class _Builder:
    def __init__(self, spec: ProgramSpec, chosen: list[Arm], last_use: dict[str, int], first: int):
        self.spec, self.chosen, self.last_use, self.first = spec, chosen, last_use, first
        self.parameters = {spec.inputs[i] for i in spec.parameters}
        self.links = Links()
        self.entry: str | None = None
        self.values: dict[str, int] = {}  # variables made in the chain: a result, or the entry
        self.counted: set[str] = set()
        self.written: list[int] = []

    def longest(self) -> Chain | None:
        best = None
        for i in range(self.first, len(self.chosen)):
            if not self._append(self.chosen[i]):
                break
            best = self._ended(i) or best
        return best

    def _append(self, arm: Arm) -> bool:
        """Add the step that runs ``arm``; False if it cannot be part of this chain (which is then of no use)."""
        if arm.region is not None:
            kernels = self.spec.regions[arm.region].kernels
            if not kernels or not all(self._link(call, arm) for call in kernels):
                return False
        for name, source in arm.copies:
            if source not in self.values:
                return False
            self.values[name] = self.values[source]
        return self.entry is not None

    def _link(self, call: KernelCall, arm: Arm) -> bool:
        def named(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(named, value))
            return arm.inputs[value.index] if isinstance(value, Input) else value

        arguments: tuple = tuple(map(named, call.arguments))  # type: ignore[type-arg]
        if call.name == "count":
            counter, amount = arguments
            self.written.append(len(self.links.tensors))
            self.links.count(counter, amount)
            self.counted.add(counter)
            return counter not in self.values
        x, residual = arguments[0], None if call.name == "cache_block" else arguments[-1]
        if self.entry is None:
            self.entry = x
            self.values[x] = ENTRY
        if x not in self.values or not (residual is None or residual in self.values):
            return False
        start = len(self.links.tensors)
        source, added = self.values[x], NOTHING if residual is None else self.values[residual]
        result = None
        if call.name == "cache_block":
            self.links.cache(source, arguments)
        elif call.name == "attention_block":
            result = self.links.attention(source, added, arguments)
        elif call.name == "skinny_linear":
            result = self.links.linear(source, added, arguments)
        else:
            result = self.links.mlp(source, added, arguments)
        operands = self.links.tensors[start:]
        if self.counted.intersection(operands) or any(o in self.values for o in operands if o is not None):
            return False
        if call.name in ("attention_block", "cache_block"):
            keys, values = arguments[10:12] if call.name == "attention_block" else arguments[9:11]
            self.written += [start + operands.index(keys), start + operands.index(values)]
        if result is not None:
            (output,) = arm.outputs
            self.values[output] = result
        return True

    def _ended(self, last: int) -> Chain | None:
        """The chain up to step ``last``, if it has links to join and nothing between them is read later."""
        result = self.links.results - 1
        outputs = [
            (name, value == result)
            for name, value in self.values.items()
            if name != self.entry and self.last_use.get(name, -1) > last
        ]
        if result < 1 or any(self.values[name] not in (ENTRY, result) for name, _ in outputs):
            return None
        links = Links(list(self.links.tensors), list(self.links.code), list(self.links.numbers), self.links.results)
        assert self.entry is not None
        fixed: list[int] = []
        changing: list[int] = []
        for i, name in enumerate(links.tensors):
            if name is not None:
                (fixed if name in self.parameters else changing).append(i)
        if not fixed:
            return None
        written = tuple(changing.index(i) for i in self.written)
        return Chain(self.first, last, self.entry, tuple(outputs), links, tuple(fixed), tuple(changing), written)
