"""One program for other weights than the model's."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from skipc.runtime import sessions

from skipc.ir.errors import PlanError
from skipc.ir.plan import Plan, Shapes

if TYPE_CHECKING:
    from skipc.runtime.program import Program

log = logging.getLogger("skipc")

CompileFor = Callable[[dict[str, tuple[int, ...]]], "Program"]


class Variants:
    """The programs that plans need beside ``program``: one for each set of weights' shapes, compiled when the first
    such plan comes. Plans of the model's own shapes run on ``program`` itself."""

    def __init__(self, program: Program, compile_for: CompileFor | None):
        self._program = weakref.ref(program)
        self._compile_for = compile_for
        self._places = dict(program.spec.weights)
        self._compiled: dict[Shapes, Program] = {}
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
        return self._compiled[key]
