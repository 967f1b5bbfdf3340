"""A plan out of actions: thin MLPs and replacements, fitted in sequence, so that later ones see earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from skipc.calibration.batches import Batch, call_on, device_of, hooked, in_half
from skipc.calibration.replacing import SiteMoments, fit
from skipc.calibration.thinning import (
    Elimination,
    SecondMoments,
    eliminate,
    hidden_layers,
    parameter,
    refit,
    thin_weights,
)
from skipc.ir.errors import PlanError, UnknownSiteError
from skipc.ir.plan import Action, Plan
from skipc.ir.program import KVPolicy
from skipc.ir.site import Site


@torch.no_grad()
def fit_plan(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    sites: Iterable[Site],
    actions: Mapping[str, Action],
    groups: int = 2,
    ridge: float = 1e-3,
    orders: Mapping[str, Elimination] | None = None,
    metrics: Mapping[str, torch.Tensor] | None = None,
    start: Plan | None = None,
    kv: KVPolicy | None = None,
    progress: Any = None,
) -> Plan:
    """A plan that does ``actions``.

    Args:
        model: in evaluation mode; left as it is.
        batches: text to fit on.
        sites: of the model, from :func:`skipc.find_sites`.
        actions: by site; sites not named run as they are.
        groups: how many passes over the batches: sites of one group see none of the others.
        ridge: of the fits, relative to the mean second moment.
        orders: in which neurons leave, by site; found on the way where there is none.
        metrics: of errors, by site; see :func:`skipc.calibration.replacing.fit`.
        start: a plan to begin with, of whose tensors those of the same shapes are kept and its thin MLPs are made
            thinner; with ``orders``, by the same ones.
        kv: of the plan.
        progress: wraps an iterable, as ``tqdm`` or ``rich`` do.

    Raises:
        UnknownSiteError, PlanError: for sites to which that cannot be done, or that no batch came to.
    """
    known = {site.name: site for site in sites}
    for name in sorted(actions):
        if name not in known:
            raise UnknownSiteError(name, list(known))
        if actions[name].replacement is not None and known[name].source is None:
            raise PlanError(f"{name} cannot be replaced: no module gives what it reads")
    start = start or Plan()
    skip = [n for n, a in actions.items() if a.kind == "skip"]
    layers = hidden_layers(known.values(), [n for n, a in actions.items() if a.kind == "thin"])
    replaced = {n for n, a in actions.items() if a.replacement is not None}
    sources = {n: s.source for n, s in known.items() if n in replaced and s.source is not None}
    parameters = {p for layer in layers.values() for p in (layer.columns, *(r for r, _ in layer.rows))}
    weights = {n: v for n, v in start.weights.items() if n in parameters}
    replace = {n: r for n, r in start.replace.items() if n in sources and Action.of(r) == actions[n]}
    now = {name: parameter(model, layer.columns, weights).shape[1] // layer.size for name, layer in layers.items()}
    for name, layer in layers.items():
        if not 1 <= actions[name].size <= now[name]:
            what = "neurons" if layer.size == 1 else "groups of heads"
            raise PlanError(f"{name} has {now[name]} {what}, of which 1 or more are kept, not {actions[name].size}")
    for name, source in sources.items():
        if actions[name].kind == "lowrank" and not 1 <= actions[name].size <= source.width:
            raise PlanError(f"{name} is of width {source.width}, so a rank of {actions[name].size} makes no sense")
    waiting = [
        n for n in known
        if (n in layers and actions[n].size < now[n]) or (n in sources and n not in replace)
    ]  # fmt: skip
    size = -(-len(waiting) // groups) or 1
    rounds = [waiting[i : i + size] for i in range(0, len(waiting), size)]
    for members in progress(rounds) if progress else rounds:
        neurons = SecondMoments({n: layers[n] for n in members if n in layers})
        whole = SiteMoments({n: sources[n] for n in members if n in sources})
        plan = Plan(skip, weights, kv=kv, replace=replace)
        for batch in batches:
            hooks = [*neurons.hooks(model, batch), *whole.hooks(model, batch)]
            with hooked(hooks), in_half(device_of(model)):
                call_on(model, batch, plan)
        for name in members:
            if name not in neurons.sums and name not in whole.found:
                raise PlanError(f"{name} did not run on any of the batches")
            if name in sources:
                found = fit(sources[name], whole.found.pop(name), (metrics or {}).get(name), ridge)
                replace[name] = found.replacement(actions[name], next(model.parameters()).dtype)
                continue
            layer, moments, width = layers[name], neurons.sums.pop(name), actions[name].size
            columns = parameter(model, layer.columns, weights)
            if orders is not None and name in orders:
                kept = torch.searchsorted(orders[name].kept(now[name]), orders[name].kept(width))
            else:
                kept = eliminate(moments, columns, ridge, width, layer.size).kept(width)
            fitted = refit(moments, columns, layer.channels(kept), ridge)
            weights |= thin_weights(model, layer, kept, fitted, weights)
    return Plan(skip, weights, kv=kv, replace=replace)
