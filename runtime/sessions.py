"""Sessions: what a compiled model does for one request, or one batch of requests.

A session is in force in the thread (or asyncio task) that opened it, for the model that it was opened on, until its
``with`` block ends. It never lapses in silence: what cannot be honoured raises.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

import torch
from skipc.runtime.adapting import Adapting
from skipc.runtime.gating import Observation
from skipc.runtime.policies.base import Phase, Policy
from skipc.runtime.policies.static import Static
from skipc.runtime.registry import compilations, known_sites
from skipc.runtime.session_stats import SessionStats
from skipc.runtime.steering import Steering

from skipc.ir.adapters import Wanted
from skipc.ir.errors import FallbackError, PlanError, SessionError, SessionThreadError, UnknownSiteError, nearest
from skipc.ir.gating import GateTable
from skipc.ir.plan import Plan
from skipc.ir.program import KVPolicy
from skipc.ir.route import Route
from skipc.ir.site import Site

if TYPE_CHECKING:
    from skipc.runtime.gating import GatedCall
    from skipc.runtime.program import Arms, Measurement, Program
    from skipc.runtime.repeated import Repeated

    from skipc.adapters.bank import AdapterBank, Rows
    from skipc.adapters.modes import Mode

_MOST_UNCOUNTED = 64

P = ParamSpec("P")
R = TypeVar("R")


class Session:
    """A request on a compiled model. Made by ``compiled.session(...)`` or :func:`skipc.session`.

    Args:
        model: the module whose calls it governs; None for a compiled function, whose calls it all governs.
        skip: names of sites to leave out, in every call of the session.
        kv: what skipped attentions write to their caches; None means as the model was compiled.
        measure: also time each site and take similarities (slower; results are the same).
        policy: decides before and in each call what to skip (see :mod:`skipc.runtime.policies`), instead of ``skip``.
            It is copied: its memory belongs to this session.
        record: keep what each call did as :attr:`route`.
        route: do what a recorded route says, call by call.
        plan: sites to skip, and weights to run with in the place of the model's. It goes with all of the above, where
            it skips nothing. None: that of the preset that the model was compiled with, if so; ``Plan()`` is the whole
            model.
        adapters: what rows of a call want of the model's bank: for each row a name, None for the base model, or several
            names with a factor for each; or one name, or several with factors, for all rows.
        bank: that the model was compiled with. (Handles of :func:`skipc.compile` know it.)
        adapter_mode: how adapters run: ``unmerged`` (beside the weights, rows without any in the model's own bits);
            ``merged`` into a copy of the weights, if all rows want the same; ``mixture``, where rows that want
            something else than what is merged take it away again; or ``auto``, whatever takes the least time.

    Raises:
        AdapterError: on entering, for an adapter that is not loaded, or if no slot is free.
        UnknownSiteError: for a name that the model has no site of.
        PlanError: at the first call, if ``kv`` would give wrong answers.
        SessionError: on leaving, if a site to skip was never reached, or a weight of the plan never used.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        skip: Iterable[str] = (),
        kv: KVPolicy | None = None,
        measure: bool = False,
        policy: Policy | None = None,
        record: bool = False,
        route: Route | None = None,
        plan: Plan | None = None,
        adapters: Rows | None = None,
        bank: AdapterBank | None = None,
        adapter_mode: Mode = "unmerged",
    ):
        if isinstance(skip, str):
            raise TypeError("skip is a collection of site names, not one string")
        if kv is not None and kv not in get_args(KVPolicy):
            raise SessionError(f"kv is one of {', '.join(map(repr, get_args(KVPolicy)))}, not {kv!r}")
        if policy is not None and not isinstance(policy, Policy):
            raise TypeError(f"policy is a skipc.Policy, not {type(policy).__name__}")
        self.model = model
        self.skip = frozenset(skip)
        self.plan = plan
        if plan is not None:
            self._check_plan(plan)
            self.skip |= plan.skip
        if policy is not None and route is not None:
            raise SessionError("a session follows either a policy or a route")
        if (self.skip or measure) and (policy is not None or route is not None):
            raise SessionError("a policy or a route goes with neither skip nor measure; skipc.Static skips a fixed set")
        if record and measure:
            raise SessionError("record goes without measure")
        steered = policy is not None or route is not None or record
        self.steering = Steering(policy or Static(self.skip), record, route) if steered else None
        self.kv = kv if kv is not None or plan is None else plan.kv
        self._named = self.skip | frozenset(plan.replace if plan is not None else ())  # sites that must be there
        self.measuring = measure
        self.parameters = _parameters(model)
        self._counts: Counter[tuple[Program, Arms | frozenset[str]]] = Counter()  # by arms, or by what was skipped
        self._uncounted: list[tuple[Program, GateTable, torch.Tensor | None]] = []  # to be: see Observation
        self._measured: list[Measurement] = []
        self._compilations = 0
        self._backfilled = 0
        self._governed: Sequence[int] | None = None
        self._unreached = set(self.skip)
        self._unused = {*plan.weights, *plan.replace} if plan is not None else set()
        self._checked: set[Program] = set()
        self._lock = threading.RLock()  # a policy may ask for statistics
        self._adapting = Adapting(adapters, bank, plan, adapter_mode) if adapters is not None else None
        known = known_sites(self.parameters)
        if known:
            self._check_names(known)

    # -- in force -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        with _lock:
            if self in _open:
                raise SessionError("this session is open already")
        if self._adapting is not None:
            self._adapting.open()
        with _lock:
            _open.append(self)
            self._compilations = compilations(self.parameters)
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _stack.set(tuple(s for s in _stack.get() if s is not self))
        with _lock:
            _open.remove(self)
            self._compilations = compilations(self.parameters) - self._compilations
        if self._adapting is not None:
            self._adapting.close()
        if kind is not None:
            return
        if not self.calls:
            warnings.warn("this session saw no call of a compiled model: nothing was skipped", stacklevel=2)
        elif self._unreached:
            raise SessionError(f"never reached, so never skipped: {', '.join(sorted(self._unreached))}")
        elif self._adapting is not None and self._adapting.unused is not None:
            raise SessionError(self._adapting.unused)
        elif self._unused:
            raise SessionError(f"of the plan, no call had a use for: {', '.join(sorted(self._unused))}")

    def bind(self, function: Callable[P, R]) -> Callable[P, R]:
        """``function``, to be run in another thread under this session."""

        def bound(*args: P.args, **kwargs: P.kwargs) -> R:
            if self not in _open:
                raise SessionError("the session that this function is bound to is closed")
            token = _stack.set((*_stack.get(), self))
            try:
                return function(*args, **kwargs)
            finally:
                _stack.reset(token)

        return bound

    def governs(self, parameters: Sequence[int]) -> bool:
        """True if a call on these parameters (by identity) is a call of this session's model."""
        if self.model is None:
            return True
        if parameters is self._governed:  # a loop asks at each step, with one list
            return True
        if not parameters:
            return False  # nothing of any model: a sampler, say
        if not self.parameters.issuperset(parameters):
            self.parameters = _parameters(self.model)  # weights may have been replaced since
        if not self.parameters.issuperset(parameters):
            return False
        self._governed = parameters
        return True

    # -- calls --------------------------------------------------------------------------------------------------------

    def call(
        self,
        program: Program,
        inputs: Sequence[Any],
        repeated: Repeated | None = None,
    ) -> tuple[Any, ...]:
        """Run ``program`` as this session asks; by ``repeated``, if that is given."""
        if program.partial and (self.skip or self.steering is not None or self.plan is not None):
            raise FallbackError(f"a session cannot skip in a model with graph breaks: {program.partial}")
        if self._named and program not in self._checked:
            self._check(program, inputs)
        preset = program.plan if self.plan is None else None
        plan = (self._adapting.plan if self._adapting is not None else None) or preset or self.plan
        if plan is not None and not plan.whole:
            if self._unused:
                self._unused -= {name for name, _ in program.spec.weights} | program.site_names
            under = self.kv or plan.kv or program.default_kv
            if repeated is not None:
                repeated = repeated.under(plan, under)
                program, inputs = repeated.program, repeated.inputs
            else:
                program, inputs = program.variants.under(plan, inputs, under)
        if self._adapting is not None:
            self._adapting.check(program, inputs, preset)
        run = repeated.run if repeated is not None else None
        kv = self.kv or program.default_kv
        if self.steering is not None:
            if preset is not None and preset.skip:
                raise SessionError("the preset's plan leaves out sites, which goes with no policy: open the session "
                                   "with plan=skipc.Plan() to run the whole model")  # fmt: skip
            return self._steered(self.steering, program, inputs, kv, run)
        arms = program.arms_for(self.skip, kv) if preset is None else program.arms_under(preset, self.skip, self.kv)
        with self._lock:
            self._counts[program, arms] += 1
        if not self.measuring:
            return program.run(inputs, arms) if run is None else run(arms)
        outputs, measured = program.measure(inputs, arms)
        with self._lock:
            self._measured += measured
        return outputs

    def wanted_of(self, program: Program) -> Wanted | None:
        """What the rows of a call of ``program`` want of its bank; None if nothing."""
        return None if self._adapting is None else self._adapting.wanted(program)

    def _steered(
        self,
        steering: Steering,
        program: Program,
        inputs: Sequence[Any],
        kv: KVPolicy,
        run: Callable[[Arms | GatedCall], tuple[Any, ...]] | None,
    ) -> tuple[Any, ...]:
        with self._lock:  # a policy sees one call after the other
            call, table, how = steering.choose(program, inputs, kv)
            outputs = program.run(inputs, how) if run is None else run(how)
            seen = steering.ran(call, table, program, how, kv)
            self._uncounted.append((program, table, seen.flags))
            if len(self._uncounted) >= _MOST_UNCOUNTED:
                self._count()
        return outputs

    def _count(self) -> None:
        """Fold calls into the counts. (Not one by one: names take longer than all else that a decode step asks for.)"""
        waiting, self._uncounted = self._uncounted, []
        self._counts.update((program, Observation(table, flags).skipped) for program, table, flags in waiting)

    def again(self) -> Session:
        """A session inside this one for what it has left out: every site runs, in the same weights and adapters."""
        return self._with_adapters(Session(self.model, plan=self.plan, kv="project"))

    def drafting(self, plan: Plan, kv: KVPolicy) -> Session:
        """A session inside this one that does what ``plan`` says in addition: in the same weights, but for those of the
        plan, and with the same adapters.

        Raises:
            PlanError: if both plans have weights or replacements.
        """
        if plan.whole:
            return self._with_adapters(Session(self.model, self.skip | plan.skip, kv, plan=self.plan))
        if self.plan is not None and not self.plan.whole:
            raise PlanError("a draft with weights or replacements goes with no session whose plan has some, too")
        return self._with_adapters(Session(self.model, self.skip - plan.replace.keys(), kv, plan=plan))

    def _with_adapters(self, inner: Session) -> Session:
        inner._adapting = self._adapting.lent() if self._adapting is not None else None
        return inner

    @property
    def phase(self) -> Phase | None:
        """What policies take calls for: ``prefill``, ``decode``, or None, to let them judge: one token behind others is
        ``decode``."""
        return self.steering.phase if self.steering is not None else None

    @phase.setter
    def phase(self, phase: Phase | None) -> None:
        if phase not in (None, "prefill", "decode"):
            raise SessionError(f"phase is 'prefill', 'decode' or None, not {phase!r}")
        if self.steering is not None:
            self.steering.phase = phase

    def note_mask(self, mask: object) -> None:
        """The padding mask of the coming call, int or bool ``[batch, tokens]`` or of the whole context; None if it has
        none. ``skipc.compile``'s handles call this; call it where ``torch.compile`` made the function."""
        if self.steering is not None:
            self.steering.mask = mask if isinstance(mask, torch.Tensor) else None

    @property
    def fills(self) -> bool:
        """Whether calls under ``kv="backfill"`` were seen, so that :attr:`missing` is to be asked."""
        return self.steering is not None and self.steering.fills

    @property
    def missing(self) -> int:
        """Under ``kv="backfill"``: so many of the last tokens must run again, in full and outside this session, before
        the next decode step, since it may run an attention that lacks keys. :func:`skipc.generate` sees to it."""
        return self.steering.missing if self.steering is not None else 0

    def new_request(self) -> None:
        """Caches were emptied: nothing that earlier calls left out is missing in them."""
        if self.steering is not None:
            self.steering.new_request()

    def filled(self, tokens: int) -> None:
        """The last ``tokens`` have run again, in full: no attention lacks their keys."""
        if self.steering is not None:
            self.steering.filled(tokens)
            self._backfilled += tokens

    @property
    def route(self) -> Route:
        """What the session did, if it was opened with ``record=True``."""
        if self.steering is None or self.steering.route is None:
            raise SessionError("nothing was recorded: open the session with record=True")
        return self.steering.route

    @property
    def calls(self) -> int:
        """How many compiled calls the session saw."""
        return sum(self._counts.values()) + len(self._uncounted)

    def stats(self) -> SessionStats:
        """Counts of what ran and what was skipped, by site."""
        stats = SessionStats(calls=self.calls, backfilled=self._backfilled)
        now = compilations(self.parameters) - self._compilations if self in _open else self._compilations
        stats.recompiles = now
        stats.adapters = str(self._adapting.decision) if self._adapting is not None else ""
        with self._lock:
            self._count()
            counts, measured = dict(self._counts), list(self._measured)
        for (program, how), count in counts.items():
            skipped = how if isinstance(how, frozenset) else program.skipped_by(how)
            for name in program.site_names:
                (stats.skipped if name in skipped else stats.ran)[name] += count
        totals: dict[str, list[Measurement]] = {}
        for m in measured:
            for name in m.sites:
                totals.setdefault(name, []).append(m)
        for name, found in totals.items():
            stats.seconds[name] = statistics.median(m.seconds for m in found)
            similar = [m.similarity for m in found if m.similarity is not None]
            if similar:
                stats.similarity[name] = sum(similar) / len(similar)
        if self.steering is not None:
            seen = self.steering.statistics
            stats.similarity, stats.histogram, stats.agreement = seen.means(), seen.histograms(), seen.agreements()
        return stats

    def _check(self, program: Program, inputs: Sequence[Any]) -> None:
        """Once a program: every site to skip or replace must be one of it, or have no part in it."""
        if self.skip - program.site_names:
            self._check_names(program.site_names.union(known_sites(self.parameters)))
        used = set(program.parameters_of(inputs))
        for name in sorted(self._named):
            path = name.split("#")[0]
            module = _submodule(self.model, path)
            if name not in program.site_names:
                if module is not None and any(id(p) in used for p in module.parameters()):
                    raise SessionError(
                        f"{name} runs in this call, but is no site of it, so it can be neither skipped nor replaced"
                    )
            elif self.model is not None and "<" not in path and module is None:
                raise FallbackError(f"{name} was compiled apart from the model, behind a graph break")
        self._unreached -= program.site_names
        self._checked.add(program)

    def _check_plan(self, plan: Plan) -> None:
        """Refuse weights for parameters that the model does not have, or has under several names: a program takes a
        tensor once, so that one of its uses cannot be given another."""
        if self.model is None:
            return
        known = dict(self.model.named_parameters(remove_duplicate=False))
        for name in plan.replace:
            if _submodule(self.model, name) is None:
                sites = known_sites(_parameters(self.model)) or dict(self.model.named_modules())
                raise UnknownSiteError(name, sorted(sites))
        for name in plan.weights:
            if name not in known:
                close = nearest(name, known)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise PlanError(f"the plan has a weight for {name}, which the model does not have{hint}")
            tied = [other for other, value in known.items() if value is known[name] and other != name]
            if tied:
                raise PlanError(f"the plan has a weight for {name}, which is tied to {tied[0]}")

    def _check_names(self, known: Iterable[str]) -> None:
        """Refuse names that are neither sites nor modules. (A module may be a site of a graph that is not compiled yet:
        encoder and decoder of one model are called apart.)"""
        known = frozenset(known)
        for name in sorted(self.skip - known):
            if not name or _submodule(self.model, name.split("#")[0]) is None:
                raise UnknownSiteError(name, sorted(known))


# ---------------------------------------------------------------------------------------------------------------------
# Which session is in force. One process-wide list, and one stack for each thread or task.

_open: list[Session] = []
_lock = threading.Lock()
# A context variable: a thread starts without a session, and tasks of one event loop do not see each other's.
_stack: ContextVar[tuple[Session, ...]] = ContextVar("skipc_sessions", default=())


def any_open() -> bool:
    """True if a session is open in any thread."""
    return bool(_open)


def innermost(model: torch.nn.Module) -> Session | None:
    """The session of this thread that governs calls of ``model``."""
    return next((s for s in reversed(_stack.get()) if s.model is None or s.model is model), None) if _open else None


def session_for(parameters: Sequence[int]) -> Session | None:
    """The innermost session of this thread for a model with these parameters.

    Raises:
        SessionThreadError: if only other threads have one.
    """
    for session in reversed(_stack.get()):
        if session.governs(parameters):
            return session
    if any(s.model is not None and s.governs(parameters) for s in list(_open)):
        raise SessionThreadError(
            "this model has an open session in another thread; run the call through session.bind(function), or open a "
            "session in this thread"
        )
    return None


def sites_of(model: torch.nn.Module) -> list[Site]:
    """The sites of a model, as far as it is compiled."""
    return list(known_sites(_parameters(model)).values())


def refuse(parameters: Sequence[int], reason: str) -> None:
    """Called before plain Inductor runs: raise if a session with something to skip is in force."""
    session = session_for(parameters)
    if session is not None:
        raise FallbackError(f"the session cannot be honoured, this call runs plain Inductor: {reason}")


def _submodule(model: torch.nn.Module | None, path: str) -> torch.nn.Module | None:
    try:
        return model.get_submodule(path) if model is not None else None
    except AttributeError:
        return None


def _parameters(model: torch.nn.Module | None) -> frozenset[int]:
    if model is None:
        return frozenset()
    members = (d.values() for m in model.modules() for d in (m._parameters, m._buffers))  # one walk: once a request
    return frozenset(id(t) for t in itertools.chain.from_iterable(members) if t is not None)
