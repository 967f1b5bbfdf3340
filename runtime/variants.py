"""The programs that plans need beside a model's own: for weights of other shapes, and for sites that are replaced."""

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
from skipc.ir.program import KVPolicy
from skipc.ir.replacement import Replaced, ReplacedSite

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


@dataclass(frozen=True)
class _Fit:
    """What a plan is to a program: weights by their position, shapes of those that are not shaped like the model's,
    sites that are replaced, whether any of these keeps keys and values, and tensors for them, which are inputs behind
    all others."""

    weights: Mapping[int, torch.Tensor]
    shapes: Shapes
    replaced: tuple[ReplacedSite, ...]
    keeps: bool
    tensors: tuple[torch.Tensor, ...]


CompileFor = Callable[[dict[str, tuple[int, ...]], Replaced], tuple["Program", SizeGuards]]


class Variants:
    """The programs that plans need beside ``program``: one for each set of weights' shapes and replaced sites, compiled
    when the first such plan comes. Plans of the model's own shapes run on ``program`` itself."""

    def __init__(self, program: Program, compile_for: CompileFor | None):
        self._program = weakref.ref(program)
        self._compile_for = compile_for
        self._places = dict(program.spec.weights)
        self._compiled: dict[tuple[Shapes, Replaced], tuple[Program, SizeGuards]] = {}
        self._fitting: weakref.WeakKeyDictionary[Plan, _Fit] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def under(self, plan: Plan, inputs: Sequence[Any], kv: KVPolicy) -> tuple[Program, Sequence[Any]]:
        """What runs under ``plan`` instead of the program, and its inputs. ``kv``: what attentions that are replaced
        write to their caches, of which ``"none"`` alone is anything but all.

        Raises:
            PlanError: if the program cannot run with the plan's weights and replacements.
        """
        program = self._program()
        assert program is not None
        if plan not in self._fitting:
            self._fitting[plan] = self._fit(program, plan, inputs)
        fit = self._fitting[plan]
        if not fit.weights and not fit.replaced:
            return program, inputs
        given = list(inputs)
        for at, value in fit.weights.items():
            given[at] = value
        if not fit.shapes and not fit.replaced:
            return program, given
        compiled = self._for(fit.shapes, Replaced(fit.replaced, kv != "none" or not fit.keeps), inputs)
        return compiled, [*given, *fit.tensors]

    def _fit(self, program: Program, plan: Plan, inputs: Sequence[Any]) -> _Fit:
        """What of ``plan`` this program has, of the dtype and on the device of the model's weights."""
        places = {self._places[name]: value for name, value in plan.weights.items() if name in self._places}
        read = {i for m in program.spec.mirrored for i in m.inputs}
        if lost := [name for name in plan.weights if self._places.get(name) in read]:
            raise PlanError(f"{lost[0]} is an adapter that was fused with its layer: compile with "
                            "disable_passes=['fuse_lora'] to give it other weights by a plan")  # fmt: skip
        weights = {at: v.to(inputs[at].device, inputs[at].dtype).contiguous() for at, v in places.items()}
        names = {at: name for name, at in self._places.items()}
        shapes = sorted((names[at], tuple(v.shape)) for at, v in weights.items() if v.shape != inputs[at].shape)
        sites = {site.name: site for site in program.spec.sites}
        here = sorted(name for name in plan.replace if name in sites)
        device = program.device_of(inputs)
        tensors = [
            t.to(device, getattr(torch, sites[name].dtype)).contiguous()
            for name in here
            for t in plan.replace[name].tensors.values()
        ]
        replaced = tuple(ReplacedSite.of(n, plan.replace[n]) for n in here)
        keeps = any(sites[name].effects or sites[name].returned for name in here)
        return _Fit(weights, tuple(shapes), replaced, keeps, tuple(tensors))

    def _for(self, shapes: Shapes, replaced: Replaced, inputs: Sequence[Any]) -> Program:
        key = shapes, replaced
        with self._lock:
            if key not in self._compiled:
                program = self._program()
                assert program is not None
                if self._compile_for is None:
                    raise PlanError("weights of other shapes and replaced sites need lowering='outline'")
                registry.note_compilation(program.parameters_of(inputs))
                start = time.perf_counter()
                self._compiled[key] = self._compile_for(dict(shapes), replaced)
                log.warning(
                    "compiled once for a plan that changes the shapes of %d weights and replaces %d sites (%.1f s)",
                    len(shapes),
                    len(replaced.sites),
                    time.perf_counter() - start,
                )
        compiled, guards = self._compiled[key]
        if guards.guards and not guards.hold(inputs):
            where = " and ".join(map(str, guards.guards))
            raise PlanError(
                f"what was compiled for this plan holds only where {where}; this call needs another session"
            )
        return compiled
