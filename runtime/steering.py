"""The gates of one session: asks its policy, or its route, before each call, and remembers what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from skipc.runtime.gating import GatedCall, Observation
from skipc.runtime.gating import Router as RouterProtocol
from skipc.runtime.policies.base import Call, Phase, Policy
from skipc.runtime.similarity_stats import SimilarityStats

from skipc.ir.errors import PlanError, SessionError
from skipc.ir.gating import GateTable
from skipc.ir.program import KVPolicy
from skipc.ir.route import Route, RouteStep

if TYPE_CHECKING:
    from skipc.runtime.program import Arms, Program


class Router:
    """What the sites of one call ask its policy."""

    def __init__(self, call: Call, policy: Policy):
        self.call, self.policy = call, policy

    def route(self, site: int, stream: torch.Tensor) -> torch.Tensor:
        """See :meth:`Policy.route`."""
        name = self.call.sites[site].name
        rows = self.policy.route(self.call, name, stream)
        if rows.dtype != torch.bool or rows.shape != stream.shape[:-1]:
            raise PlanError(
                f"routing {name}: bool {list(stream.shape[:-1])} is needed, not {rows.dtype} {list(rows.shape)}"
            )
        return rows

    def instead(self, site: int, stream: torch.Tensor) -> torch.Tensor | None:
        """See :meth:`Policy.instead`."""
        return self.policy.instead(self.call, self.call.sites[site].name, stream)


class ReplayedRouter:
    """What they ask a route."""

    def __init__(self, call: Call, step: RouteStep):
        self.call, self.step = call, step

    def route(self, site: int, stream: torch.Tensor) -> torch.Tensor:
        """The tokens that went through."""
        rows = torch.tensor([[t == "1" for t in row] for row in self.step.tokens[self.call.sites[site].name]])
        if rows.shape != stream.shape[:-1]:
            raise PlanError(
                f"the route is of a call of {list(rows.shape)} tokens, this one has {list(stream.shape[:-1])}"
            )
        return rows

    def instead(self, site: int, stream: torch.Tensor) -> torch.Tensor | None:
        """Nothing."""
        return None


class Steering:
    """The gates of one session.

    Attributes:
        phase: what calls count as; None: one token behind others is ``decode``, anything else ``prefill``.
        mask: 2-D, of the whole context so far or of the call's tokens, 0 for padding; None: no padding.
        route: what was done, if it is recorded.
        fills: True if calls ran under ``kv="backfill"``.
    """

    def __init__(self, policy: Policy, record: bool, route: Route | None):
        self.policy, self.replayed = policy.fresh(), route
        self.route = Route() if record else None
        self.phase: Phase | None = None
        self.mask: torch.Tensor | None = None
        self.statistics = SimilarityStats()
        self._positions: dict[frozenset[str], int] = {}
        self.fills = False
        self._missing: dict[str, int] = {}  # under kv="backfill": the first token whose keys an attention lacks
        self._last: Call | None = None
        self._again = 0  # tokens that ran again before the next call
        self._step = 0

    def choose(self, program: Program, inputs: Sequence[Any], kv: KVPolicy) -> tuple[Call, GateTable, Arms | GatedCall]:
        """The next call of ``program``, its gates, and how it is to run.

        Raises:
            PlanError: if its policy may change its mind about attentions that leave holes in their caches, or if one is
                to run whose holes nobody has filled.
            SessionError: if a route is replayed and has no more steps.
        """
        batch, tokens = program.extent(inputs)
        position = self._positions.get(program.site_names, 0)
        phase = self.phase or ("decode" if tokens == 1 and position > 0 else "prefill")
        call = Call(program.spec.sites, batch, tokens, position, phase)
        table = self.policy.decide(call) if self.replayed is None else self._replay(call, self.replayed)
        if kv == "none" and self.replayed is None and not self.policy.only_grows:
            raise PlanError(
                f"{type(self.policy).__name__} may run an attention again that it skipped; under kv='none' its cache "
                "would have holes: use kv='project'"
            )
        if self._missing and (first := self._first_missing(table)) is not None:
            raise PlanError(
                f"an attention is to run that lacks the keys of tokens {first} to {position - 1}; under kv='backfill' "
                "skipc.generate fills them in; elsewhere, run these tokens again (session.missing, session.filled)"
            )
        if not (table.measures or table.deciding or table.factors or table.routed):
            return call, table, program.arms_for(table.skipped, kv)
        valid = None if self.mask is None else self._valid(call, self.mask)
        router = self._router(call) if table.routed else None
        gated = GatedCall(program.gated(kv), table, valid, (batch, tokens), program.device_of(inputs), router)
        return call, table, gated

    @property
    def missing(self) -> int:
        """See :attr:`Session.missing`."""
        if self._last is None:
            return 0
        if self.replayed is not None:
            return self.replayed.steps[self._step].again if self._step < len(self.replayed) else 0
        if not self._missing:
            return 0
        position = self._last.position + self._last.tokens
        call = self._last._replace(tokens=1, position=position, phase=self.phase or "decode")
        first = self._first_missing(self.policy.decide(call))
        return 0 if first is None else position - first

    def filled(self, tokens: int) -> None:
        """All attentions have the keys of the last ``tokens``."""
        if self._last is not None:
            self._again = tokens
            first = self._last.position + self._last.tokens - tokens
            self._missing = {name: at for name, at in self._missing.items() if at < first}

    def new_request(self) -> None:
        """The caches are empty: nothing is missing."""
        self._missing.clear()

    def _first_missing(self, table: GateTable) -> int | None:
        """The first token whose keys any attention lacks, if one that lacks some may run. (Running tokens again in full
        runs all attentions, so that none may have holes before them.)"""
        runs = any(name in table.sites and name not in table.skipped for name in self._missing)
        return min(self._missing.values()) if runs else None

    def ran(self, call: Call, table: GateTable, program: Program, how: Arms | GatedCall, kv: KVPolicy) -> Observation:
        """The call has run, under ``kv``: what came of it."""
        self._positions[program.site_names] = call.position + call.tokens
        self._last = call
        self._step += 1
        if isinstance(how, GatedCall):
            flags = how.skipped if table.deciding or table.routed else None
            seen = Observation(table, flags, tuple(how.moments.values()), how.valid)
            self.statistics.add(seen)
        else:
            seen = Observation(table)
        if kv == "backfill":
            self.fills = True
            for name in seen.skipped.intersection(s.name for s in call.sites if s.effects):
                self._missing.setdefault(name, call.position)
        if self.replayed is None:
            self.policy.observe(call, seen)
        if self.route is not None:
            partly = how.partly if isinstance(how, GatedCall) else {}
            skipped = seen.skipped
            scale = {n: f for n, f in table.factors.items() if n in skipped or n in partly}
            tokens = {n: ["".join("01"[t] for t in row) for row in rows.tolist()] for n, rows in partly.items()}
            adapted = isinstance(how, GatedCall) and how.adapted
            self.route.steps.append(RouteStep(skipped, scale, tokens, adapted, self._again))
            self._again = 0
        return seen

    def _replay(self, call: Call, route: Route) -> GateTable:
        if self._step >= len(route):
            raise SessionError(f"the route has {len(route)} calls, and this is one more")
        step = route.steps[self._step]
        unknown = step.skipped.difference(call.names)
        if unknown:
            raise PlanError(f"call {self._step} of the route skips {min(unknown)}, which this program does not have")
        if step.adapted:
            raise SessionError("a route cannot add what the router's adapters added; open the session with its policy")
        return GateTable.of(call.names, skip=step.skipped, scale=step.scale, measures=False, routed=step.tokens)

    def _router(self, call: Call) -> RouterProtocol:
        if self.replayed is None:
            return Router(call, self.policy)
        return ReplayedRouter(call, self.replayed.steps[self._step])

    @staticmethod
    def _valid(call: Call, mask: torch.Tensor) -> torch.Tensor | None:
        if mask.dim() != 2 or call.tokens <= 1 or mask.shape[1] < call.position + call.tokens:
            return None
        return mask[:, call.position : call.position + call.tokens].bool().contiguous()
