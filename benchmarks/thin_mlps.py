"""What thinner MLPs cost and save: SmolLM2 with a share of the neurons of every MLP, chosen and refitted on one half of
a text and judged on the other, before and after a short distillation; and what a decode step then takes.

Run: python benchmarks/thin_mlps.py
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import check_load, console, keep_freed_memory, ratio, save
from rich.table import Table

import skipc
from skipc.calibration.batches import batches_of, call_on
from skipc.calibration.distillation import distill
from skipc.calibration.text import english_text, token_windows
from skipc.calibration.thinning import thin
from skipc.smollm2 import load_smollm2


@torch.no_grad()
def judged(model: Any, windows: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Nats lost per token of each window, and the share of tokens chosen as the model does: [windows, 2]."""
    rows = []
    for batch, ids in zip(batches_of(model, windows), windows, strict=True):
        full, ours = (call_on(model, batch, w).logits[0, :-1] for w in ({}, weights))
        lost = F.cross_entropy(ours, ids[0, 1:]) - F.cross_entropy(full, ids[0, 1:])
        rows.append(torch.stack([lost, (full.argmax(-1) == ours.argmax(-1)).float().mean()]))
    return torch.stack(rows)


def told(found: torch.Tensor) -> tuple[float, float, float, float]:
    """Perplexity over the model's, with its bootstrap 95 % interval over windows, and tokens in agreement."""
    draws = torch.randint(len(found), (2000, len(found)), generator=torch.Generator().manual_seed(0))
    low, high = found[draws, 0].mean(1).quantile(torch.tensor([0.025, 0.975])).exp().tolist()
    return math.exp(float(found[:, 0].mean())), low, high, float(found[:, 1].mean())


@torch.no_grad()
def decode_times(model: Any, plans: Mapping[str, skipc.Plan | None], rounds: int) -> dict[str, list[float]]:
    """Seconds of decode steps, plans taking turns."""
    from skipc.runtime.generation import Decoder

    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    decoder = Decoder(model, compiled, 1, 512, padded=False)
    token = torch.full((1,), 35)
    times: dict[str, list[float]] = {name: [] for name in plans}
    for i in range(rounds + 2):
        for name, plan in plans.items():
            with compiled.session(plan=plan) if plan is not None else nullcontext():
                for j in range(8):
                    for layer in decoder.cache.layers:
                        layer.cumulative_length.fill_(256)
                    start = time.perf_counter()
                    decoder.decode(token, watched=False)
                    if i >= 2 and j >= 2:
                        times[name].append(time.perf_counter() - start)
    return times


@click.command()
@click.option("--share", "shares", multiple=True, default=[0.75], show_default=True, help="Neurons kept.")
@click.option(
    "--windows", default=32, show_default=True, help="Windows of 512 tokens to fit on; 16 others to judge by."
)
@click.option("--steps", default=96, show_default=True, help="Of distillation.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
def main(shares: Any, windows: int, steps: int, rounds: int, threads: int, path: str | None) -> None:
    """Measure."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    check_load()
    model, tokenizer = load_smollm2()
    text = english_text()
    half = len(text) // 2
    given = batches_of(model, token_windows(tokenizer, text[:half], 512, windows))
    others = token_windows(tokenizer, text[half:], 512, 16)
    sites = skipc.find_sites(model, others[0], use_cache=False).sites
    record: dict[str, Any] = {}
    plans: dict[str, skipc.Plan | None] = {"exact": None}
    table = Table(title=f"SmolLM2 with thinner MLPs, text that it was not fitted on ({windows * 512} tokens fitted)")
    for column in ("neurons kept", "fit", "perplexity ratio", "same token", "minutes"):
        table.add_column(column, justify="right")
    for share in shares:
        start = time.perf_counter()
        plan = thin(model, given, sites, {s.name: round(share * s.hidden.width) for s in sites if s.hidden})
        for fit in ("refit", f"{steps} steps of distillation"):
            if fit != "refit":
                plan = distill(model, plan, given, steps)
            minutes = (time.perf_counter() - start) / 60
            over, low, high, same = told(judged(model, others, plan.weights))
            record[f"{share} {fit}"] = {"ratio": over, "low": low, "high": high, "same": same, "minutes": minutes}
            table.add_row(f"{share:.0%}", fit, f"{over:.3f} [{low:.3f}, {high:.3f}]", f"{same:.0%}", f"{minutes:.1f}")
            console.print(record[f"{share} {fit}"])
        plans[f"{share:.0%}"] = plan
    console.print(table)
    times = decode_times(model, plans, rounds)
    for name, seconds in times.items():
        over, low, high = ratio(seconds, times["exact"])
        record[f"decode {name}"] = {"ms": statistics.median(seconds) * 1e3, "ratio": over, "low": low, "high": high}
        console.print(f"decode, {name}: {statistics.median(seconds) * 1e3:.2f} ms, {over:.3f} [{low:.3f}, {high:.3f}]")
    save(path, record)


if __name__ == "__main__":
    main()
