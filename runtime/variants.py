"""One program for other weights than the model's."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from skipc.runtime import sessions

from skipc.ir.errors import PlanError
from skipc.ir.plan import Plan, Shapes

if TYPE_CHECKING:
    from skipc.runtime.program import Program

log = logging.getLogger("skipc")


@dataclass(frozen=True)
class SizeGuards:
    """What compiling for a plan assumed about the sizes of a call, beside what Dynamo checks.

    Attributes:
        guards: sympy expressions, which must hold.
        symbols: the inputs that are the sizes in them, by position.
    """

    guards: tuple[Any, ...]
    symbols: Mapping[Any, int]

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether they do for these inputs."""
        values = {symbol: inputs[i] for symbol, i in self.symbols.items()}
        return all(bool(guard.subs(values)) for guard in self.guards)


CompileFor = Callable[[dict[str, tuple[int, ...]]], tuple["Program", SizeGuards]]


class Variants:
    """The programs that plans need beside ``program``: one for each set of weights' shapes, compiled when the first
    such plan comes. Plans of the model's own shapes run on ``program`` itself."""

    def __init__(self, program: Program, compile_for: CompileFor | None):
        self._program = weakref.ref(program)
        self._compile_for = compile_for
        self._places = dict(program.spec.weights)
        self._compiled: dict[Shapes, tuple[Program, SizeGuards]] = {}
        self._weights: weakref.WeakKeyDictionary[Plan, dict[int, torch.Tensor]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def under(self, plan: Plan, inputs: Sequence[Any]) -> tuple[Program, Sequence[Any]]:
        """What runs under ``plan`` instead of the program, and its inputs.

        Raises:
            PlanError: if the program cannot run with the plan's weights.
        """
        program = self._program()
        assert program is not None
        weights = self._weights.get(plan)
        if weights is None:
            weights = self._weights[plan] = self._fitting(plan, inputs)
        if not weights:
            return program, inputs
        given = list(inputs)
        for at, value in weights.items():
            given[at] = value
        other = {n: tuple(weights[i].shape) for n, i in self._places.items() if i in weights}
        other = {n: shape for n, shape in other.items() if shape != tuple(inputs[self._places[n]].shape)}
        return (self._for(other, inputs) if other else program), given

    def _fitting(self, plan: Plan, inputs: Sequence[Any]) -> dict[int, torch.Tensor]:
        """The weights of ``plan`` that this program has, by position, of the dtype and on the device of the model's."""
        places = {name: self._places[name] for name in plan.weights if name in self._places}
        return {
            at: plan.weights[name].to(inputs[at].device, inputs[at].dtype).contiguous() for name, at in places.items()
        }

    def _for(self, shapes: dict[str, tuple[int, ...]], inputs: Sequence[Any]) -> Program:
        key = tuple(sorted(shapes.items()))
        with self._lock:
            if key not in self._compiled:
                program = self._program()
                assert program is not None
                if self._compile_for is None:
                    raise PlanError("weights of other shapes need lowering='outline'")
                sessions.note_compilation(program.parameters_of(inputs))
                start = time.perf_counter()
                self._compiled[key] = self._compile_for(shapes)
                log.warning(
                    "compiled once for a plan that changes the shapes of %d weights (%.1f s)",
                    len(shapes),
                    time.perf_counter() - start,
                )
        compiled, guards = self._compiled[key]
        if guards.guards and not guards.hold(inputs):
            where = " and ".join(map(str, guards.guards))
            raise PlanError(
                f"what was compiled for this plan holds only where {where}; this call needs another session"
            )
        return compiled
