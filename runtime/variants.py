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
from skipc.runtime import registry

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
        self._fitting: weakref.WeakKeyDictionary[Plan, tuple[dict[int, torch.Tensor], Shapes]]
        self._fitting = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def under(self, plan: Plan, inputs: Sequence[Any]) -> tuple[Program, Sequence[Any]]:
        """What runs under ``plan`` instead of the program, and its inputs.

        Raises:
            PlanError: if the program cannot run with the plan's weights.
        """
        program = self._program()
        assert program is not None
        if plan not in self._fitting:
            self._fitting[plan] = self._fit(plan, inputs)
        weights, shapes = self._fitting[plan]
        if not weights:
            return program, inputs
        given = list(inputs)
        for at, value in weights.items():
            given[at] = value
        return (self._for(shapes, inputs) if shapes else program), given

    def _fit(self, plan: Plan, inputs: Sequence[Any]) -> tuple[dict[int, torch.Tensor], Shapes]:
        """The weights of ``plan`` that this program has, by position, of the dtype and on the device of the model's;
        and the shapes of those that are not shaped like them."""
        places = {self._places[name]: value for name, value in plan.weights.items() if name in self._places}
        weights = {at: v.to(inputs[at].device, inputs[at].dtype).contiguous() for at, v in places.items()}
        names = {at: name for name, at in self._places.items()}
        shapes = sorted((names[at], tuple(v.shape)) for at, v in weights.items() if v.shape != inputs[at].shape)
        return weights, tuple(shapes)

    def _for(self, shapes: Shapes, inputs: Sequence[Any]) -> Program:
        with self._lock:
            if shapes not in self._compiled:
                program = self._program()
                assert program is not None
                if self._compile_for is None:
                    raise PlanError("weights of other shapes need lowering='outline'")
                registry.note_compilation(program.parameters_of(inputs))
                start = time.perf_counter()
                self._compiled[shapes] = self._compile_for(dict(shapes))
                log.warning(
                    "compiled once for a plan that changes the shapes of %d weights (%.1f s)",
                    len(shapes),
                    time.perf_counter() - start,
                )
        compiled, guards = self._compiled[shapes]
        if guards.guards and not guards.hold(inputs):
            where = " and ".join(map(str, guards.guards))
            raise PlanError(
                f"what was compiled for this plan holds only where {where}; this call needs another session"
            )
        return compiled
