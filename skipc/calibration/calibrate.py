"""``skipc.calibrate``: measure a checkpoint once, and make a menu of plans for it."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import skipc
from skipc.calibration.batches import batches_of, call_on, module_of
from skipc.calibration.checkpoint import checkpoint_digest, digests_of
from skipc.calibration.costs import CostModel, Phase, Regime, Timing, trace_work
from skipc.calibration.curvature import Curvatures
from skipc.calibration.distillation import distill
from skipc.calibration.judging import Judge, Judgement, is_causal
from skipc.calibration.planning import Option, choose
from skipc.calibration.profile import Entry, Profile, SiteFacts
from skipc.calibration.similarity import measure_similarity
from skipc.calibration.stages import Stages
from skipc.calibration.text import calibration_windows
from skipc.calibration.thinning import Elimination, eliminate, thin
from skipc.calibration.timing import medians, time_calls
from skipc.explanation import find_sites
from skipc.ir.errors import PlanError, UnknownSiteError
from skipc.ir.plan import Plan
from skipc.ir.site import HiddenLayer, Site

log = logging.getLogger("skipc")

_TOKENS = 512  # in a window of the default text
_ROWS = 4  # of those, where rows are texts of their own (encoders)
_STATISTICS = 1 << 30  # bytes that one pass may take for its sums
_PARTS = 8  # an MLP's width goes by so many
_HELD_OUT = 5  # of the user's batches, each fifth is judged on


@dataclass(frozen=True)
class Effort:
    """How much work goes into a profile.

    Attributes:
        read: batches that statistics are taken of.
        fitted: batches that replacements are fitted on.
        steps: of distillation, for the plan that removes a tenth; others take as many more as they remove more.
        judged: windows of the default text that plans are judged on.
        rounds: of timing.
    """

    read: int
    fitted: int
    steps: int
    judged: int
    rounds: int


EFFORTS = {
    "quick": Effort(read=16, fitted=16, steps=16, judged=16, rounds=8),
    "thorough": Effort(read=48, fitted=48, steps=140, judged=32, rounds=16),
}


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    tokenizer: Any = None,
    held_out: Iterable[Any] | None = None,
    effort: Literal["quick", "thorough"] = "quick",
    removals: Sequence[float] = (0.1, 0.2, 0.33),
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
            arguments. None: English that comes with Python.
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
    if model.training:
        raise PlanError("the model is in training mode: call model.eval() first")
    work = _Calibration(model, EFFORTS[effort], seed, progress)
    work.take_text(batches, held_out, tokenizer)
    work.find_sites(frozenset(never), None if kinds is None else frozenset(kinds))
    work.regime = work.regime_for(phase, batch, length, cache)
    settings = {
        "effort": asdict(work.effort), "seed": seed, "removals": list(removals), "regime": asdict(work.regime),
        "free": sorted(work.free), "most_in_a_row": most_in_a_row, "text": work.text_digest(),
        "checkpoint": checkpoint_digest(work.digests), "threads": torch.get_num_threads(), "skipc": skipc.__version__,
    }  # fmt: skip
    work.stages = Stages(folder, settings)
    work.measure_times()
    work.read_statistics()
    work.make_menu(sorted(removals), most_in_a_row)
    profile = work.profile(effort)
    if folder is not None:
        profile.save(folder)
        work.stages.clear()
    return profile


class _Calibration:
    def __init__(self, model: torch.nn.Module, effort: Effort, seed: int, progress: bool):
        self.model, self.effort, self.seed, self.shown = model, effort, seed, progress
        self.began = time.perf_counter()
        self.digests = digests_of(model)
        self.stages: Stages
        self.regime: Regime
        self.menu: list[Entry] = []
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    # -- what to work on ----------------------------------------------------------------------------------------------

    def take_text(self, batches: Iterable[Any] | None, held_out: Iterable[Any] | None, tokenizer: Any) -> None:
        """Batches to calibrate on and batches to judge by."""
        if batches is None:
            if tokenizer is None:
                raise TypeError("give batches, or a tokenizer for the English text that comes with Python")
            given, others = calibration_windows(tokenizer, _TOKENS, self.effort.judged, self.seed)
            if not self._generates(given[0]):
                given, others = ([_rows(w) for w in windows] for windows in (given, others))
            self.given, self.judged = batches_of(self.model, given), batches_of(self.model, others)
        else:
            self.given = batches_of(self.model, batches)
            if held_out is None:
                if len(self.given) < _HELD_OUT:
                    raise TypeError(f"give {_HELD_OUT} batches or more, or batches to judge by as held_out")
                self.judged = self.given[_HELD_OUT - 1 :: _HELD_OUT]
                self.given = [b for i, b in enumerate(self.given) if i % _HELD_OUT != _HELD_OUT - 1]
        if batches is not None and held_out is not None:
            self.judged = batches_of(self.model, held_out)
        with torch.no_grad():
            self.causal = is_causal(self.model, call_on(self.model, self.given[0]))
        self.decodes = self.causal and hasattr(self.model, "config") and not _is_encoder_decoder(self.model)

    def _generates(self, ids: torch.Tensor) -> bool:
        with torch.no_grad():
            return is_causal(self.model, call_on(self.model, batches_of(self.model, [ids[:, :8]])[0]))

    def text_digest(self) -> str:
        """A digest of all batches."""
        made = hashlib.sha256()
        for batch in (*self.given, *self.judged):
            for name, value in sorted(batch.inputs.items()):
                made.update(name.encode())
                if isinstance(value, torch.Tensor):
                    made.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return made.hexdigest()[:16]

    def find_sites(self, never: frozenset[str], kinds: frozenset[str] | None) -> None:
        """The sites, and those that may be changed."""
        self.sites: dict[str, Site] = {s.name: s for s in find_sites(self.model, **self.given[0].inputs).sites}
        for name in sorted(never):
            if name not in self.sites:
                raise UnknownSiteError(name, self.sites)
        self.free: dict[str, Site] = {}
        for name, site in self.sites.items():
            if name in never or (kinds is not None and site.kind.value not in kinds):
                continue
            try:
                module_of(self.model, name)
            except PlanError as error:
                log.info("left whole: %s", error)
            else:
                self.free[name] = site
        self.layers: dict[str, HiddenLayer] = {n: s.hidden for n, s in self.free.items() if s.hidden is not None}

    def regime_for(self, phase: Phase | None, batch: int, length: int, cache: int) -> Regime:
        """The calls to save time in."""
        phase = phase or ("decode" if self.decodes else "prefill")
        if phase == "decode":
            if not self.decodes:
                raise PlanError(f"{type(self.model).__name__} does not decode: calibrate for phase='prefill'")
            return Regime("decode", batch, length, cache + length)
        first = next(v for v in self.given[0].inputs.values() if isinstance(v, torch.Tensor))
        tokens = length if length > 1 else (first.shape[1] if first.dim() > 1 else 1)
        return Regime("prefill", batch if batch > 1 else first.shape[0], tokens, tokens)

    # -- stages -------------------------------------------------------------------------------------------------------

    def measure_times(self) -> None:
        """Times of whole calls, without some sites and with thin ones, and similarities."""
        kinds = {name: site.kind.value for name, site in self.sites.items()}
        size = next(self.model.parameters()).element_size()
        self.costs = CostModel(trace_work(self.model, self.given[0]), kinds, size)
        found = self.stages.get("times")
        if found is None:
            with self._working("timing calls"):
                found = self._measured_times()
            self.stages.put("times", found)
        self.timings = [Timing(Regime(**t["regime"]), t["shares"], t["seconds"]) for t in found["timings"]]
        self.similarity, self.scale = found["similarity"], found["scale"]
        self.costs.fit(self.timings)

    def _measured_times(self) -> dict[str, Any]:
        compiled = skipc.compile(self.model, on_error="raise")
        plans, shares = self._timed_plans()
        regimes = [self.regime]
        if self.decodes:
            half = max(16, self.regime.context // 4)
            regimes = [Regime("decode", self.regime.batch, 1, c) for c in dict.fromkeys((half, self.regime.context))]
            regimes += [Regime("prefill", 1, t, t) for t in (64, 256)]
        timings = []
        for regime in regimes:
            seconds = medians(time_calls(compiled, regime, plans, self.effort.rounds, self.given[0]))
            timings += [asdict(Timing(regime, shares[name], taken)) for name, taken in seconds.items()]
        similarity: dict[str, dict[str, float]] = {}
        scale: dict[str, dict[str, float]] = {}
        for phase in ("prefill", "decode") if self.decodes else ("prefill",):
            few = [b.inputs["input_ids"][:, :128] if phase == "decode" else b.inputs for b in self.given[:4]]
            made = measure_similarity(compiled, few, (phase,), generate=16 if phase == "decode" else 0)
            similarity[phase], scale[phase] = made.similarity, made.scale
        return {"timings": timings, "similarity": similarity, "scale": scale}

    def _timed_plans(self) -> tuple[dict[str, Plan | None], dict[str, dict[str, float]]]:
        """Plans whose times tell what each kind of site takes: without all of a kind, without half of the sites, and
        with MLPs of half their width."""
        plans: dict[str, Plan | None] = {"whole": None}
        shares: dict[str, dict[str, float]] = {"whole": {}}
        for kind in sorted({s.kind.value for s in self.sites.values()}):
            names = [n for n, s in self.sites.items() if s.kind.value == kind]
            for label, some in ((f"no {kind}", names), (f"half {kind}", names[::2])):
                plans[label], shares[label] = Plan(some, kv=self._kv), dict.fromkeys(some, 0.0)
        if self.layers:
            weights: dict[str, torch.Tensor] = {}
            for layer in self.layers.values():
                for name, times in layer.rows:
                    value = self.model.get_parameter(name).detach()
                    weights[name] = torch.cat([part[: layer.width // 2] for part in value.chunk(times)])
                weights[layer.columns] = self.model.get_parameter(layer.columns).detach()[:, : layer.width // 2]
            plans["thin"] = Plan((), weights)
            shares["thin"] = {n: (layer.width // 2) / layer.width for n, layer in self.layers.items()}
        return plans, shares

    @property
    def _kv(self) -> Any:
        """A plan leaves out the same sites in all calls of a request, so keys that it would write are never read."""
        return "none" if self.decodes else None

    def read_statistics(self) -> None:
        """What leaving out each site costs, and in which order neurons leave."""
        found = self.stages.get("statistics")
        if found is None:
            found = self._statistics()
            self.stages.put("statistics", found)
        self.losses: dict[str, float] = found["losses"]
        self.orders = {n: Elimination(e["order"], e["costs"], e["total"]) for n, e in found["orders"].items()}

    def _statistics(self) -> dict[str, Any]:
        read = self.given[: self.effort.read]
        losses: dict[str, float] = {}
        orders: dict[str, Any] = {}
        names, groups = list(self.layers), []
        while names:
            size, group = 0, []
            while names and (not group or size + self._bytes_of(names[0]) <= _STATISTICS):
                size += self._bytes_of(names[0])
                group.append(names.pop(0))
            groups.append(group)
        for i, group in enumerate(groups or [[]]):
            sums = Curvatures({n: self.layers[n] for n in group}, list(self.free) if i == 0 else [])
            generator = torch.Generator().manual_seed(self.seed)
            for batch in self._track(read, f"gradients ({i + 1} of {len(groups) or 1})"):
                sums.add(self.model, batch, generator)
            losses |= {n: v / max(sums.tokens, 1) for n, v in sums.losses.items()}
            for name in self._track(group, "choosing neurons"):
                layer, curvature = self.layers[name], sums.found.pop(name)
                columns = curvature.metric() @ self.model.get_parameter(layer.columns).detach().double()
                least = min(self._widths(layer))
                made = eliminate(curvature.inputs, columns, least=least)
                orders[name] = {"order": made.order, "costs": made.costs, "total": made.total}
        return {"losses": losses, "orders": orders}

    def _bytes_of(self, name: str) -> int:
        layer = self.layers[name]
        return 4 * (layer.width**2 + self.model.get_parameter(layer.columns).shape[0] ** 2)

    @staticmethod
    def _widths(layer: HiddenLayer) -> list[int]:
        """Widths that an MLP may have, besides its own."""
        step = 32 if layer.width >= 512 else 4
        made = {round(layer.width * k / _PARTS / step) * step for k in range(1, _PARTS)}
        return sorted(w for w in made if 0 < w < layer.width)

    def options(self, site: str) -> list[Option]:
        """All ways to run a site."""
        whole = self.costs.of_site(self.regime, site)
        made = [Option(1.0, 0.0, 0.0)]
        if site in self.layers:
            layer, order = self.layers[site], self.orders[site]
            for width in self._widths(layer):
                share = width / layer.width
                loss = order.error(width) * order.total
                made.append(Option(share, loss, whole - self.costs.of_site(self.regime, site, share)))
        if site in self.losses:
            made.append(Option(0.0, self.losses[site], whole))
        return made

    def make_menu(self, removals: Sequence[float], most_in_a_row: int | None) -> None:
        """The plans, each of which begins where the one before it ended."""
        judge: Judge | None = None
        total = sum(self.costs.of_site(self.regime, name) for name in self.sites)
        shares: dict[str, float] = {}
        plan = Plan()
        for removal in removals:
            ways = {n: [o for o in self.options(n) if o.share <= shares.get(n, 1.0)] for n in self.free}
            chosen = choose(ways, removal * total, most_in_a_row)
            shares = {n: o.share for n, o in chosen.items() if o.share < 1}
            name = f"{removal:.0%}"
            steps = round(self.effort.steps * removal / 0.1)
            found = self.stages.get(name)
            if found is None:
                plan = self._made(plan, shares, steps, name)
                judge = judge or self._judge()
                with self._working(f"{name}: judging"):
                    judgement = judge.judge(plan)
                found = {"weights": plan.weights, "judgement": asdict(judgement)}
                self.stages.put(name, found)
            plan = Plan([n for n, s in shares.items() if s == 0], found["weights"], kv=self._kv)
            removed = sum(o.seconds for o in chosen.values()) / total
            self.menu.append(Entry(name, shares, Judgement(**found["judgement"]), removed, steps, self._kv))
            if found["weights"]:
                self.weights[name] = dict(found["weights"])

    def _made(self, plan: Plan, shares: Mapping[str, float], steps: int, name: str) -> Plan:
        skip = [n for n, s in shares.items() if s == 0]
        widths = {n: round(s * self.layers[n].width) for n, s in shares.items() if s > 0}
        kept = {p for n in widths for p in (self.layers[n].columns, *(r for r, _ in self.layers[n].rows))}
        start = Plan(skip, {n: v for n, v in plan.weights.items() if n in kept})
        with torch.no_grad():
            made = thin(
                self.model, self.given[: self.effort.fitted], self.sites.values(), widths, orders=self.orders,
                start=start, progress=lambda rounds: self._track(rounds, f"{name}: fitting"),
            )  # fmt: skip
        if steps and made.weights:
            made = distill(
                self.model, made, self.given, steps, seed=self.seed,
                progress=lambda rounds: self._track(rounds, f"{name}: training"),
            )  # fmt: skip
        return made

    def _judge(self) -> Judge:
        with self._working("judging the whole model"):
            return Judge(self.model, self.judged)

    # -- the result ---------------------------------------------------------------------------------------------------

    def profile(self, effort: str) -> Profile:
        """All of it."""
        about = {
            "model": type(self.model).__name__, "skipc": skipc.__version__, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "dtype": str(next(self.model.parameters()).dtype), "seed": self.seed, "text": self.text_digest(),
            "tokens": sum(b.tokens for b in self.given), "judged": sum(b.tokens for b in self.judged),
            "error": self.costs.error(self.timings), "minutes": (time.perf_counter() - self.began) / 60,
        }  # fmt: skip
        sites = {
            name: SiteFacts(
                site.kind.value, site.layer, self.losses.get(name),
                {p: v[name] for p, v in self.similarity.items() if name in v},
                {p: v[name] for p, v in self.scale.items() if name in v},
                {w: self.orders[name].error(w) * self.orders[name].total for w in self._widths(self.layers[name])}
                if name in self.layers else {},
            )
            for name, site in self.sites.items()
        }  # fmt: skip
        return Profile(
            effort, about, self.digests, sites, self.costs, self.timings, self.regime, self.menu, self.weights
        )

    # -- progress -----------------------------------------------------------------------------------------------------

    def _track(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        if not self.shown:
            return iter(items)
        from rich.progress import track

        items = list(items)
        return iter(track(items, description=f"{what:<28}", total=len(items)))

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        if not self.shown:
            yield
            return
        from rich.console import Console

        with Console().status(what):
            yield


def _rows(window: torch.Tensor) -> dict[str, torch.Tensor]:
    """A window of text as rows of their own."""
    ids = window.view(_ROWS, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
