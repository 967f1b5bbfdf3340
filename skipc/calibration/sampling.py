"""Times and similarities of a model's real calls: what a cost model is fitted to."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from skipc.calibration.costs import Regime, Timing
from skipc.calibration.similarity import measure_similarity
from skipc.calibration.subject import Subject
from skipc.calibration.thinning import thin_weights
from skipc.calibration.timing import time_calls
from skipc.ir.errors import PlanError
from skipc.ir.plan import SKIP, Action, Plan
from skipc.ir.program import KVPolicy
from skipc.ir.replacement import LowRank
from skipc.model import compile as compile_model

log = logging.getLogger("skipc")

_FEWER_HEADS = "fewer heads"  # a timed plan, which some models' caches do not take
_PREFILLS = (64, 256)  # tokens of the prefills that are timed beside decode steps
_SWEEPS = 3
_RANK = 32  # of the replacements that are timed
_SAMPLED = 4  # batches that similarities are taken on
_PROMPT, _NEW = 128, 16  # tokens of the prompts that similarities of decode steps are taken behind, and of steps


def sample_calls(subject: Subject, regime: Regime, kv: KVPolicy | None, rounds: int) -> dict[str, Any]:
    """Timings of whole calls, of calls without some sites and with thin ones, in ``regime`` and near it, mean
    similarities and scales of all sites by phase, and whether attentions run with fewer heads: as plain data."""
    compiled = compile_model(subject.model, on_error="raise")
    plans, actions = timed_plans(subject, kv)
    regimes = [regime]
    if subject.decodes:
        nearer = max(16, regime.context // 4)
        regimes = [Regime("decode", regime.batch, 1, c) for c in dict.fromkeys((nearer, regime.context))]
        regimes += [Regime("prefill", 1, t, t) for t in _PREFILLS]

    def timed() -> list[dict[str, Any]]:
        seconds: dict[tuple[Regime, str], list[float]] = {}
        for _ in range(_SWEEPS):  # so that all kinds of calls see the machine's slow minutes
            for sampled in regimes:
                found = time_calls(compiled, sampled, plans, -(-rounds // _SWEEPS), subject.given[0])
                for name, some in found.items():
                    seconds.setdefault((sampled, name), []).extend(some)
        medians = {key: statistics.median(some) for key, some in seconds.items()}
        return [asdict(Timing(regime, actions[name], taken)) for (regime, name), taken in medians.items()]

    try:
        timings = timed()
    except PlanError as error:
        if plans.pop(_FEWER_HEADS, None) is None:
            raise
        log.info("attention keeps all its heads: %s", error)
        subject.keep_heads()
        timings = timed()
    similarity: dict[str, Mapping[str, float]] = {}
    scale: dict[str, Mapping[str, float]] = {}
    few = subject.given[:_SAMPLED]
    made = measure_similarity(compiled, [b.inputs for b in few], ("prefill",))
    similarity["prefill"], scale["prefill"] = made.similarity, made.scale
    if subject.decodes:
        prompts = [b.inputs["input_ids"][:, :_PROMPT] for b in few]
        made = measure_similarity(compiled, prompts, ("decode",), generate=_NEW)
        similarity["decode"], scale["decode"] = made.similarity, made.scale
    heads = _FEWER_HEADS in plans
    return {"timings": timings, "similarity": similarity, "scale": scale, "heads": heads}


def timed_plans(subject: Subject, kv: KVPolicy | None) -> tuple[dict[str, Plan | None], dict[str, dict[str, Action]]]:
    """Plans whose times tell what each kind of site takes, and what they do with each site: all run, none of a kind,
    half of the sites of a kind, MLPs of half their width, attentions of half their heads, and all that can be
    replaced."""
    plans: dict[str, Plan | None] = {"whole": None}
    actions: dict[str, dict[str, Action]] = {"whole": {}}
    for kind in sorted({s.kind.value for s in subject.sites.values()}):
        names = [n for n, s in subject.sites.items() if s.kind.value == kind]
        for label, some in ((f"no {kind}", names), (f"half {kind}", names[::2])):
            plans[label], actions[label] = Plan(some, kv=kv), dict.fromkeys(some, SKIP)
    layers = subject.layers
    for label, thinned in (
        ("thin", {n: layer for n, layer in layers.items() if layer.size == 1}),
        (_FEWER_HEADS, {n: layer for n, layer in layers.items() if layer.size > 1}),
    ):
        if thinned:
            weights: dict[str, torch.Tensor] = {}
            for layer in thinned.values():
                weights |= thin_weights(subject.model, layer, torch.arange(layer.width // 2))
            plans[label] = Plan((), weights)
            actions[label] = {n: Action("thin", layer.width // 2) for n, layer in thinned.items()}
    sources = {n: s.source for n, s in subject.free.items() if s.source is not None}
    if sources:
        zeros = {
            n: LowRank(s, torch.zeros(_RANK, s.width), torch.zeros(s.width, _RANK), torch.zeros(s.width))
            for n, s in sources.items()
        }
        plans["replaced"] = Plan(kv=kv, replace=zeros)
        actions["replaced"] = dict.fromkeys(sources, Action("lowrank", _RANK))
    return plans, actions
