"""Prefill in which each token decides for itself: SmolLM2, with a share of the tokens sent past all sites of the middle
layers, as a router would. Attentions attend from the others alone (``compact_queries``) or from all and are blended.

Run: python benchmarks/token_wise.py
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import click
import torch
from common import check_load, console, keep_freed_memory, save
from rich.table import Table

import skipc
from skipc.calibration.timing import ratio
from skipc.loading import load_smollm2

SHARES = [1.0, 0.75, 0.5, 0.25, 0.0]


class Share(skipc.Policy):
    """A fixed share of the tokens runs through the sites of all layers but the first and last two."""

    def __init__(self, share: float, tokens: int):
        self.rows = torch.rand(1, tokens, generator=torch.Generator().manual_seed(0)) < share

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        last = max(site.layer for site in call.sites)
        routed = [site.name for site in call.sites if 2 <= site.layer <= last - 2]
        return skipc.GateTable.of(call.names, routed=routed, measures=False)

    def route(self, call: skipc.Call, site: str, stream: torch.Tensor) -> torch.Tensor:
        return self.rows


@click.command()
@click.option("--dtype", default="float32", show_default=True)
@click.option("--prompt", default=2048, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(dtype: str, prompt: int, rounds: int, threads: int, path: str | None) -> None:
    """Measure."""
    from transformers import StaticCache

    keep_freed_memory()
    torch.set_num_threads(threads)
    check_load()
    model, _ = load_smollm2(getattr(torch, dtype))
    ids = torch.randint(3, 4000, (1, prompt), generator=torch.Generator().manual_seed(0))
    compiled = {on: skipc.compile(model, fullgraph=True, on_error="raise", compact_queries=on) for on in (True, False)}
    kv = StaticCache(config=model.config, max_cache_len=prompt)
    model(ids[:, :1], past_key_values=kv)
    runs: dict[str, tuple[Any, float | None]] = {"exact": (compiled[True], None)}
    runs |= {f"{s:.0%}, {'compacted' if on else 'blended'}": (c, s) for s in SHARES for on, c in compiled.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, (call, share) in runs.items():
            kv.reset()
            with nullcontext() if share is None else call.session(policy=Share(share, prompt)):
                start = time.perf_counter()
                call(ids, past_key_values=kv, logits_to_keep=1)
            if i:
                times[name].append(time.perf_counter() - start)
    table = Table(title=f"prefill of {prompt} tokens ({dtype}), by how many run through 26 of 30 layers")
    for column in ("tokens", "ms", "over exact"):
        table.add_column(column, justify="right")
    record = {}
    for name, seconds in times.items():
        over, low, high = ratio(seconds, times["exact"])
        record[name] = {"ms": statistics.median(seconds) * 1e3, "ratio": over, "low": low, "high": high}
        table.add_row(name, f"{record[name]['ms']:.0f}", f"{over:.3f} [{low:.3f}, {high:.3f}]")
    console.print(table)
    save(path, record)


if __name__ == "__main__":
    main()
