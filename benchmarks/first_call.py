"""Time of the first compiled SmolLM2 decode call with empty caches, after Inductor's start-up: skipc over Inductor.

Each measurement is a process of its own, in turn. Run: python benchmarks/first_call.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import click
import torch
from common import check_load, console, save, start_inductor


@torch.no_grad()
def measure(backend: str, threads: int) -> dict[str, float]:
    """One first call: seconds in all, and of these in Dynamo's own tracing and guards."""
    from torch._dynamo.utils import compilation_time_metrics
    from transformers import StaticCache

    from skipc.loading import load_smollm2

    torch.set_num_threads(threads)
    model, _ = load_smollm2()
    start_inductor()
    cache = StaticCache(config=model.config, max_cache_len=512)
    model(torch.arange(3, 35)[None], past_key_values=cache)
    compiled = torch.compile(model, backend=backend)
    compilation_time_metrics.clear()
    import time

    start = time.perf_counter()
    compiled(torch.tensor([[35]]), past_key_values=cache)
    total = time.perf_counter() - start
    frame = sum(compilation_time_metrics["_compile.compile_inner"])
    backend_time = sum(compilation_time_metrics["OutputGraph.call_user_compiler"])
    return {"total": total, "dynamo": frame - backend_time, "rest": total - (frame - backend_time)}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@click.option("--one", hidden=True)
def main(rounds: int, threads: int, path: str | None, one: str | None) -> None:
    """Compare first calls."""
    if one:
        print(json.dumps(measure(one, threads)))
        return
    check_load()
    found: dict[str, list[dict[str, float]]] = {"inductor": [], "skipc": []}
    for i in range(rounds):
        for backend in found:
            with (
                tempfile.TemporaryDirectory() as cache,
                console.status(f"round {i + 1} of {rounds}: {backend}"),
            ):
                command = [sys.executable, __file__, "--one", backend, "--threads", str(threads)]
                env = {**__import__("os").environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[backend].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {b: {k: statistics.median(f[k] for f in fs) for k in fs[0]} for b, fs in found.items()}
    ratios = {k: medians["skipc"][k] / medians["inductor"][k] for k in ("total", "rest")}
    for backend, m in medians.items():
        console.print(f"{backend:>9}: {m['total']:.2f} s, of which Dynamo {m['dynamo']:.2f} s, rest {m['rest']:.2f} s")
    console.print(f"first call, skipc over Inductor: {ratios['total']:.3f}; without Dynamo: {ratios['rest']:.3f}")
    record: dict[str, Any] = {"medians": medians, "ratios": ratios, "all": found, "threads": threads}
    save(path, record)


if __name__ == "__main__":
    main()
