"""A program on inputs that stay: what a decode loop calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from skipc.kernels.device import on_gpu
from skipc.kernels.lora import nobody_wants_adapters
from skipc.runtime import sessions
from skipc.runtime.gating import GatedCall
from skipc.runtime.program import Arms, BoundProgram, Program, Selection, make_room, selection_of

from skipc.ir.adapters import Wanted
from skipc.ir.plan import Plan
from skipc.ir.program import KVPolicy

if TYPE_CHECKING:
    from skipc.runtime.graphs import Graphs


class Repeated:
    """A program on inputs that stay, called again and again under the session in force at each call. ``wanted``: those
    inputs that say what its rows want of a bank."""

    def __init__(self, program: Program, inputs: Sequence[Any], wanted: Wanted | None = None):
        self.program, self.inputs = program, inputs
        self._wanted = wanted
        self._want: Wanted | None = None  # what it says, of a session
        self._parameters = program.parameters_of(inputs)
        self._steps: dict[Selection, BoundProgram] = {}
        self._under: weakref.WeakKeyDictionary[Plan, dict[KVPolicy, Repeated]] = weakref.WeakKeyDictionary()
        self._checked: set[Selection] = set()  # plans that have looked at the inputs since they may have changed
        self.graphs = _graphs_of(program, inputs)
        self._idle = True  # nobody wants adapters

    def __call__(self, trusted: bool) -> tuple[Any, ...]:
        """The next outputs. ``trusted``: no code that could have moved or resized an input has run since the last."""
        if not trusted:
            self.distrust()
        session = sessions.session_for(self._parameters) if sessions.any_open() else None
        if self._wanted is not None:
            self._choose(session.wanted_of(self.program) if session is not None else None)
        if session is not None:
            return session.call(self.program, self.inputs, self)
        plan = self.program.plan
        if plan is None:
            return self.run(self.program.exact)
        other = self.under(plan, plan.kv or self.program.default_kv)
        return other.run(other.program.arms_under(plan))

    def _choose(self, want: Wanted | None) -> None:
        """Say in this program's own tensors what rows want, if that is not what they say."""
        assert self._wanted is not None
        assert self.program.bank is not None
        if want is not self._want:
            want_now = want or self.program.bank.nobody
            self._wanted.become(want_now)
            self._want, self._idle = want, want_now.idle

    def under(self, plan: Plan, kv: KVPolicy) -> Repeated:
        """The same for the weights and replacements of a plan; see :meth:`Variants.under`."""
        made = self._under.setdefault(plan, {})
        if kv not in made:
            program, inputs = self.program.variants.under(plan, self.inputs, kv)
            made[kv] = Repeated(program, inputs)
        made[kv]._idle = self._idle
        return made[kv]

    def takes(self, given: Sequence[Any]) -> bool:
        """Whether it is for a call with these inputs."""
        mine = self.inputs[: len(given)]
        return len(mine) == len(given) and all(
            a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(mine, given, strict=True)
        )

    def distrust(self) -> None:
        """Inputs may have moved, or have been written."""
        self.program.follow(self.inputs)
        self._checked.clear()
        if self.graphs is not None:
            self.graphs.check()
        for other in (r for by_kv in self._under.values() for r in by_kv.values()):
            other.distrust()

    def run(self, how: Arms | GatedCall) -> tuple[Any, ...]:
        program, selection = self.program, selection_of(how)
        step = self._steps.get(selection)
        if isinstance(how, GatedCall) and not program.joins(how):
            return program.run(self.inputs, how)
        if step is None:
            outputs = program.run(self.inputs, how)  # the first call of a plan looks at what regions are given
            make_room(self._steps)
            self._steps[selection] = program.bound(selection, self.inputs)
            return outputs
        trusted = selection in self._checked
        if isinstance(how, GatedCall):
            how.leave_to_device(adapted=program.bank is None or not self._idle)
            captured = how.table.fixed or how.device is not None
            outputs = self._gated(step, trusted, selection, how) if captured else step(trusted, how)
        else:
            outputs = self._run((selection,), lambda: step(trusted))
        self._checked.add(selection)
        return outputs if how is program.exact else program.unshared(self.inputs, outputs)

    def _gated(self, step: BoundProgram, trusted: bool, selection: Selection, how: GatedCall) -> tuple[Any, ...]:
        """A step about whose gates the host has nothing to decide while it runs."""
        if self.graphs is None and how.device is None:
            return step(trusted, how)

        def run() -> tuple[Any, ...]:
            how.begin()
            return (*step(trusted, how), *how.seen)

        made, count = self._run((selection, how.table.work), run), len(self.program.spec.outputs)
        how.see(made[count:])
        return made[:count]

    def _run(self, key: tuple[Hashable, ...], step: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What ``step`` returns, as a graph if there are graphs."""
        if self.graphs is None:
            return step()
        idle = self._idle and self.program.bank is not None
        with nobody_wants_adapters() if idle else nullcontext():
            return self.graphs((*key, idle), step)


def _graphs_of(program: Program, inputs: Sequence[Any]) -> Graphs | None:
    """For graphs of a program on inputs that stay, if it is to be captured."""
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    if not program.graphs or program.spec.reads or not tensors or not all(map(on_gpu, tensors)):
        return None  # what tensors on the CPU say would be in the graph for good
    from skipc.runtime.graphs import Graphs  # imports Triton

    return Graphs(inputs)
