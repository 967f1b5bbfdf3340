"""Perplexity, similarities and costs of sites, on text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from skipc.model import CompiledModel


@torch.no_grad()
def perplexity(model: Any, windows: Iterable[torch.Tensor]) -> float:
    """Perplexity of a causal language model over windows of int64 [batch, tokens], each judged on its own."""
    loss, count = 0.0, 0
    for ids in windows:
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(loss / count)


@dataclass(frozen=True)
class SiteMeasurement:
    """What one site costs and changes on the text it was measured on."""

    name: str
    kind: str
    layer: int
    milliseconds: float  # one call at the measured length
    saved: float  # milliseconds of it that skipping saves: under kv="project", keys and values are still computed
    similarity: float  # fp32 cosine of the residual stream before and after the site, mean over tokens
    loss: float  # perplexity without the site over perplexity with it, minus 1


@torch.no_grad()
def measure_sites(
    compiled: CompiledModel, windows: Sequence[torch.Tensor], progress: Any = None
) -> list[SiteMeasurement]:
    """Measure each site of a compiled causal language model: its time and similarity, and the loss of skipping it
    alone. No compilation happens but the first. ``progress`` wraps an iterable, as ``tqdm`` or ``rich`` do."""
    from skipc.explanation import find_sites

    sites = find_sites(compiled.model, windows[0], use_cache=False)
    base = perplexity(compiled, windows)
    with compiled.session(measure=True) as session:
        perplexity(compiled, windows)
    stats = session.stats()
    measured = []
    for site in progress(sites.sites) if progress else sites.sites:
        with compiled.session(skip={site.name}, measure=True) as skipping:
            without = perplexity(compiled, windows)
        took = stats.seconds[site.name] * 1e3
        measured.append(
            SiteMeasurement(
                site.name,
                site.kind.value,
                site.layer,
                took,
                took - skipping.stats().seconds[site.name] * 1e3,
                stats.similarity.get(site.name, math.nan),
                without / base - 1,
            )
        )
    return measured
