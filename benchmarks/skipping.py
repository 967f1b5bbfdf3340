"""Time against the share of the work that is skipped: SmolLM2, decode steps and prefills, by batch.

The share is that of the skipped regions' own time, taken step by step beforehand. (Of a decode step at batch 1, whose
sublayers run joined, steps by themselves take half as long again: benchmarks/decode_step.py measures them joined.)
Run: python benchmarks/skipping.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click
import torch
from common import check_load, console, keep_freed_memory, save
from rich.table import Table

import skipc
from skipc.loading import load_smollm2

SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]


def sets_of(names: list[str]) -> dict[float, list[str]]:
    """Evenly spread subsets of the sites, by their share."""
    return {s: [n for i, n in enumerate(names) if int((i + 1) * s) > int(i * s)] for s in SHARES}


def turns(
    compiled: Any, run: Callable[[], Any], sets: dict[float, list[str]], rounds: int, burst: int
) -> dict[float, float]:
    """Median milliseconds by share. Plans take turns; the first call of a turn is not counted."""
    times: dict[float, list[float]] = {share: [] for share in sets}
    for i in range(rounds + 1):
        for share, skip in sets.items():
            with compiled.session(skip=skip, kv="none") if skip else nullcontext():
                for j in range(burst):
                    start = time.perf_counter()
                    run()
                    if i and j:
                        times[share].append(time.perf_counter() - start)
    return {share: statistics.median(t) * 1e3 for share, t in times.items()}


@torch.no_grad()
def measure(dtype: str, batch: int, prompt: int, cache: int, rounds: int) -> dict[str, dict[str, Any]]:
    """For each phase and kind of site: milliseconds by share, and what the sites take by themselves."""
    from skipc.runtime.decoder import Decoder
    from transformers import StaticCache

    model, _ = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    decoder = Decoder(model, compiled, batch, cache, padded=False)
    tokens = torch.full((batch,), 35)
    kv = StaticCache(config=model.config, max_cache_len=cache)
    ids = torch.randint(3, 4000, (batch, prompt // batch), generator=torch.Generator().manual_seed(0))
    live = cache - 8

    def step() -> None:
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(live)
        decoder.decode(tokens, watched=False)

    def prefill() -> None:
        for layer in kv.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(0)
        compiled(ids, past_key_values=kv, logits_to_keep=1)

    found: dict[str, dict[str, Any]] = {}
    for phase, run, burst in (("decode", step, 4), ("prefill", prefill, 2)):
        for _ in range(4):
            run()
        with compiled.session(measure=True) as session:
            for _ in range(3):
                run()
        seconds = session.stats().seconds
        for part in ("mlp", "self_attn", "both"):
            names = [n for n in seconds if part == "both" or n.endswith(part)]
            sets = sets_of(names)
            found[f"{phase} {part}"] = {
                "ms": turns(compiled, run, sets, rounds if phase == "decode" else max(3, rounds // 4), burst),
                "own_ms": {s: sum(seconds[n] for n in skip) * 1e3 for s, skip in sets.items()},
            }
    return found


@click.command()
@click.option("--dtype", default="float32", show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=[1, 4, 8], show_default=True)
@click.option("--prompt", default=512, show_default=True, help="Tokens of a prefill, of all rows together.")
@click.option("--cache", default=2048, show_default=True)
@click.option("--rounds", default=12, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@click.option("--plot", help="Write a picture here.")
def main(
    dtype: str, batches: Any, prompt: int, cache: int, rounds: int, threads: int, path: str | None, plot: str | None
) -> None:
    """Measure."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    check_load()
    record: dict[str, Any] = {}
    table = Table(
        title=f"milliseconds by share of the sites skipped, kv='none' ({dtype}, cache {cache}, prompt {prompt})"
    )
    for column in ("batch", "phase", "sites", *(f"{s:.0%}" for s in SHARES), "saved of their own time"):
        table.add_column(column, justify="right")
    for batch in batches:
        for name, found in measure(dtype, batch, prompt, cache, rounds).items():
            record[f"batch {batch} {name}"] = found
            saved = (found["ms"][0.0] - found["ms"][1.0]) / found["own_ms"][1.0]
            table.add_row(str(batch), *name.split(), *(f"{ms:.1f}" for ms in found["ms"].values()), f"{saved:.0%}")
        save(path, record)
    console.print(table)
    if plot:
        _plot(record, plot)


def _plot(record: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, phase in zip(axes, ("decode", "prefill"), strict=True):
        for name, found in record.items():
            if f" {phase} " not in name:
                continue
            base = found["ms"][0.0]
            shares = [found["own_ms"][s] / base for s in SHARES]
            axis.plot(shares, [found["ms"][s] / base for s in SHARES], "o-", label=name.replace(f" {phase}", ","))
        axis.plot([0, 1], [1, 0], "k:", label="in proportion")
        axis.set_xlabel("skipped sites' own time, of a step with nothing skipped")
        axis.set_ylabel("time of a step, nothing skipped = 1")
        axis.set_title(phase)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
