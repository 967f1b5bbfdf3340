"""What the rows of a session want of a bank of adapters, from its opening to its end."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skipc.adapters.modes import Decision, Mode
from skipc.ir.adapters import Wanted
from skipc.ir.errors import PlanError, SessionError
from skipc.ir.plan import Plan

if TYPE_CHECKING:
    from skipc.runtime.program import Program

    from skipc.adapters.bank import AdapterBank, Lease, Rows


class Adapting:
    """The adapters of one session.

    Args:
        rows: what they want; see :class:`skipc.Session`.
        bank: that holds them.
        plan: of the session.
        mode: of :mod:`skipc.adapters.modes`.
    """

    def __init__(self, rows: Rows, bank: AdapterBank | None, plan: Plan | None, mode: Mode = "unmerged"):
        if bank is None:
            raise SessionError("adapters come from a bank: skipc.compile(model, adapters=skipc.AdapterBank(model))")
        if plan is not None and plan.expected is not None:
            raise PlanError("the loss of this plan was measured without adapters: calibrate the model with the adapter "
                            "merged into it")  # fmt: skip
        if mode != "unmerged" and plan is not None and not plan.whole:
            raise SessionError(
                f"a plan with weights of its own leaves adapters unmerged, so that mode={mode!r} has to go"
            )
        self._rows, self._bank, self._mode = rows, bank, mode
        self.decision = Decision("unmerged")
        self._own, self._by_router = True, False
        self._lease: Lease | None = None
        self._routed: dict[int, Wanted] = {}  # each thread's own, since routers write what tokens want
        self._checked: set[Program] = set()
        self._unused: dict[str, str] = {}  # layers that no call had yet, and an adapter that changes them

    def lent(self) -> Adapting:
        """The same for a session inside this one, which neither opens nor closes it."""
        made = copy.copy(self)
        made._own = False
        return made

    def open(self) -> None:
        """Have the adapters in slots until :meth:`close`."""
        if not self._own:
            return
        self._lease = self._bank.lease(self._rows, self._mode)
        self.decision = self._lease.arranged.decision
        self._by_router = self._lease.wanted.routed
        self._unused = dict(self._lease.paths)
        self._checked.clear()

    def close(self) -> None:
        """Let others have the slots."""
        if not self._own:
            return
        assert self._lease is not None
        self._lease.release()
        self._lease = None
        self._routed.clear()

    @property
    def unused(self) -> str | None:
        """What of an adapter no call had a use for, if so."""
        path, name = next(iter(self._unused.items()), (None, None))
        return None if path is None else f"of adapter {name!r}, no call had a use for what it adds to {path}"

    @property
    def plan(self) -> Plan | None:
        """What calls run under, if adapters are merged."""
        return self._lease.arranged.plan if self._lease is not None else None

    def wanted(self, program: Program) -> Wanted:
        """What the rows of a call of ``program`` want."""
        assert self._lease is not None
        if program.bank is not self._bank:
            raise SessionError("the model was compiled with another bank of adapters than this session's")
        if not self._by_router:
            return self._lease.wanted
        if (thread := threading.get_ident()) not in self._routed:
            self._routed[thread] = self._lease.wanted.copy()
        return self._routed[thread]

    def check(self, program: Program, inputs: Sequence[Any], preset: Plan | None) -> None:
        """Refuse a call that the adapters are not for. ``preset``: the preset's plan, if the call runs under it."""
        assert self._lease is not None
        rows = self._lease.rows
        if preset is not None and self._lease.paths:
            raise SessionError("the preset's plan was calibrated without adapters: open the session with "
                               "plan=skipc.Plan() to run the whole model")  # fmt: skip
        batch = program.batch(inputs)
        if rows is not None and batch != rows:
            found = batch or "a number of them that cannot be told: give one adapter for all"
            raise SessionError(f"the session has adapters for {rows} rows, and the call has {found}")
        if program not in self._checked:
            self._check_layers(self._lease, program)
            self._checked.add(program)

    def _check_width(self, lease: Lease, program: Program) -> None:
        """Refuse a router for other tokens than the program's, before a kernel reads past their end."""
        width, found = int(lease.wanted.router[1]), program.spec.routed_width
        if self._by_router and found and width != found:
            raise SessionError(f"a router for tokens of width {width} met some of {found}")

    def _check_layers(self, lease: Lease, program: Program) -> None:
        paths, used = lease.paths, set(program.spec.adapted)
        if lost := paths.keys() & program.spec.left.keys():
            path = min(lost)
            raise PlanError(f"{program.spec.left[path]}, which adapter {paths[path]!r} adds to")
        if self._by_router and program.partial:
            raise SessionError(
                f"a router decides once for all layers, and this model has a graph break: {program.partial}"
            )
        self._check_width(lease, program)
        if self._by_router and (other := paths.keys() & used - program.spec.routed):
            path = min(other)
            raise SessionError(f"{path}, which adapter {paths[path]!r} adds to, does not take the tokens that the "
                               "router decides for")  # fmt: skip
        self._unused = {path: name for path, name in self._unused.items() if path not in used}
