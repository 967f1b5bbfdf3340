"""Which steps of a program one kernel call can run: sublayers one after the other, with no host code between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from skipc.kernels.chain import ENTRY, NOTHING, BoundChain, Gates, Links

from skipc.ir.program import Arm, Input, KernelCall, KVPolicy, ProgramSpec, Result, Step, Var

_RESIDUAL = {"skinny_linear": 5, "gated_mlp": 7, "attention_block": 20}  # among a kernel's arguments

BoundCall = Callable[..., torch.Tensor]  # (entry, operands, trusted, gates)


@dataclass(frozen=True)
class Chain:
    """Steps ``first`` to ``last`` of a program, each in its chosen arm, as one call.

    Attributes:
        entry: variable that the first link reads.
        outputs: variables that later steps read: (variable, True if it takes the result, False if the entry).
        links: the chain, with variables for tensors.
        parameters: its operands that are parameters of the model (and buffers, if it does not write them).
        others: its other operands.
        written: those that it writes.
        sites: numbers of the sites whose gates it asks.
    """

    first: int
    last: int
    entry: str
    outputs: tuple[tuple[str, bool], ...]
    links: Links
    parameters: tuple[str, ...]
    others: tuple[str, ...]
    written: tuple[str, ...]
    sites: frozenset[int] = frozenset()

    def operands_in(self, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The operands among ``names``, and the others."""
        known, every = frozenset(names), (*self.parameters, *self.others)
        return tuple(n for n in every if n in known), tuple(n for n in every if n not in known)

    def bind(self, names: Sequence[str]) -> Callable[[Sequence[torch.Tensor]], BoundCall]:
        """For operands that stay, those among ``names``: the chain as a function of its entry and the others, and of
        whether it is trusted (see :class:`BoundChain`)."""
        stay, others = self.operands_in(names)
        later = [i for i, name in enumerate(others) if name in self.written]

        def bind(operands: Sequence[torch.Tensor]) -> BoundCall:
            values = dict(zip(stay, operands, strict=True))
            chain = self._bound(values, others)
            touched = [values[name] for name in self.written if name in values]

            def call(
                x: torch.Tensor, given: Sequence[torch.Tensor], trusted: bool, gates: Gates | None = None
            ) -> torch.Tensor:
                torch._C._increment_version([*touched, *(given[i] for i in later)])
                return chain(x, given, trusted, gates)

            return call

        return bind

    def function(self) -> Callable[..., torch.Tensor]:
        """The chain as a function of its entry, its parameters, its other operands and, if it has them, its gates."""
        bound: tuple[weakref.ref[torch.Tensor], tuple[int, ...], BoundChain] | None = None
        # What is bound is kept alive by it. So that it dies with the model, the first parameter is not bound, but
        # handed over at each call, and its death ends the binding.
        anchor, *kept = self.parameters
        written = [self.others.index(name) for name in self.written]

        def end(_: object) -> None:
            nonlocal bound
            bound = None

        def call(
            x: torch.Tensor,
            parameters: Sequence[torch.Tensor],
            others: Sequence[torch.Tensor],
            gates: Gates | None = None,
        ) -> torch.Tensor:
            nonlocal bound
            now, identities = bound, tuple(map(id, parameters))
            if now is None or now[0]() is not parameters[0] or now[1] != identities:  # another instance, or edited
                chain = self._bound(dict(zip(kept, parameters[1:], strict=True)), (anchor, *self.others))
                now = bound = weakref.ref(parameters[0], end), identities, chain
            torch._C._increment_version([others[i] for i in written])
            return now[2](x, (parameters[0], *others), gates=gates)

        return call

    def _bound(self, values: dict[str, torch.Tensor], given: Sequence[str]) -> BoundChain:
        tensors = self.links.tensors
        places = [[i for i, operand in enumerate(tensors) if operand == name] for name in given]
        return BoundChain(self.links, [values.get(name) for name in tensors], places)


@dataclass(frozen=True)
class _Choice:
    """How one step runs: in one arm, or in one of two, as the gate of ``site`` says at run time."""

    step: Step
    arm: Arm
    skip: Arm | None = None
    site: int = -1

    @property
    def reads(self) -> tuple[str, ...]:
        arms = (self.arm,) if self.skip is None else (self.arm, self.skip)
        stream = () if self.skip is None else self.step.stream or ()
        return (*stream, *(n for a in arms for n in (*a.inputs, *(source for _, source in a.copies))))


def chains_of(spec: ProgramSpec, arms: Sequence[int]) -> list[Chain]:
    """The longest chains in ``spec`` with one arm chosen for each step, in order."""
    return _longest(spec, [_Choice(step, step.arms[a]) for step, a in zip(spec.steps, arms, strict=True)])


def gated_chains_of(spec: ProgramSpec, kv: KVPolicy) -> list[Chain]:
    """The same with the arms of sites left open: each chain asks the gates that it is called with."""
    places = {site.name: i for i, site in enumerate(spec.sites)}
    choices: list[_Choice | None] = []
    for step in spec.steps:
        if not step.sites:
            choices.append(_Choice(step, step.arms[0]))
        elif len(step.sites) == 1 and step.stream is not None:
            skip = step.arms[step.arm_for(frozenset(step.sites), kv)]
            choices.append(_Choice(step, step.arms[0], skip, places[step.sites[0]]))
        else:
            choices.append(None)
    return _longest(spec, choices)


def _longest(spec: ProgramSpec, choices: Sequence[_Choice | None]) -> list[Chain]:
    last_use = {v.name: len(choices) for v in spec.outputs if isinstance(v, Var)}
    for i, choice in reversed(list(enumerate(choices))):
        arms = spec.steps[i].arms if choice is None else ()
        read = [n for a in arms for n in (*a.inputs, *(source for _, source in a.copies))]
        for name in choice.reads if choice is not None else read:
            last_use.setdefault(name, i)
    chains: list[Chain] = []
    i = 0
    while i < len(choices):
        chain = _Builder(spec, choices, last_use, i).longest()
        if chain is not None:
            chains.append(chain)
        i = chain.last + 1 if chain is not None else i + 1
    return chains


class _Builder:
    def __init__(self, spec: ProgramSpec, choices: Sequence[_Choice | None], last_use: dict[str, int], first: int):
        self.spec, self.choices, self.last_use, self.first = spec, choices, last_use, first
        self.parameters = {spec.inputs[i] for i in spec.parameters}
        self.links = Links()
        self.entry: str | None = None
        self.values: dict[str, int] = {}  # variables made in the chain: a result, or the entry
        self.counted: set[str] = set()
        self.written: dict[str, None] = {}
        self.gate: tuple[int, bool] | None = None  # under which the next links run
        self.sites: set[int] = set()

    def longest(self) -> Chain | None:
        best = None
        for i in range(self.first, len(self.choices)):
            choice = self.choices[i]
            if choice is None or not (self._append(choice.arm) if choice.skip is None else self._gated(choice)):
                break
            best = self._ended(i) or best
        return best

    def _gated(self, choice: _Choice) -> bool:
        """Both arms, one of which is empty at run time, and the similarity of the stream around them."""
        run, skip, site = choice.arm, choice.skip, choice.site
        assert skip is not None
        assert choice.step.stream is not None
        if run.copies or len(run.outputs) != 1 or skip.outputs or len(skip.copies) != 1:
            return False
        (result,), (passed, source), (before, after) = run.outputs, skip.copies[0], choice.step.stream
        if not passed == result == after:
            return False
        counted, self.gate = set(self.counted), (site, False)
        if not self._append(run) or source not in self.values or before not in self.values:
            return False
        counted_by_run, self.counted, self.gate = self.counted, counted, (site, True)
        if skip.region is not None and not self._kernels(skip):
            return False
        self.counted |= counted_by_run
        self.gate = None
        self.sites.add(site)
        self.links.forward(site, self.values[source], self.values[result])
        self.links.measure(site, self.values[before], self.values[result])
        return True

    def _append(self, arm: Arm) -> bool:
        """Add the step that runs ``arm``; False if it cannot be part of this chain (which is then of no use)."""
        if arm.region is not None and not self._kernels(arm):
            return False
        for name, source in arm.copies:
            if source not in self.values:
                return False
            self.values[name] = self.values[source]
        return self.entry is not None

    def _kernels(self, arm: Arm) -> bool:
        assert arm.region is not None
        kernels = self.spec.regions[arm.region].kernels
        return bool(kernels) and all(self._link(call, arm, i) for i, call in enumerate(kernels))

    def _link(self, call: KernelCall, arm: Arm, number: int) -> bool:
        def named(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(named, value))
            if isinstance(value, Result):
                return f"{arm.outputs[0]}.{value.index}"
            return arm.inputs[value.index] if isinstance(value, Input) else value

        arguments: tuple = tuple(map(named, call.arguments))  # type: ignore[type-arg]
        if self.gate is not None:
            self.links.when(*self.gate)
        if call.name == "count":
            counter, amount = arguments
            self.written[counter] = None
            self.links.count(counter, amount)
            self.counted.add(counter)
            return counter not in self.values
        if call.name == "copy_rows":
            self.links.copy(arguments)
            self.written |= dict.fromkeys(arguments[2:4])
            return not self.counted.intersection(arguments[:5]) and not any(a in self.values for a in arguments[:5])
        x, residual = arguments[0], None if call.name == "cache_block" else arguments[_RESIDUAL[call.name]]
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
            self.written |= {keys: None, values: None}
        if result is not None:
            (output,) = arm.outputs  # the last call's
            self.values[output] = self.values[f"{output}.{number}"] = result
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
        operands = dict.fromkeys(name for name in links.tensors if name is not None)
        parameters = tuple(name for name in operands if name in self.parameters and name not in self.written)
        if not parameters:
            return None
        others = tuple(name for name in operands if name not in parameters)
        written = tuple(name for name in others if name in self.written)
        sites = frozenset(self.sites)
        return Chain(self.first, last, self.entry, tuple(outputs), links, parameters, others, written, sites)
