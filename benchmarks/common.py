"""What the benchmarks share: machine check, interleaved timing, ratios with intervals."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

console = Console(width=130)


def check_load(limit: float = 0.7) -> float:
    """Load of the machine before timing; warns above ``limit``: a second busy process spoils two-thread timings."""
    load = os.getloadavg()[0]
    if load > limit:
        console.print(f"[yellow]load average is {load:.2f}: something else may be running[/yellow]")
    return load


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (A B A B ...), so that the machine's drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + warmup):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(a: Sequence[float], b: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Median of ``a`` over median of ``b``, with a bootstrap 95 % interval over rounds."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator)
    drawn = x[index].median(dim=1).values / y[index].median(dim=1).values
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.median(a) / statistics.median(b), low, high


def start_inductor() -> None:
    """Inductor's one-time start-up in a process: tool chain, worker processes."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()))(torch.randn(2, 8))


def save(path: str | None, record: dict[str, Any]) -> None:
    """Write figures as JSON, with what they were measured on."""
    record = {"torch": torch.__version__, "threads": torch.get_num_threads(), **record}
    if path:
        Path(path).write_text(json.dumps(record, indent=1))
        console.print(f"figures: {path}")
