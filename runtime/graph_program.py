"""Programs that are one compiled graph: with conditionals inside, or with a fixed plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from skipc.kernels.similarity import RULE_CODES
from skipc.runtime.gating import GatedCall, GatedSpec
from skipc.runtime.program import Arms, BoundProgram, Measurement, Program, Selection

from skipc.ir.errors import PlanError, SessionError
from skipc.ir.gating import GateTable
from skipc.ir.program import KVPolicy, ProgramSpec


class _OneGraph(Program):
    """What both kinds share: there are no steps to be run apart."""

    lowering: str

    def __init__(
        self, spec: ProgramSpec, function: Callable[[list[Any]], Sequence[Any]], kv: KVPolicy, partial: str | None
    ):
        super().__init__(spec, (), kv, partial)
        self.function = function

    def arms_for(self, skip: frozenset[str], kv: KVPolicy) -> Arms:
        """As for any program; the KV policy was compiled in."""
        self._check_kv(kv)
        return super().arms_for(skip, kv)

    def gated(self, kv: KVPolicy) -> GatedSpec:
        """As for any program; the KV policy was compiled in."""
        self._check_kv(kv)
        return super().gated(kv)

    def _check_kv(self, kv: KVPolicy) -> None:
        if kv != self.default_kv:
            raise PlanError(
                f"compiled for kv={self.default_kv!r}: under lowering={self.lowering!r} a session cannot use kv={kv!r}"
            )

    def bound(self, selection: Selection, inputs: Sequence[Any]) -> BoundProgram:
        """The program on inputs that stay."""
        return lambda trusted, how=selection: self.run(inputs, how)

    def measure(self, inputs: Sequence[Any], arms: Arms) -> tuple[tuple[Any, ...], list[Measurement]]:
        """Not possible: there is nothing between the sites to read a clock at."""
        raise SessionError(f"measure=True needs lowering='outline'; this program was lowered to {self.lowering!r}")


class CondProgram(_OneGraph):
    """One graph of ``torch.cond``: see :mod:`skipc.passes.insert_gates`.

    Args:
        layers: which similarities may span a layer (see :class:`~skipc.passes.insert_gates.GatedGraph`).
        measured: numbers of the sites whose moments the graph returns.
    """

    lowering = "cond"

    def __init__(
        self,
        spec: ProgramSpec,
        function: Callable[[list[Any]], Sequence[Any]],
        kv: KVPolicy,
        partial: str | None,
        layers: dict[int, int],
        measured: Sequence[int],
    ):
        super().__init__(spec, function, kv, partial)
        self.layers, self.measured = layers, measured
        self._tables: dict[Arms, GateTable] = {}

    def run(self, inputs: Sequence[Any], how: Arms | GatedCall) -> tuple[Any, ...]:
        """Run with the gates of a call, or those that arms amount to."""
        if not isinstance(how, GatedCall):
            if how not in self._tables:
                names = [site.name for site in self.spec.sites]
                self._tables[how] = GateTable.of(names, skip=self.skipped_by(how), measures=False)
            how = GatedCall(self.gated(self.default_kv), self._tables[how])
        table = how.table
        if table.by_token:
            raise PlanError("tokens that decide for themselves need lowering='outline'")
        for site, first in table.spans.items():
            if self.layers.get(site) != first:
                raise PlanError(
                    f"under lowering='cond' a similarity spans a site or its layer: not so {table.sites[site]}"
                )
        batch, tokens = self.extent(inputs)
        valid = how.valid if how.valid is not None else torch.ones(batch, tokens, dtype=torch.bool)
        rule = torch.tensor(RULE_CODES[table.rule])
        gates = [table.skip, table.threshold, table.closes, table.scale, table.since, rule, valid]
        made = self.function([*inputs, *gates])
        count = len(self.spec.outputs)
        how.skipped.copy_(made[count])
        for site, found in zip(self.measured, made[count + 1 :], strict=True):
            how.note_moments(site, found)
        return self.unshared(inputs, tuple(made[:count]))


class StaticProgram(_OneGraph):
    """One graph without the sites of a plan."""

    lowering = "static"

    def __init__(
        self,
        spec: ProgramSpec,
        function: Callable[[list[Any]], Sequence[Any]],
        kv: KVPolicy,
        partial: str | None,
        plan: frozenset[str],
    ):
        super().__init__(spec, function, kv, partial)
        self.exact = super().arms_for(plan & self.site_names, kv)  # what it runs, whoever calls

    def run(self, inputs: Sequence[Any], how: Arms | GatedCall) -> tuple[Any, ...]:
        """Run the plan."""
        if isinstance(how, GatedCall):
            raise SessionError("lowering='static' takes no similarities and has no gates; use 'outline' or 'cond'")
        return self.unshared(inputs, tuple(self.function(list(inputs))))

    def arms_for(self, skip: frozenset[str], kv: KVPolicy) -> Arms:
        """The plan's arms.

        Raises:
            PlanError: if something else is asked for.
        """
        self._check_kv(kv)
        plan = self.skipped_by(self.exact)
        if skip and skip != plan:
            raise PlanError(
                f"lowering='static' was compiled to skip {sorted(plan) or 'nothing'}, a session cannot change it"
            )
        return self.exact
