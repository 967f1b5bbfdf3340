"""What open gates cost while every site runs: SmolLM2 decode steps and prefills under policies that never skip.

Peers take turns of some calls in one process; ratios are to exact mode, which has no session at all.
Run: python benchmarks/gates.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import check_load, console, keep_freed_memory, save
from rich.table import Table

import skipc
from skipc.calibration.timing import ratio
from skipc.loading import load_smollm2

POLICIES: dict[str, Callable[[], skipc.Policy] | None] = {
    "exact": None,
    "exact again": None,
    "observe": skipc.Observe,
    "ffn_skip": lambda: skipc.FFNSkip(2.0, warmup=0),
    "early_exit": lambda: skipc.EarlyExit(2.0),
    "lagged": lambda: skipc.Lagged(2.0, warmup=1),
    "static": lambda: skipc.Static(()),
}


def turns(compiled: Any, run: Callable[[], Any], rounds: int, burst: int, phase: str) -> dict[str, list[float]]:
    """Seconds of each call, by policy. The first call of a turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    for i in range(rounds + 2):
        for name, policy in POLICIES.items():
            session = compiled.session(policy=policy()) if policy else None
            if session is not None:
                session.__enter__()
                session.phase = phase
            for j in range(burst):
                start = time.perf_counter()
                run()
                if i >= 2 and (j > 0 or burst == 1):
                    times[name].append(time.perf_counter() - start)
            if session is not None:
                session.__exit__(None, None, None)
                assert not sum(session.stats().skipped.values())
    return times


@torch.no_grad()
def measure(dtype: str, batch: int, prompt: int, cache: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of decode steps and of prefills."""
    from skipc.runtime.decoder import Decoder
    from transformers import StaticCache

    model, _ = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    decoder = Decoder(model, compiled, batch, cache, padded=False)
    tokens = torch.full((batch,), 35)

    def step() -> None:
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(256)
        decoder.decode(tokens, watched=False)

    for _ in range(4):
        step()
    found = {"decode": turns(compiled, step, rounds, 6, "decode")}
    kv = StaticCache(config=model.config, max_cache_len=cache)
    ids = torch.randint(3, 4000, (batch, prompt), generator=torch.Generator().manual_seed(0))

    def prefill() -> None:
        for layer in kv.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(0)
        compiled(ids, past_key_values=kv, logits_to_keep=1)

    prefill()
    prefill()
    found["prefill"] = turns(compiled, prefill, max(4, rounds // 4), 2, "prefill")
    found["decode, cond"] = beside_cond(model, compiled, batch, cache, rounds)
    return found


def beside_cond(model: Any, compiled: Any, batch: int, cache: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of plain decode calls of both lowerings, and of Inductor: one graph, all of whose conditionals run."""
    from transformers import StaticCache

    calls = {
        "exact": compiled,
        "cond": skipc.compile(model, fullgraph=True, lowering="cond", on_error="raise"),
        "inductor": torch.compile(model, fullgraph=True, isolate_recompiles=True),
    }
    caches = {}
    for name in calls:
        caches[name] = StaticCache(config=model.config, max_cache_len=cache)
        model(torch.full((batch, 1), 35), past_key_values=caches[name])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            for j in range(4):
                for layer in caches[name].layers:
                    layer.cumulative_length.fill_(256)
                start = time.perf_counter()
                call(torch.full((batch, 1), 35), past_key_values=caches[name])
                if i >= 2 and j > 0:
                    times[name].append(time.perf_counter() - start)
    return times


@click.command()
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--prompt", default=512, show_default=True)
@click.option("--cache", default=2048, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
def main(dtypes: Any, batch: int, prompt: int, cache: int, rounds: int, threads: int, path: str | None) -> None:
    """Compare policies that never skip with exact mode."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    check_load()
    table = Table(title=f"all sites run: time over exact mode (batch {batch}, prompt {prompt}, {threads} threads)")
    for column in ("dtype", "phase", "policy", "ms", "over exact"):
        table.add_column(column, justify="right")
    record: dict[str, Any] = {}
    for dtype in dtypes:
        for phase, times in measure(dtype, batch, prompt, cache, rounds).items():
            for name, seconds in times.items():
                over, low, high = ratio(seconds, times["exact"])
                record[f"{dtype} {phase} {name}"] = {
                    "ms": statistics.median(seconds) * 1e3,
                    "ratio": over,
                    "low": low,
                    "high": high,
                }
                table.add_row(dtype, phase, name, f"{statistics.median(seconds) * 1e3:.2f}",
                              f"{over:.3f} [{low:.3f}, {high:.3f}]")  # fmt: skip
    console.print(table)
    save(path, record)


if __name__ == "__main__":
    main()
