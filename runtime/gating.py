"""One call of a program whose gates are still open: what it skips is decided while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from skipc.kernels.chain import Gates
from skipc.kernels.device import on_gpu
from skipc.kernels.similarity import cosine, moments, norm_ratio
from skipc.runtime.buffers import Stock
from skipc.runtime.device_gates import DeviceGates

from skipc.ir.errors import PlanError
from skipc.ir.gating import GateTable
from skipc.ir.program import KVPolicy, ProgramSpec

_FEW = 256
_MOST_TABLES = 64  # that are kept on a device
PREDICATED = -1  # in place of an arm: the kernel that looks at the gate itself


def _cosine(dot: float, before: float, after: float) -> float:
    return dot / max(math.sqrt(before) * math.sqrt(after), 1e-8) if dot == dot else dot


class GatedSpec:
    """A program's arms by what is skipped, for one KV policy.

    Raises:
        PlanError: if some set of sites cannot be left out under ``kv``.
    """

    def __init__(self, spec: ProgramSpec, kv: KVPolicy):
        self.spec, self.kv = spec, kv
        self.stock = Stock()
        self.place = {site.name: i for i, site in enumerate(spec.sites)}
        self.sites = [tuple(self.place[name] for name in step.sites) for step in spec.steps]
        self.arms: list[dict[tuple[int, ...], int]] = []
        for step in spec.steps:
            names = {tuple(sorted(self.place[n] for n in arm.skipped)): arm.skipped for arm in step.arms}
            self.arms.append({sites: step.arm_for(skipped, kv) for sites, skipped in names.items()})
        self._checked: GateTable | None = None
        self._device_gates: dict[object, DeviceGates | None] = {}

    def on_device(self, table: GateTable, device: torch.device, adapted: bool) -> DeviceGates | None:
        """See :meth:`DeviceGates.of`."""
        key = table.work, device, adapted
        if key not in self._device_gates:
            if len(self._device_gates) >= _MOST_TABLES:
                self._device_gates.pop(next(iter(self._device_gates)))
            self._device_gates[key] = DeviceGates.of(self, table, device, adapted)
        return self._device_gates[key]

    def check(self, table: GateTable) -> None:
        """Refuse a table that the program cannot honour.

        Raises:
            PlanError: if it is for other sites, or scales the stream where something else is made of the sum.
        """
        if table is self._checked:
            return
        if table.sites != tuple(self.place):
            raise PlanError("the gate table was made for other sites than the program has")
        for step in self.spec.steps:
            for name in step.sites:
                beside = [n for n in step.sites if table.closes[self.place[name], self.place[n]]]
                if beside:
                    raise PlanError(f"{name} and {beside[0]} run side by side: one cannot decide about the other")
                number = self.place[name]
                if not step.scalable and table.scale[number] != 1:
                    raise PlanError(f"{name} cannot be skipped by scaling: more than its sum depends on it")
                by_token = name in table.routed or (table.by_token and bool(table.closes[:, number].any()))
                if by_token and not step.scalable:
                    raise PlanError(f"tokens cannot skip {name} one by one: it shares its sum, or more depends on that")
        self._checked = table


class GatedCall:
    """The state of one gated call.

    Attributes:
        plan: arms of the program.
        table: what was asked for.
        valid: bool ``[batch, tokens]``, False for padding; None if there is none.
        skipped: bool ``[sites]``: the table's at first; afterwards, all that the call skipped.
        moments: by the shape of a stream, ``[batch, tokens]``, those of its sites: fp32 ``[sites, batch, tokens, 3]``,
            NaN where a site did not run.
        partly: bool ``[batch, tokens]``: those that went through a site, if only some did.
        adapted: True if something was added to the stream of tokens that skipped a site.
        device: its gates, where they are decided on the device.
    """

    def __init__(
        self,
        plan: GatedSpec,
        table: GateTable,
        valid: torch.Tensor | None = None,
        extent: tuple[int, int] = (0, 0),
        device: torch.device | None = None,
        router: Router | None = None,
    ):
        plan.check(table)
        self.plan, self.table, self.valid, self.router = plan, table, valid, router
        self.partly: dict[str, torch.Tensor] = {}
        self.adapted = False
        self._closed: dict[int, torch.Tensor] = {}  # bool [batch, tokens]: those that skip a site
        self.moments: dict[tuple[int, ...], torch.Tensor] = {}
        self._written = self.moments  # what the program writes to
        self._before: dict[int, torch.Tensor] = {}
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}  # moments, as [sites, batch * tokens, 3]
        if 0 in extent:
            self.skipped = table.skip.clone()
        else:
            # Before the program allocates: what outlives its values would tear holes in the heap.
            self.skipped, self.moments[extent], self._rows[extent] = plan.stock.take(table, extent, device)
        # Where they do not change, as plain numbers: while a graph is captured, nothing can be read off a tensor.
        self._flags: Any = table.flags if table.fixed else self.skipped
        self.device: DeviceGates | None = None
        self._skipping: torch.Tensor  # int8 [sites], on the device

    def leave_to_device(self, adapted: bool) -> None:
        """Have gates decided on the device, if they can be. ``adapted``: somebody may want adapters."""
        rows = next(iter(self._rows.values()), None)
        if self.table.fixed or rows is None or self.valid is not None or not on_gpu(rows):
            return
        self.device = self.plan.on_device(self.table, rows.device, adapted)
        if self.device is not None:
            self._flags = self.table.flags  # of all that is decided on the host

    def begin(self) -> None:
        """Before each of the runs that are captured with this call."""
        if self.device is not None:
            self._skipping = self.device.skip.clone()
            next(iter(self._rows.values())).fill_(torch.nan)

    @property
    def seen(self) -> list[torch.Tensor]:
        """What a run with this call wrote."""
        return [*self._written.values(), *([self._skipping] if self.device is not None else [])]

    def see(self, seen: Sequence[torch.Tensor]) -> None:
        """Take what a run wrote with a call like this one. Waits for the device if that decided."""
        if self.device is not None:
            *seen, skipped = seen
            self.skipped = skipped.cpu() != 0
        self.moments = {tuple(block.shape[1:-1]): block.clone() for block in seen}

    # -- asked by the program -----------------------------------------------------------------------------------------

    def arm(self, step: int) -> int:
        """Which arm step number ``step`` runs."""
        flags, sites = self._flags, self.plan.sites[step]
        if self._on_device(step):
            return PREDICATED
        return self.plan.arms[step][tuple(s for s in sites if flags[s])]

    def predicated(self, step: int, inputs: Sequence[Any]) -> torch.Tensor:
        """The stream behind a step whose kernel looks at its gate itself."""
        assert self.device is not None
        return self.device.run(step, inputs, self._skipping, next(iter(self._rows.values())))

    def _on_device(self, step: int) -> bool:
        """Whether the step's kernel looks at its gate itself."""
        device = self.device
        return device is not None and step in device.steps and not self._flags[self.plan.sites[step][0]]

    def arrive(self, step: int, stream: torch.Tensor) -> torch.Tensor | None:
        """The stream has come to a step whose tokens may differ: bool ``[batch, tokens]``, those that it runs on, or
        None if all do or none does."""
        sites = self.plan.sites[step]
        if len(sites) != 1:
            return None
        (site,) = sites
        if self.router is not None and self.table.sites[site] in self.table.routed and not self.skipped[site]:
            self._closed[site] = ~self.router.route(site, stream)
        closed = self._closed.get(site)
        if closed is None or self.skipped[site]:
            return None
        runs = ~closed if self.valid is None or self.valid.shape != closed.shape else ~closed & self.valid
        if not runs.any():
            self.skipped[site] = True
            return None
        if runs.all():
            return None
        self.partly[self.table.sites[site]] = runs
        return runs

    def blend(self, step: int, rows: torch.Tensor, stream: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """The stream behind a step that ran on ``rows``: ``made``, ``[rows that ran, width]``, there, and elsewhere
        what came in, scaled, or with what the router adds."""
        (site,) = self.plan.sites[step]
        factor = self.table.factors_by_number.get(site, 1.0)
        after = stream.clone() if factor == 1 else (stream.float() * factor).to(stream.dtype)
        more = self._added(site, stream[~rows])
        if more is not None:
            after[~rows] += more
        after[rows] = made
        return after

    def _added(self, site: int, stream: torch.Tensor) -> torch.Tensor | None:
        if self.router is None or self.table.sites[site] not in self.table.routed or not len(stream):
            return None
        more = self.router.instead(site, stream)
        self.adapted |= more is not None
        return more

    def ran(
        self,
        step: int,
        before: torch.Tensor,
        after: torch.Tensor,
        rows: torch.Tensor | None = None,
        measured: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The step ran, between these points of the stream: take its similarity, and close the gates that it decides
        about. Returns ``after``, or where the step skips by scaling, that times the scale. ``rows``: the tokens that it
        ran on, if not all; ``measured``: their moments, if its region took them."""
        sites, table = self.plan.sites[step], self.table
        if self._on_device(step):
            return after  # its kernel has taken the moments
        for site in sites:
            if site in table.opens_spans:
                self._before[site] = before
        flags = self._flags
        running = [s for s in sites if not flags[s]]
        for site in running:
            decides = site in table.deciding
            if not (table.measures or decides):
                continue
            since = table.spans.get(site)
            found = measured if since is None else None
            if found is None:
                found = moments(before if since is None else self._before.get(since), after)
            if found is None:
                continue
            if rows is not None:
                found = torch.where(rows[..., None], found, torch.nan)
            self.note_moments(site, found)
            if decides and self.table.rule == "gather":
                self._close_tokens(site, cosine(found) >= self.table.threshold[site])
            elif decides:
                self._gates(found.shape[:-1]).note(site, found.flatten(0, -2))
        for site in sites:
            self._before.pop(table.ends_spans.get(site, -1), None)  # large, and of no more use
        if not running and sites[0] in table.factors_by_number:
            after = (after.float() * table.factors_by_number[sites[0]]).to(after.dtype)
        if not running and table.routed:
            more = self._added(sites[0], before.flatten(0, -2))
            after = after if more is None else after + more.view_as(after)
        return after

    def note_moments(self, site: int, found: torch.Tensor) -> None:
        """The moments of a site; NaN if it did not run."""
        self._block(found.shape[:-1], found.device)[site] = found

    def gates(self, x: torch.Tensor) -> Gates:
        """For a chain that is entered with ``x``, ``[..., width]``."""
        shape = x.shape[:-1]
        self._block(shape, x.device)
        return self._gates(shape)

    def _close_tokens(self, site: int, reached: torch.Tensor) -> None:
        for other in self.table.closes[site].nonzero().flatten().tolist():
            closed = self._closed.get(other)
            self._closed[other] = reached if closed is None or closed.shape != reached.shape else closed | reached

    def _block(self, shape: tuple[int, ...], device: torch.device | None) -> torch.Tensor:
        if shape not in self._written:
            self._written[shape] = torch.full((len(self.skipped), *shape, 3), torch.nan, device=device)
            self._rows[shape] = self._written[shape].flatten(1, -2)
        return self._written[shape]

    def _gates(self, shape: tuple[int, ...]) -> Gates:
        valid = self.valid
        if valid is not None:
            valid = valid.flatten() if valid.shape == shape else None
        return Gates(self.table, self.skipped, self._rows[shape], valid)


class Router(Protocol):
    """What routed sites ask."""

    def route(self, site: int, stream: torch.Tensor) -> torch.Tensor: ...

    def instead(self, site: int, stream: torch.Tensor) -> torch.Tensor | None: ...


@dataclass(slots=True)
class Observation:
    """What a call did and saw.

    Attributes:
        table: the gates that it was given.
        flags: bool ``[sites]``: those that it skipped; None if these are the table's.
        blocks: moments, see :class:`GatedCall`.
        valid: bool ``[batch, tokens]``, False for padding; None if there is none.
    """

    table: GateTable
    flags: torch.Tensor | None = None
    blocks: tuple[torch.Tensor, ...] = ()
    valid: torch.Tensor | None = None

    @property
    def skipped(self) -> frozenset[str]:
        """Names of the sites that it skipped."""
        return self.table.skipped if self.flags is None else self.table.names_of(self.flags)

    def cosines(self) -> list[torch.Tensor]:
        """Similarities, for each shape of stream: fp32 ``[sites, batch, tokens]``, NaN for padding, and for sites that
        did not run or are of another stream."""
        return [self._masked(cosine(block)) for block in self.blocks]

    def ratios(self) -> list[torch.Tensor]:
        """The same for ``|after| / |before|``."""
        return [self._masked(norm_ratio(block)) for block in self.blocks]

    def rows(self, sites: Sequence[int] | None = None) -> list[list[float]]:
        """Mean similarity of each site, or of some by their numbers, over the tokens of each row of the batch; NaN if
        there is none. (In plain Python where there is little: an operation of torch takes as long as fifty numbers.)"""
        which = range(len(self.table.sites)) if sites is None else sites
        rows: list[list[float]] = [[] for _ in which]
        for block in self.blocks:
            if block[0].numel() <= _FEW and block.dim() == 4 and block.shape[2] == 1 and self.valid is None:
                moments = block.tolist()  # of a decode step
                found = [[_cosine(*m) for (m,) in moments[i]] for i in which]
            else:
                cosines = self._masked(cosine(block))
                means = (cosines if cosines.dim() == 2 else cosines.flatten(2).nanmean(2)).tolist()
                found = [means[i] for i in which]
            rows = [old if any(v == v for v in old) else new for old, new in zip(rows, found, strict=True)]
        return rows

    def _masked(self, found: torch.Tensor) -> torch.Tensor:
        if self.valid is None or self.valid.shape != found.shape[1:]:
            return found
        return torch.where(self.valid, found, torch.nan)
