"""What the benchmarks share: machine check, interleaved timing."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from skipc.runtime.huge_pages import back_with_huge_pages

from skipc.calibration.timing import ratio

console = Console(width=130)


def check_load(limit: float = 0.7) -> float:
    """Load of the machine before timing; warns above ``limit``: a second busy process spoils two-thread timings."""
    load = os.getloadavg()[0]
    if load > limit:
        console.print(f"[yellow]load average is {load:.2f}: something else may be running[/yellow]")
    return load


def interleave(
    runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 3, burst: int = 1, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (A B A B ...), so that the machine's drift hits all alike.

    With a ``burst`` each turn is so many calls, of which the first is not counted: it finds the machine's caches full
    of another peer's weights, as no decode loop does. No round starts after so many ``seconds``, but for the first 4.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for i in range(rounds + warmup):
        if i >= warmup + 4 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            for j in range(burst):
                start = time.perf_counter()
                run()
                if i >= warmup and (j > 0 or burst == 1):
                    times[name].append(time.perf_counter() - start)
    return times


def keep_freed_memory() -> None:
    """Start this process again with an allocator that keeps what is freed. With glibc's own settings, what a prefill
    takes varies by a tenth with the state of the heap, for every peer."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.environ |= {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
        os.execv(sys.executable, [sys.executable, *sys.argv])


def start_inductor() -> None:
    """Inductor's one-time start-up in a process: tool chain, worker processes."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()))(torch.randn(2, 8))


def save(path: str | None, record: dict[str, Any]) -> None:
    """Write figures as JSON, with what they were measured on."""
    record = {"torch": torch.__version__, "threads": torch.get_num_threads(), **record}
    if path:
        Path(path).write_text(json.dumps(record, indent=1))
        console.print(f"figures: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Grids: peers, cells in processes of their own, tables


def peers(name: str, model: torch.nn.Module) -> Callable[..., Any]:
    """``model`` as the peer ``name`` runs it. Each peer is compiled apart, at its first call."""
    if name == "eager":
        return model
    if name == "skipc step":
        return torch.compile(model, backend="skipc", fullgraph=True, isolate_recompiles=True)
    call = torch.compile(model, fullgraph=True, isolate_recompiles=True)
    if name == "inductor":
        return call
    seen: set[Any] = set()

    def best(*args: Any, **kwargs: Any) -> Any:
        # Freezing works only if it is on while Dynamo traces, so it is set around the first call.
        key = tuple(a.shape for a in args)
        if key in seen:
            return call(*args, **kwargs)
        seen.add(key)
        with torch._inductor.config.patch(freezing=True, max_autotune=True):
            return call(*args, **kwargs)

    return best


def bandwidth() -> float:
    """Bytes per second that reading memory reaches: the best of some plain reads of 400 MB in huge pages."""
    matrix = torch.randn(100_000, 1024)
    back_with_huge_pages([matrix])
    vector, best = torch.randn(1024), float("inf")
    for read in (lambda: matrix.mv(vector), lambda: matrix.sum()):
        for _ in range(7):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best


def compare(
    steps: dict[str, Callable[[], Any]], rounds: int, warmup: int, baselines: Sequence[str], burst: int = 1
) -> dict[str, Any]:
    """Interleaved times of all peers, and each one's speed against the best of ``baselines``, with its interval.

    Slow cells are timed for 45 seconds or 4 rounds, whichever takes longer.

    skipc moves the model's weights to huge pages, for all peers that read them; copies that Inductor froze stay where
    they are. With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 all memory of all peers is in huge pages from the start.
    """
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
    load = os.getloadavg()[0]
    times = interleave(steps, rounds, warmup, burst, seconds=45)
    medians = {n: statistics.median(t) * 1e3 for n, t in times.items()}
    against = min((b for b in baselines if b in medians), key=lambda b: medians[b], default=next(iter(medians)))
    found = {}
    for name in steps:
        speed, low, high = ratio(times[against], times[name])
        found[name] = {"ms": medians[name], "speed": speed, "low": low, "high": high, "first_s": first[name]}
    return {"peers": found, "best": against, "load": load, "rss_mb": _rss()}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _rss() -> dict[str, float]:
    return {"now": resident() / 1e6, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def grid_options(function: Any) -> Any:
    """Command-line options of every grid benchmark."""
    for option in (
        click.option("--rounds", default=40, show_default=True),
        click.option("--json", "path", help="Write the figures here; cells that are there already are not run again."),
        click.option("--plot", help="Write a picture here."),
        click.option("--memory", is_flag=True, help="Measure each peer's memory too, in a process of its own."),
        click.option("--cell", hidden=True),
        click.option("--only", hidden=True),
    ):
        function = option(function)
    return function


def cell_main(cells: Callable[..., list[dict[str, Any]]], options: dict[str, Any]) -> None:
    """The process of a group of cells."""
    print(json.dumps(cells(json.loads(options["cell"]), rounds=options["rounds"], only=options["only"])))


def run_grid(
    script: str, groups: list[list[dict[str, Any]]], options: dict[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Run each cell that is not in the file yet; the file is written after each group, which has one process."""
    path = Path(options["path"]) if options["path"] else None
    records: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if path and path.exists() else []
    for i, group in enumerate(groups):
        left = [c for c in group if not any(r["cell"] == c for r in records)]
        if not left:
            continue
        with console.status(f"group {i + 1} of {len(groups)}: {left}"):
            found = [{"cell": c, **r} for c, r in zip(left, _child(script, left, options["rounds"], None), strict=True)]
            if options["memory"]:
                found[-1]["memory"] = {n: _child(script, left[-1:], 3, n)[0]["rss_mb"] for n in names}
        records += found
        for record in found:
            best = record["peers"][record["best"]]["ms"]
            line = ", ".join(f"{n} {p['ms']:.1f} ms ({p['speed']:.2f}x)" for n, p in record["peers"].items())
            console.print(f"{record['cell']}: best Inductor {best:.1f} ms; {line}")
        if path:
            save(str(path), {"cells": records})
    return [r for r in records if any(r["cell"] in group for group in groups)]


def _child(script: str, cells: list[dict[str, Any]], rounds: int, only: str | None) -> list[dict[str, Any]]:
    command = [sys.executable, script, "--cell", json.dumps(cells), "--rounds", str(rounds)]
    done = subprocess.run(command + (["--only", only] if only else []), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cells}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def table(
    title: str, records: list[dict[str, Any]], keys: Sequence[str], names: Sequence[str], plot: str | None
) -> None:
    """Print the grid: milliseconds, and speed against the best Inductor configuration, skipc's with 95 % intervals."""
    shown = Table(title=title)
    for key in keys:
        shown.add_column(key)
    for name in names:
        shown.add_column(name, justify="right")
    limits = any("limit_ms" in r for r in records)
    if limits:
        shown.add_column("limit", justify="right")
    for r in records:
        row = ["all" if r["cell"][k] == 1 << 30 else str(r["cell"][k]) for k in keys]
        for name in names:
            p = r["peers"][name]
            interval = f"\n[{p['low']:.2f}, {p['high']:.2f}]" if name.startswith("skipc") else ""
            row.append(f"{p['ms']:.1f} ({p['speed']:.2f}x){interval}")
        shown.add_row(*row, *([f"{r['limit_ms']:.1f}"] if limits else []))
    console.print(shown)
    if plot:
        _plot(title, records, keys, names, plot)


def _plot(title: str, records: list[dict[str, Any]], keys: Sequence[str], names: Sequence[str], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(8, len(records) * 0.9), 5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        axes.bar(
            [x + i * width for x in range(len(records))], [r["peers"][name]["ms"] for r in records], width, label=name
        )
    if any("limit_ms" in r for r in records):
        for x, r in enumerate(records):
            axes.hlines(r["limit_ms"], x - width / 2, x + 0.8, colors="black", label="memory limit" if x == 0 else None)
    labels = ["\n".join("all" if r["cell"][k] == 1 << 30 else str(r["cell"][k]) for k in keys) for r in records]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(records))], labels, fontsize=7)
    axes.set_xlabel(", ".join(keys))
    axes.set_ylabel("ms")
    axes.set_yscale("log")
    axes.set_title(f"{title}: milliseconds, lower is better")
    axes.legend()
    figure.savefig(path, dpi=130)
    console.print(f"picture: {path}")
