"""The callable that skipc emits."""

from __future__ import annotations

import itertools
import linecache
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from skipc.kernels.device import wait_for
from skipc.kernels.similarity import stream_similarity
from skipc.runtime import sessions
from skipc.runtime.chaining import Chain, chains_of, gated_chains_of
from skipc.runtime.codegen import bound_source_for, source_for
from skipc.runtime.gating import GatedCall, GatedSpec
from skipc.runtime.huge_pages import back_with_huge_pages
from skipc.runtime.mirrors import Mirrors
from skipc.runtime.replay import note_call
from skipc.runtime.rows import gathered, queried, unseen
from skipc.runtime.variants import CompileFor, Variants

from skipc.ir.adapters import Bank, Wanted, operands_of
from skipc.ir.errors import PassError, PlanError
from skipc.ir.plan import Plan
from skipc.ir.program import Arm, KVPolicy, ProgramSpec, Size, Step, Var

if TYPE_CHECKING:
    from skipc.runtime.repeated import Repeated

_MAX_BOUND = 256  # plans that a program keeps ready
_serial = itertools.count()

Arms = tuple[int, ...]
Stream = tuple[tuple[torch.Tensor, int], ...]  # points of a residual stream, with their versions
Selection = Arms | KVPolicy  # one arm for each step; or all that a KV policy allows, of which gates choose
BoundProgram = Callable[..., tuple[Any, ...]]  # (trusted, and a gated call if gates choose)
RegionFunction = Callable[[list[Any]], Sequence[Any]]


@dataclass
class Measurement:
    """One site in one call of :meth:`Program.measure`. ``similarity`` is the fp32 cosine between the residual stream
    before the site's step and after it, averaged over tokens; None where the step did not change the stream's shape
    into something comparable."""

    sites: tuple[str, ...]
    seconds: float
    similarity: float | None


class Program:
    """One compiled graph: regions, and the host code that calls them under the session in force.

    Nothing in here belongs to an instance of the model: weights come in as inputs at every call, because Dynamo may
    use one compilation for several instances of a class.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        functions: Sequence[RegionFunction],
        default_kv: KVPolicy = "project",
        partial: str | None = None,
        huge_pages: bool = False,
        compile_for: CompileFor | None = None,
        bank: Bank | None = None,
        constants: Sequence[torch.Tensor] = (),
        graphs: bool = True,
    ):
        self.spec = spec
        self.functions = tuple(functions)
        self.default_kv = default_kv
        self.partial = partial  # why this graph is not the whole model, if so
        self.huge_pages = huge_pages
        self.graphs = graphs
        self.bank = bank if spec.adapted else None
        layers = bank.layers if bank is not None else {}
        self._constants = list(constants)  # inputs behind those of a call, and then what the bank holds
        self._adapters = operands_of(layers[path] for path in spec.adapted)
        self._mirrors = Mirrors(spec.mirrored, constants) if spec.mirrored else None
        self._model_inputs = tuple(i for i in spec.parameters if i < spec.given) if spec.given >= 0 else spec.parameters
        self.variants = Variants(self, compile_for)
        self.plan: Plan | None = None  # what calls run under, unless their session brings a plan
        self.exact: Arms = (0,) * len(spec.steps)
        self.site_names = frozenset(s.name for s in spec.sites)
        self._bound: dict[Selection, Callable[..., tuple[Any, ...]]] = {}
        self._binders: dict[Selection, Callable[[Sequence[Any]], BoundProgram]] = {}
        self._gated: dict[KVPolicy, GatedSpec] = {}
        self._sites_of_chains: dict[KVPolicy, list[frozenset[int]]] = {}
        self._plans: dict[tuple[frozenset[str], KVPolicy], Arms] = {}
        self._device: torch.device | None = None

    def _chains(self, selection: Selection) -> list[Chain]:
        return gated_chains_of(self.spec, selection) if isinstance(selection, str) else chains_of(self.spec, selection)

    def _bind(self, selection: Selection) -> Callable[..., tuple[Any, ...]]:
        """The program with these arms, as Python code of its own."""
        chains = self._chains(selection)
        scope = {f"chain_{k}": chain.function() for k, chain in enumerate(chains)}
        source = source_for(self.spec, None if isinstance(selection, str) else selection, chains)
        return self._executed(source, "program", scope)  # type: ignore[no-any-return]

    def bound(self, selection: Selection, inputs: Sequence[Any]) -> BoundProgram:
        """The program with these arms on inputs that stay."""
        if selection not in self._binders:
            chains = self._chains(selection)
            scope = {f"bind_{k}": chain.bind(self.spec.inputs) for k, chain in enumerate(chains)}
            source = bound_source_for(self.spec, None if isinstance(selection, str) else selection, chains)
            make_room(self._binders)
            self._binders[selection] = self._executed(source, "bind", scope)
        return self._binders[selection](inputs)

    def _executed(self, source: str, function: str, scope: dict[str, Any]) -> Any:
        scope |= {r.name: f for r, f in zip(self.spec.regions, self.functions, strict=True)}
        scope["constants"] = tuple(v for v in self.spec.outputs if not isinstance(v, Var))
        name = f"<skipc program {id(self):#x}.{next(_serial)}>"
        exec(compile(source, name, "exec"), scope)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        weakref.finalize(scope[function], linecache.cache.pop, name, None)
        return scope[function]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        session = sessions.session_for(self.parameters_of(inputs)) if sessions.any_open() else None
        every = self._with(inputs, session.wanted_of(self) if session and self.bank else None)
        outputs = self._alone(every) if session is None else session.call(self, every)
        note_call(self, inputs, outputs)
        return outputs

    def _with(self, inputs: Sequence[Any], wanted: Wanted | None) -> tuple[Any, ...]:
        """All inputs: those of a call, constants, what the bank holds, and what rows want of it."""
        constants = self._constants if self._mirrors is None else self._mirrors.of(inputs).constants
        if self.bank is None:
            return (*inputs, *constants) if constants else tuple(inputs)
        return (*inputs, *constants, *self._adapters, *(wanted or self.bank.nobody).tensors)

    def follow(self, inputs: Sequence[Any]) -> None:
        """Have constants be what the inputs of a call say now, of those that follow them."""
        if self._mirrors is not None:
            self._mirrors.of(inputs)

    def _alone(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """A call without a session."""
        if self.plan is None:
            return self.run(inputs, self.exact)
        program, inputs = self.variants.under(self.plan, inputs, self.plan.kv or self.default_kv)
        return program.run(inputs, program.arms_under(self.plan))

    def arms_under(self, plan: Plan, skip: frozenset[str] = frozenset(), kv: KVPolicy | None = None) -> Arms:
        """The arms that a preset's plan asks for, with more sites left out; unless ``kv`` is given, attentions that are
        left out write their keys where the caller keeps them."""
        names = plan.skip | skip
        if kv is not None:
            return self.arms_for(names, kv)
        try:
            return self.arms_for(names, plan.kv or self.default_kv)
        except PlanError:
            return self.arms_for(names, "project")

    def repeated(self, inputs: Sequence[Any]) -> Repeated:
        """The program on inputs of a call that stay."""
        from skipc.runtime.repeated import Repeated  # which calls programs

        wanted = self.bank.blank() if self.bank is not None else None
        return Repeated(self, self._with(inputs, wanted), wanted)

    def parameters_of(self, inputs: Sequence[Any]) -> list[int]:
        """Identities of the parameters and buffers in a call: which instance of the model it is."""
        return [id(inputs[i]) for i in self._model_inputs]

    def device_of(self, inputs: Sequence[Any]) -> torch.device | None:
        """Where a call runs: compiled code stays on its device."""
        if self._device is None:
            found = [t.device for t in inputs if isinstance(t, torch.Tensor)]
            self._device = next((d for d in found if d.type != "cpu"), found[0] if found else None)
        return self._device

    def extent(self, inputs: Sequence[Any]) -> tuple[int, int]:
        """Batch and tokens of a call; 0 where the program cannot tell."""
        return tuple(_size(size, inputs) for size in self.spec.extent)  # type: ignore[return-value]

    def batch(self, inputs: Sequence[Any]) -> int:
        """Rows of a call; 0 where the program cannot tell."""
        return _size(self.spec.batch, inputs)

    def run(self, inputs: Sequence[Any], how: Arms | GatedCall) -> tuple[Any, ...]:
        """Run with one arm chosen for each step, or with gates that choose as the program goes."""
        selection = selection_of(how)
        program = self._bound.get(selection)
        if isinstance(how, GatedCall) and program is not None and not self.joins(how):
            outputs, _ = self._walk(inputs, how)
        elif program is None:
            if self.huge_pages and not self._bound:
                back_with_huge_pages(inputs[i] for i in self._model_inputs)
            outputs, _ = self._walk(inputs, how)  # looks at what each region is given
            make_room(self._bound)
            self._bound[selection] = self._bind(selection)
        else:
            outputs = program(inputs, how) if isinstance(how, GatedCall) else program(inputs)
        return outputs if how is self.exact else self.unshared(inputs, outputs)

    def gated(self, kv: KVPolicy) -> GatedSpec:
        """The program's arms under ``kv``, for calls whose gates are open.

        Raises:
            PlanError: if some site cannot be skipped under ``kv``.
        """
        if kv not in self._gated:
            self._gated[kv] = GatedSpec(self.spec, kv)
        return self._gated[kv]

    def joins(self, call: GatedCall) -> bool:
        """Whether the call can run joined: all tokens alike, and each chain holds all the points of the stream that its
        sites are compared with."""
        spans, kv = call.table.spans, call.plan.kv
        if call.table.by_token:
            return False
        if not spans:
            return True
        if kv not in self._sites_of_chains:
            self._sites_of_chains[kv] = [chain.sites for chain in gated_chains_of(self.spec, kv)]
        return all(first in sites for sites in self._sites_of_chains[kv] for i, first in spans.items() if i in sites)

    def unshared(self, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A skipped site hands the same tensor on. Where the caller gets several points of a stream, or one that it
        passed in, each must be a tensor of its own, as without skipping."""
        if not self.spec.exposed:
            return outputs
        seen = {t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.Tensor)}
        result = list(outputs)
        for i in self.spec.exposed:
            if result[i].untyped_storage()._cdata in seen:
                result[i] = result[i].clone()
            seen.add(result[i].untyped_storage()._cdata)
        return tuple(result)

    def arms_for(self, skip: frozenset[str], kv: KVPolicy) -> Arms:
        """The arm of each step under which the sites in ``skip`` are left out.

        Raises:
            PlanError: if leaving one out under ``kv`` would give wrong answers.
        """
        key = (skip, kv)
        if key not in self._plans:
            make_room(self._plans)
            arms = tuple(step.arm_for(skip, kv) for step in self.spec.steps)
            self._plans[key] = self.exact if arms == self.exact else arms
        return self._plans[key]

    def skipped_by(self, arms: Arms) -> frozenset[str]:
        """The sites that ``arms`` leaves out."""
        return frozenset().union(*(s.arms[a].skipped for s, a in zip(self.spec.steps, arms, strict=True)))

    def measure(self, inputs: Sequence[Any], arms: Arms) -> tuple[tuple[Any, ...], list[Measurement]]:
        """Run step by step with a clock and a similarity for each site. Slower than :meth:`run`, same results.

        Raises:
            PassError: if a region gets a tensor of another layout than it was compiled for.
        """
        streams: list[Stream] = []
        outputs, seconds = self._walk(inputs, arms, streams)
        measured = [
            Measurement(step.sites, took, _similarity(stream))  # after all steps: it disturbs no clock
            for step, took, stream in zip(self.spec.steps, seconds, streams, strict=True)
            if step.sites
        ]
        return (outputs if arms is self.exact else self.unshared(inputs, outputs)), measured

    def _on_some(
        self, step: Step, scope: dict[str, Any], arguments: Sequence[Any], rows: torch.Tensor
    ) -> torch.Tensor | None:
        """What the step makes of some tokens, ``[chosen tokens, width]``; None if it must run on all."""
        if step.gather is not None:
            return gathered(self.functions[step.arms[0].region], arguments, step.gather, rows)  # type: ignore[index]
        queries = step.queries
        if queries is None or rows.shape[0] != 1 or not queries.admits(max(2, int(rows.sum()))):
            return None
        keys = step.arms[step.arm_for(frozenset(step.sites), "project")]
        if keys.region is not None:
            made = self.functions[keys.region]([scope[n] for n in keys.inputs])
            scope.update(zip(keys.outputs, made, strict=True))
        return queried(self.functions[queries.arm.region], [scope[n] for n in queries.arm.inputs], queries, rows)  # type: ignore[index]

    def _walk(
        self, inputs: Sequence[Any], how: Arms | GatedCall, streams: list[Stream] | None = None
    ) -> tuple[tuple[Any, ...], list[float]]:
        """The program step by step: outputs, and seconds of each step; ``streams`` gets the stream around it."""
        scope = dict(zip(self.spec.inputs, inputs, strict=True))
        gates = how if isinstance(how, GatedCall) else None
        device = self.device_of(inputs)
        wait = wait_for(device) if device is not None else lambda: None
        seconds: list[float] = []
        for i, step in enumerate(self.spec.steps):
            by_token = gates is not None and gates.table.by_token and step.stream is not None
            rows = gates.arrive(i, scope[step.stream[0]]) if by_token else None  # type: ignore[index,union-attr]
            arm = step.arms[how.arm(i) if isinstance(how, GatedCall) else how[i]]
            function = self.functions[arm.region] if arm.region is not None else None
            arguments = [scope[n] for n in arm.inputs]
            _check_layouts(step, arm, arguments)
            wait()
            start = time.perf_counter()
            some = None if rows is None else self._on_some(step, scope, arguments, rows)
            if rows is not None and step.live is not None and some is None:
                live, any_size = arguments[step.live], bool(self.spec.regions[arm.region].kernels)  # type: ignore[index]
                arguments[step.live] = unseen(live, rows) if any_size or len(live) == len(rows) else live
            results = function(arguments) if some is None and function is not None else ()
            wait()
            seconds.append(time.perf_counter() - start)
            if some is None:
                scope.update(zip(arm.outputs, results, strict=True))
                scope.update({name: scope[value] for name, value in arm.copies})
            if gates is not None and step.stream is not None:
                before, after = step.stream
                if rows is not None:
                    made = some if some is not None else scope[after][rows]
                    scope[after] = gates.blend(i, rows, scope[before], made)
                measured = scope.get(step.moments) if step.moments is not None else None
                scope[after] = gates.ran(i, scope[before], scope[after], rows, measured)
            if streams is not None:
                points = [scope[n] for n in step.stream or ()]
                streams.append(tuple((t, 0 if t.is_inference() else t._version) for t in points))
            for name in step.releases:
                scope.pop(name, None)
        return tuple(scope[v.name] if isinstance(v, Var) else v for v in self.spec.outputs), seconds


def _size(size: Size, inputs: Sequence[Any]) -> int:
    if isinstance(size, tuple):
        i, dim = size
        return int(inputs[i]) if dim < 0 else int(inputs[i].shape[dim])
    return size or 0


def selection_of(how: Arms | GatedCall) -> Selection:
    """What programs are kept by."""
    return how.plan.kv if isinstance(how, GatedCall) else how


def make_room(kept: dict[Any, Any]) -> None:
    """For one more of what is kept for each selection."""
    if len(kept) >= _MAX_BOUND:
        kept.pop(next(iter(kept)))  # the oldest plan


def _check_layouts(step: Step, arm: Arm, arguments: Sequence[Any]) -> None:
    for name, layout, value in zip(arm.inputs, arm.layouts, arguments, strict=True):
        if layout is None or not isinstance(value, torch.Tensor):
            continue
        sizes, strides = layout
        found = (tuple(value.shape), value.stride())
        if found[0] != sizes or any(a != b and n > 1 for a, b, n in zip(found[1], strides, sizes, strict=True)):
            raise PassError(f"{step.label}: {name} has sizes and strides {found}, the region was compiled for {layout}")


def _similarity(stream: Stream) -> float | None:
    """Similarity of two points of a stream, given with their versions; None if one was written since."""
    if len(stream) != 2 or any(not t.is_inference() and t._version != version for t, version in stream):
        return None
    return stream_similarity(stream[0][0], stream[1][0])


class Fallback:
    """Plain Inductor in place of a program, and why. Under a session it raises: it could skip nothing."""

    def __init__(self, function: Callable[..., Any], reason: str, parameters: Sequence[int]):
        self.function, self.reason, self.parameters = function, reason, tuple(parameters)

    def __call__(self, *inputs: Any) -> Any:
        if sessions.any_open():
            sessions.refuse([id(inputs[i]) for i in self.parameters], self.reason)
        return self.function(*inputs)
