"""Prefill of SmolLM2 with nothing skipped: skipc beside eager, Inductor, and Inductor with max-autotune and freezing.

Each cell of the grid is a process of its own, in which all peers take turns. Run: python benchmarks/prefill.py
"""

from __future__ import annotations

import itertools
from typing import Any

import click
import torch
from common import cell_main, check_load, compare, grid_options, peers, run_grid, table

from skipc.loading import load_smollm2

NAMES = ["eager", "inductor", "inductor max", "skipc step"]


@torch.no_grad()
def cells(group: list[dict[str, Any]], rounds: int, only: str | None) -> list[dict[str, Any]]:
    """Milliseconds of one prefill, by peer, into a static cache."""
    return [cell(**one, rounds=rounds, only=only) for one in group]


def cell(
    dtype: str, batch: int, cache: int, prompt: int, threads: int, rounds: int, only: str | None
) -> dict[str, Any]:
    """One cell, in a process of its own."""
    from transformers import StaticCache

    torch.set_num_threads(threads)
    model, _ = load_smollm2(getattr(torch, dtype))
    ids = torch.randint(3, 4000, (batch, prompt), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Any] = {}
    for name in NAMES if only is None else [only]:
        kv = StaticCache(config=model.config, max_cache_len=cache)
        model(ids[:, :1], past_key_values=kv)

        call = peers(name, model)

        def run(call: Any = call, kv: Any = kv) -> torch.Tensor:
            for layer in kv.layers:
                layer.cumulative_length.fill_(0)
            return call(ids.clone(), past_key_values=kv, logits_to_keep=1).logits  # type: ignore[no-any-return]

        steps[name] = run
    result = compare(steps, rounds, 1, baselines=("inductor", "inductor max"))
    flops = 2 * sum(p.numel() for p in model.parameters()) * batch * prompt
    result["gflops"] = {n: flops / m["ms"] / 1e6 for n, m in result["peers"].items()}
    return result


@click.command()
@grid_options
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=[1, 4], show_default=True)
@click.option("--cache", "caches", multiple=True, type=int, default=[2048, 8192], show_default=True)
@click.option("--prompt", "prompts", multiple=True, type=int, default=[128, 512, 2048], show_default=True)
@click.option("--threads", "all_threads", multiple=True, type=int, default=[2, 1], show_default=True)
def main(dtypes: Any, batches: Any, caches: Any, prompts: Any, all_threads: Any, **options: Any) -> None:
    """Compare prefills."""
    if options["cell"]:
        return cell_main(cells, options)
    check_load()
    groups = [
        [{"dtype": d, "batch": b, "cache": c, "prompt": p, "threads": t}]
        for t, d, b, c, p in itertools.product(all_threads, dtypes, batches, caches, prompts)
    ]
    records = run_grid(__file__, groups, options, NAMES)
    table("prefill", records, ["threads", "dtype", "batch", "cache", "prompt"], NAMES, options["plot"])
    return None


if __name__ == "__main__":
    main()
