"""Profiles: what was measured of a checkpoint, and the plans that were made for it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from skipc.calibration.checkpoint import checkpoint_digest, differing
from skipc.calibration.costs import CostModel, Regime, Timing, actions_of
from skipc.calibration.judging import Judgement
from skipc.ir.errors import PlanError, ProfileError
from skipc.ir.plan import Action, Expectation, Plan
from skipc.ir.program import KVPolicy
from skipc.ir.site import Source
from skipc.runtime.policies.base import Phase

log = logging.getLogger("skipc")

VERSION = 2
_JSON, _TENSORS = "profile.json", "plans.safetensors"


@dataclass(frozen=True)
class SiteFacts:
    """What was measured of one site.

    Attributes:
        kind, layer: as :class:`skipc.Site` has them.
        loss: nats per token that leaving it out costs, as its gradients tell; None where that was not asked.
        similarity: mean cosine of the stream before and after, by phase.
        scale: mean ratio of their norms, by phase.
        widths: neurons that an MLP may keep, or groups of heads that an attention may, and the nats per token that each
            costs.
        ranks: of linear maps in its place, and the nats per token that each costs.
        source: what such maps read; None if there can be none.
    """

    kind: str
    layer: int
    loss: float | None
    similarity: Mapping[str, float] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[int, float] = field(default_factory=dict)
    ranks: Mapping[int, float] = field(default_factory=dict)
    source: Source | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SiteFacts:
        """From plain data."""
        found = {k: v for k, v in record.items() if k not in ("widths", "ranks", "source")}
        widths, ranks = ({int(k): v for k, v in record[name].items()} for name in ("widths", "ranks"))
        return cls(**found, widths=widths, ranks=ranks, source=Source(**record["source"]) if record["source"] else None)


@dataclass(frozen=True)
class Entry:
    """One plan of the menu.

    Attributes:
        name: of the plan in the profile.
        actions: what it does with each site; those not named run as they are.
        judgement: what it loses on text that it was not made from.
        removed: share of the sublayers' time that it saves in the regime that it was made for.
        steps: of distillation.
        kv: see :class:`skipc.Plan`.
    """

    name: str
    actions: Mapping[str, Action]
    judgement: Judgement
    removed: float
    steps: int = 0
    kv: KVPolicy | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Entry:
        """From plain data."""
        parts = {"actions": actions_of(record["actions"]), "judgement": Judgement(**record["judgement"])}
        return cls(**{**record, **parts})

    def plan(
        self,
        tensors: Mapping[str, torch.Tensor],
        sources: Mapping[str, Source],
        expected: Expectation | None = None,
    ) -> Plan:
        """It as a plan, with tensors as :attr:`Plan.trained` names them."""
        skip = [site for site, action in self.actions.items() if action.kind == "skip"]
        kinds = {site: kind for site, action in self.actions.items() if (kind := action.replacement) is not None}
        replace = {site: kind.of(site, sources[site], tensors) for site, kind in kinds.items()}
        weights = {n: t for n, t in tensors.items() if "/" not in n}
        return Plan(skip, weights, expected, self.kv, replace)


def told(actions: Mapping[str, Action]) -> str:
    """Actions in a few words."""
    counts = Counter(a.kind for a in actions.values())
    words = {"thin": "thin", "lowrank": "low rank", "affine": "affine", "scale": "scaled", "skip": "left out"}
    return ", ".join(f"{counts[k]} {word}" for k, word in words.items() if counts[k]) or "all whole"  # type: ignore[index]


@dataclass
class Profile:
    """What :func:`skipc.calibrate` found out about a checkpoint, and a menu of plans for it.

    Attributes:
        effort: ``quick`` or ``thorough``.
        about: where it was made: model, versions, machine, text, seed, minutes.
        digests: of the checkpoint's parameters, by name.
        sites: by name, in order of execution.
        costs: what calls take.
        timings: of real calls, to which ``costs`` was fitted.
        regime: what the menu was made for.
        menu: plans, the least loss first.
        tensors: of the plans, by the plan's name, as :attr:`Plan.trained` names them.
    """

    effort: str
    about: dict[str, Any]
    digests: dict[str, str]
    sites: dict[str, SiteFacts]
    costs: CostModel
    timings: list[Timing]
    regime: Regime
    menu: list[Entry]
    tensors: dict[str, dict[str, torch.Tensor]]

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan(
        self,
        budget: float | None = None,
        speedup: float | None = None,
        *,
        phase: Phase | None = None,
        batch: int | None = None,
        length: int | None = None,
        cache: int | None = None,
    ) -> Plan:
        """The best plan of the menu for calls of a kind; by default of the kind that the profile was made for.

        Args:
            budget: loss that may be had (:attr:`Judgement.loss`; 0.02 is a perplexity 2 % higher). The fastest plan
                that keeps to it is taken; none at all, with a warning, if all lose more.
            speedup: speed over skipc's exact mode that must be had. The plan that loses least is taken.
            phase: ``prefill`` or ``decode``.
            batch: rows.
            length: tokens in each row of the call.
            cache: tokens that they attend to, beside themselves.

        Raises:
            PlanError: if no plan is fast enough, or neither or both of budget and speedup are given.
            ProfileError: if no call of that phase was measured.
        """
        if (budget is None) == (speedup is None):
            raise PlanError("ask for a budget or for a speedup")
        regime = self._regime(phase, batch, length, cache)
        speeds = {entry.name: self.speedup(entry, regime) for entry in self.menu}
        if budget is not None:
            fit = [e for e in self.menu if e.judgement.loss <= budget and speeds[e.name] > 1]
            if not fit:
                least = min(self.menu, key=lambda e: e.judgement.loss, default=None)
                why = f"; the least is {least.judgement.loss:.1%}" if least else ""
                log.warning("no plan of the profile loses %.1f %% or less%s: everything runs", budget * 100, why)
                return Plan()
            entry = max(fit, key=lambda e: speeds[e.name])
        else:
            fast = [e for e in self.menu if speeds[e.name] >= speedup]  # type: ignore[operator]
            if not fast:
                best = max(speeds.values(), default=1.0)
                raise PlanError(f"no plan of the profile reaches {speedup}x in {regime}; the fastest has {best:.2f}x")
            entry = min(fast, key=lambda e: e.judgement.loss)
        return self.plan_of(entry, regime)

    def plan_of(self, entry: Entry, regime: Regime | None = None) -> Plan:
        """An entry of the menu as a plan."""
        expected = Expectation(
            entry.name, entry.judgement.loss, entry.judgement.low, entry.judgement.high, self.speedup(entry, regime)
        )
        sources = {name: facts.source for name, facts in self.sites.items() if facts.source is not None}
        return entry.plan(self.tensors.get(entry.name, {}), sources, expected)

    def speedup(self, entry: Entry, regime: Regime | None = None) -> float:
        """Speed over skipc's exact mode, by the cost model.

        Raises:
            ProfileError: if no call of that phase was measured.
        """
        regime = regime or self.regime
        if regime.phase not in self.costs.coefficients:
            known = ", ".join(self.costs.coefficients) or "none"
            raise ProfileError(f"the profile has no measured calls of phase {regime.phase!r} (it has {known})")
        return self.costs.seconds(regime) / self.costs.seconds(regime, entry.actions)

    def _regime(self, phase: Phase | None, batch: int | None, length: int | None, cache: int | None) -> Regime:
        base = self.regime
        phase = phase or base.phase
        tokens = length or (1 if phase == "decode" else max(base.tokens, 128))
        before = cache if cache is not None else base.context - base.tokens if phase == base.phase else 0
        return Regime(phase, batch or base.batch, tokens, before + tokens)

    # -- the checkpoint -----------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> str:
        """Digest of the checkpoint."""
        return checkpoint_digest(self.digests)

    def check(self, model: torch.nn.Module) -> None:
        """Make sure that ``model`` is the checkpoint that this is about.

        Raises:
            ProfileError: if it is another one.
        """
        own = dict(model.named_parameters())
        missing = sorted(set(self.digests) ^ set(own))
        self.refuse(missing or differing(self.digests, own.items()))

    def refuse(self, wrong: Sequence[str]) -> None:
        """Raise an error about these parameters, if there are any.

        Raises:
            ProfileError: naming one of them.
        """
        if wrong:
            raise ProfileError(
                f"the profile is for another checkpoint ({self.about.get('model', '?')}, {self.checkpoint}): "
                f"{len(wrong)} parameters differ, {wrong[0]} for one; make one for this model with skipc.calibrate"
            )

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``profile.json`` and ``plans.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{p}/{n}": v.contiguous() for p, own in self.tensors.items() for n, v in own.items()}
        save_file(tensors, folder / _TENSORS)
        record = {
            "version": VERSION,
            "effort": self.effort,
            "about": self.about,
            "checkpoint": self.checkpoint,
            "parameters": self.digests,
            "regime": asdict(self.regime),
            "sites": {name: asdict(facts) for name, facts in self.sites.items()},
            "costs": self.costs.to_dict(),
            "timings": [asdict(t) for t in self.timings],
            "menu": [asdict(entry) for entry in self.menu],
            "plans": _file_digest(folder / _TENSORS),
        }
        record = json.loads(json.dumps(record))  # keys become text, as they will be read
        record["digest"] = _record_digest(record)
        (folder / _JSON).write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            ProfileError: if it is no profile, of another version, or damaged.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            record = json.loads((folder / _JSON).read_text())
        except FileNotFoundError:
            raise ProfileError(f"there is no profile in {folder}: skipc.calibrate(...).save({str(folder)!r})") from None
        except (ValueError, OSError) as error:
            raise ProfileError(f"{folder / _JSON} is damaged: {error}") from None
        if not isinstance(record, dict) or "version" not in record:
            raise ProfileError(f"{folder / _JSON} is no profile")
        if record["version"] != VERSION:
            raise ProfileError(
                f"{folder} is a profile of version {record['version']}; this release reads {VERSION}: calibrate again"
            )
        if record.pop("digest", None) != _record_digest(record):
            raise ProfileError(f"{folder / _JSON} is damaged, or was edited: its contents do not fit its digest")
        try:
            sound = _file_digest(folder / _TENSORS) == record["plans"]
        except FileNotFoundError:
            raise ProfileError(f"{folder / _TENSORS} is missing") from None
        if not sound:
            raise ProfileError(f"{folder / _TENSORS} is damaged, or belongs to another profile")
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / _TENSORS).items():
            plan, _, name = key.partition("/")
            tensors.setdefault(plan, {})[name] = value
        return cls(
            effort=record["effort"],
            about=record["about"],
            digests=record["parameters"],
            sites={n: SiteFacts.from_dict(f) for n, f in record["sites"].items()},
            costs=CostModel.from_dict(record["costs"]),
            timings=[Timing.from_dict(t) for t in record["timings"]],
            regime=Regime(**record["regime"]),
            menu=[Entry.from_dict(e) for e in record["menu"]],
            tensors=tensors,
        )

    def __str__(self) -> str:
        lines = [
            f"profile of {self.about.get('model', '?')} ({self.checkpoint}), {self.effort}, for {self.regime}",
            f"  {'plan':<8}  {'speed':>6}  {'removed':>7}  {'sites':<36}  loss on other text",
        ]
        for e in self.menu:
            lines.append(
                f"  {e.name:<8}  {self.speedup(e):>5.2f}x  {e.removed:>7.0%}  {told(e.actions):<36}  {e.judgement}"
            )
        return "\n".join(lines)


@functools.lru_cache(maxsize=4)
def _loaded(folder: str, changed: float) -> Profile:
    return Profile.load(folder)


_checked: dict[str, weakref.WeakValueDictionary[int, torch.Tensor]] = {}  # parameters found to be a profile's
_plans: dict[tuple[str, float, float], Plan] = {}  # one for each budget: programs know plans by identity


def plan_for(folder: str, budget: float, weights: Mapping[str, torch.Tensor]) -> Plan:
    """The plan of a saved profile for calls of the kind that it was made for, after a look at the parameters of a
    graph, by name.

    Raises:
        ProfileError: if the profile cannot be read, or is for another checkpoint.
    """
    path = Path(folder) / _JSON
    changed = path.stat().st_mtime if path.exists() else 0.0
    profile = _loaded(folder, changed)
    seen = _checked.setdefault(f"{folder} {profile.checkpoint}", weakref.WeakValueDictionary())
    fresh = {n: v for n, v in weights.items() if n in profile.digests and seen.get(id(v)) is not v}
    strange = sorted(n for n, v in weights.items() if isinstance(v, torch.nn.Parameter) and n not in profile.digests)
    profile.refuse(strange or differing(profile.digests, fresh.items()))
    seen.update({id(v): v for v in fresh.values()})
    key = (folder, changed, budget)
    if key not in _plans:
        _plans[key] = profile.plan(budget=budget)
    return _plans[key]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
