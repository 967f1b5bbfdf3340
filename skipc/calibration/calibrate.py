"""``skipc.calibrate``: measure a checkpoint once, and make a menu of plans for it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import skipc
from skipc.calibration.checkpoint import checkpoint_digest
from skipc.calibration.costs import CostModel, Regime, Timing, trace_work
from skipc.calibration.curvature import Curvatures, metric_of
from skipc.calibration.distillation import distill
from skipc.calibration.fitting import fit_plan
from skipc.calibration.judging import Judge, Judgement
from skipc.calibration.planning import Option, choose
from skipc.calibration.profile import Entry, Profile, SiteFacts
from skipc.calibration.replacing import fit
from skipc.calibration.sampling import sample_calls
from skipc.calibration.stages import Stages
from skipc.calibration.subject import Subject
from skipc.calibration.thinning import Elimination, eliminate
from skipc.ir.errors import PlanError
from skipc.ir.plan import RUN, SKIP, Action, Plan
from skipc.ir.program import KVPolicy
from skipc.ir.site import HiddenLayer
from skipc.runtime.policies.base import Phase

_STATISTICS = 1 << 30  # bytes that one pass may take for its sums
_PARTS = 8  # an MLP's width goes by so many
_RANKS = (8, 32, 64, 128)  # of maps in the place of sites


@dataclass(frozen=True)
class Effort:
    """How much work goes into a profile.

    Attributes:
        chats: of the default text, conversations that the model writes itself, to calibrate on.
        read: batches that statistics are taken of.
        fitted: batches that replacements are fitted on.
        steps: of distillation of each plan, which begins with what the one before it learned.
        judged: windows of the default text that plans are judged on.
        rounds: of timing.
    """

    read: int
    fitted: int
    steps: int
    judged: int
    rounds: int
    chats: int = 0


EFFORTS = {
    "quick": Effort(read=8, fitted=12, steps=10, judged=12, rounds=5, chats=10),
    "thorough": Effort(read=48, fitted=72, steps=180, judged=32, rounds=12, chats=96),
}


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    held_out: Iterable[Any] | None = None,
    effort: Literal["quick", "thorough"] = "quick",
    removals: Sequence[float] = (0.05, 0.1, 0.2, 0.33),
    phase: Phase | None = None,
    batch: int = 1,
    length: int = 1,
    cache: int = 255,
    never: Iterable[str] = (),
    kinds: Iterable[str] | None = None,
    most_in_a_row: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """Measure ``model`` and make plans for it: which sublayers to make thinner or leave out so that a call of a kind
    takes less time, with replacements fitted and trained so that it loses as little as possible.

    Statistics are streamed: no activations are kept. Results are the same for the same inputs, seed, machine and
    number of threads, but for times, and what is chosen by them.

    Args:
        model: in evaluation mode; left as it is.
        batches: text like that which the model is for: int64 ``[batch, tokens]`` tensors, or dictionaries of keyword
            arguments. None: English that comes with Python and, for chat models, conversations that the model writes
            itself.
        tokenizer: for the default text.
        held_out: batches to judge plans by; by default each fifth of ``batches``, which is then not calibrated on.
        effort: ``quick`` (minutes) or ``thorough`` (most of an hour for 135 M parameters on two cores).
        removals: for each plan of the menu, the share of the sublayers' time to save.
        phase, batch, length, cache: the calls to save time in; see :meth:`Profile.plan`. By default decoding at batch 1
            behind 255 tokens, and for encoders calls like those of ``batches``.
        never: names of sites to leave whole.
        kinds: kinds of sites that may be changed (``"mlp"``, ``"attention"``); None for all.
        most_in_a_row: sites next to each other that may be left out.
        folder: where to keep what was done so far, to go on from there if this is interrupted.
        seed: of the order of batches and the tokens drawn.
        progress: show progress bars.

    Raises:
        TypeError: without batches and tokenizer, and for batches that are none.
        UnknownSiteError: for a name in ``never`` that is no site.
        PlanError: if so much time cannot be saved.
    """
    if effort not in EFFORTS:
        raise ValueError(f"effort is one of {', '.join(map(repr, EFFORTS))}, not {effort!r}")
    if any(not 0 < r < 1 for r in removals):
        raise PlanError(f"removals are shares of the sublayers' time, between 0 and 1, not {list(removals)}")
    amount, removals = EFFORTS[effort], sorted(set(removals))
    bar = (lambda items: _tracked(items, "writing chats")) if progress else None
    subject = Subject(
        model, batches, held_out, tokenizer, amount.judged, seed, chats=amount.chats, kept=folder, progress=bar
    )
    subject.restrict(never, kinds)
    regime = subject.regime(phase, batch, length, cache)
    settings = {
        "effort": asdict(amount), "seed": seed, "removals": list(removals), "regime": asdict(regime),
        "free": sorted(subject.free), "most_in_a_row": most_in_a_row, "text": subject.text_digest(),
        "checkpoint": checkpoint_digest(subject.digests), "threads": torch.get_num_threads(),
        "skipc": skipc.__version__,
    }  # fmt: skip
    stages = Stages(folder, settings)
    work = _Calibration(subject, amount, regime, stages, seed, progress)
    work.measure_times()
    work.read_statistics()
    work.make_menu(removals, most_in_a_row)
    profile = work.profile(effort)
    if folder is not None:
        profile.save(folder)
        stages.clear()
    return profile


class _Calibration:
    def __init__(self, subject: Subject, effort: Effort, regime: Regime, stages: Stages, seed: int, progress: bool):
        self.subject, self.model, self.effort, self.regime = subject, subject.model, effort, regime
        self.stages, self.seed, self.shown = stages, seed, progress
        self.sources = {n: s.source for n, s in subject.free.items() if s.source is not None}
        # A plan leaves out the same sites in all calls of a request: keys that those would write are never read.
        self.kv: KVPolicy | None = "none" if subject.decodes else None
        self.began = time.perf_counter()
        self.menu: list[Entry] = []
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}

    # -- stages -------------------------------------------------------------------------------------------------------

    def measure_times(self) -> None:
        """Times of calls, similarities, and a cost model fitted to the times."""
        found = self.stages.get("times")
        if found is None:
            with self._working("timing calls"):
                found = sample_calls(self.subject, self.regime, self.kv, self.effort.rounds)
            self.stages.put("times", found)
        if not found["heads"]:
            self.subject.keep_heads()
        self.layers = self.subject.layers
        self.timings = [Timing.from_dict(t) for t in found["timings"]]
        self.similarity, self.scale = found["similarity"], found["scale"]
        kinds = {name: site.kind.value for name, site in self.subject.sites.items()}
        size = next(self.model.parameters()).element_size()
        self.costs = CostModel(trace_work(self.model, self.subject.given[0]), kinds, size)
        self.costs.fit(self.timings)

    def read_statistics(self) -> None:
        """What leaving out each site costs, what replacing it does, and in which order neurons leave."""
        found = self.stages.get("statistics")
        if found is None:
            found = self._statistics()
            self.stages.put("statistics", found)
        self.losses: dict[str, float] = found["losses"]
        self.orders = {n: Elimination(e["order"], e["costs"], e["total"]) for n, e in found["orders"].items()}
        self.errors: dict[str, list[float]] = found["errors"]
        self.metrics: dict[str, torch.Tensor] = found["metrics"]

    def _statistics(self) -> dict[str, Any]:
        read = self.subject.given[: self.effort.read]
        losses: dict[str, float] = {}
        orders: dict[str, Any] = {}
        errors: dict[str, list[float]] = {}
        metrics: dict[str, torch.Tensor] = {}
        groups, room = self._groups(), _STATISTICS
        for i, group in enumerate(groups):
            sources = {n: s for n in group if (s := self.subject.sites[n].source) is not None}
            layers = {n: self.layers[n] for n in group if n in self.layers}
            sums = Curvatures(layers, group, sources)
            generator = torch.Generator().manual_seed(self.seed)
            for batch in self._track(read, f"gradients ({i + 1} of {len(groups)})"):
                sums.add(self.model, batch, generator)
            losses |= {n: v / max(sums.tokens, 1) for n, v in sums.losses.items()}
            for name in self._track(group, "choosing neurons, maps"):
                if name in sums.replaced:
                    seen = sums.replaced.pop(name)
                    metric = metric_of(seen.outputs)
                    errors[name] = fit(sources[name], seen.moments, metric).errors[0]
                    if (room := room - 4 * metric.numel()) >= 0:  # else maps are fitted as if all errors were alike
                        metrics[name] = metric.float()
                if name in layers:
                    layer, curvature = layers[name], sums.found.pop(name)
                    columns = curvature.metric(sums.tokens) @ self.model.get_parameter(layer.columns).detach().double()
                    made = eliminate(curvature.inputs, columns, least=min(self._widths(layer)), size=layer.size)
                    orders[name] = {"order": made.order, "costs": made.costs, "total": made.total}
        return {"losses": losses, "orders": orders, "errors": errors, "metrics": metrics}

    def _groups(self) -> list[list[str]]:
        """Sites whose statistics are taken in one pass."""
        groups: list[list[str]] = []
        room = 0
        for name in self.subject.free:
            room -= self._bytes_of(name)
            if room < 0 or not groups:
                groups.append([])
                room = _STATISTICS - self._bytes_of(name)
            groups[-1].append(name)
        return groups

    def _bytes_of(self, name: str) -> int:
        source, numbers = self.subject.sites[name].source, 0
        if source is not None:
            numbers += 4 * source.width**2
        if name in self.layers:
            numbers += sum(n**2 for n in self.model.get_parameter(self.layers[name].columns).shape)
        return 4 * numbers

    @staticmethod
    def _widths(layer: HiddenLayer) -> list[int]:
        """Widths that an MLP, and numbers of groups that an attention, may have, besides its own."""
        step = 32 if layer.width >= 512 else 4 if layer.size == 1 else 1
        made = {round(layer.width * k / _PARTS / step) * step for k in range(1, _PARTS)}
        return sorted(w for w in made if 0 < w < layer.width)

    def _ranks(self, site: str) -> list[int]:
        """Ranks that a map in the place of a site may have."""
        source = self.subject.sites[site].source
        return [r for r in _RANKS if source is not None and r * 4 <= source.width]

    def options(self, site: str) -> list[Option]:
        """All ways to run a site."""
        whole, loss = self.costs.of_site(self.regime, site), self.losses.get(site)
        ways = {RUN: 0.0}
        if site in self.layers:
            order = self.orders[site]
            ways |= {Action("thin", w): order.error(w) * order.total for w in self._widths(self.layers[site])}
        if loss is not None:
            if site in self.errors:
                ways |= {Action("lowrank", r): max(0.0, self.errors[site][r]) * loss for r in self._ranks(site)}
            ways[SKIP] = loss
        return [Option(a, cost, whole - self.costs.of_site(self.regime, site, a)) for a, cost in ways.items()]

    def make_menu(self, removals: Sequence[float], most_in_a_row: int | None) -> None:
        """The plans, each of which begins where the one before it ended."""
        judge: Judge | None = None
        total = sum(self.costs.of_site(self.regime, name) for name in self.subject.sites)
        saved = dict.fromkeys(self.subject.free, 0.0)
        plan = Plan(kv=self.kv)
        for removal in removals:
            ways = {n: [o for o in self.options(n) if o.seconds >= saved[n]] for n in self.subject.free}
            chosen = choose(ways, removal * total, most_in_a_row)
            saved = {n: o.seconds for n, o in chosen.items()}
            actions = {n: o.action for n, o in chosen.items() if o.action != RUN}
            name = f"{removal * 100:g}%"
            steps = self.effort.steps
            found = self.stages.get(name)
            if found is None:
                plan = self._made(plan, actions, steps, name)
                judge = judge or self._judge()
                with self._working(f"{name}: judging"):
                    judgement = judge.judge(plan)
                found = {"tensors": plan.trained, "judgement": asdict(judgement)}
                self.stages.put(name, found)
            removed = sum(saved.values()) / total
            entry = Entry(name, actions, Judgement(**found["judgement"]), removed, steps, self.kv)
            plan = entry.plan(found["tensors"], self.sources)
            self.menu.append(entry)
            if found["tensors"]:
                self.tensors[name] = dict(found["tensors"])

    def _made(self, plan: Plan, actions: Mapping[str, Action], steps: int, name: str) -> Plan:
        made = fit_plan(
            self.model, self.subject.given[: self.effort.fitted], self.subject.sites.values(), actions,
            orders=self.orders, metrics=self.metrics, start=plan, kv=self.kv, progress=self._bar(f"{name}: fitting"),
        )  # fmt: skip
        if steps and not made.whole:
            made = distill(
                self.model, made, self.subject.given, steps, seed=self.seed,
                progress=self._bar(f"{name}: training"),
            )  # fmt: skip
        return made

    def _judge(self) -> Judge:
        with self._working("judging the whole model"):
            return Judge(self.model, self.subject.judged, self.subject.kinds)

    # -- the result ---------------------------------------------------------------------------------------------------

    def profile(self, effort: str) -> Profile:
        """All of it."""
        about = {
            "model": type(self.model).__name__, "skipc": skipc.__version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "dtype": str(next(self.model.parameters()).dtype), "seed": self.seed, "text": self.subject.text_digest(),
            "tokens": sum(b.tokens for b in self.subject.given), "judged": sum(b.tokens for b in self.subject.judged),
            "error": self.costs.error(self.timings), "minutes": (time.perf_counter() - self.began) / 60,
        }  # fmt: skip
        sites = {
            name: SiteFacts(
                site.kind.value, site.layer, self.losses.get(name),
                {p: v[name] for p, v in self.similarity.items() if name in v},
                {p: v[name] for p, v in self.scale.items() if name in v},
                {w: self.orders[name].error(w) * self.orders[name].total for w in self._widths(self.layers[name])}
                if name in self.layers else {},
                {r: self.errors[name][r] * self.losses[name] for r in self._ranks(name)}
                if name in self.errors and name in self.losses else {},
                site.source,
            )
            for name, site in self.subject.sites.items()
        }  # fmt: skip
        return Profile(
            effort, about, self.subject.digests, sites, self.costs, self.timings, self.regime, self.menu, self.tensors
        )

    # -- progress -----------------------------------------------------------------------------------------------------

    def _track(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        return _tracked(items, what) if self.shown else iter(items)

    def _bar(self, what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
        return lambda items: self._track(items, what)

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        if not self.shown:
            yield
            return
        from rich.console import Console

        with Console().status(what):
            yield


def _tracked(items: Iterable[Any], what: str) -> Iterator[Any]:
    from rich.progress import track

    items = list(items)
    return iter(track(items, description=f"{what:<28}", total=len(items)))
