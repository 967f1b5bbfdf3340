"""Decode steps of SmolLM2 with nothing skipped: skipc beside eager, Inductor, and Inductor tuned and frozen.

Cells that differ in how many keys are in use share a process, in which all peers take turns.
Run: python benchmarks/decode.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import click
import torch
from common import bandwidth, cell_main, check_load, compare, grid_options, peers, run_grid, table

import skipc
from skipc.loading import load_smollm2

NAMES = ["eager", "inductor", "inductor max", "skipc step", "skipc generate"]


@torch.no_grad()
def cells(group: list[dict[str, Any]], rounds: int, only: str | None) -> list[dict[str, Any]]:
    """Milliseconds of one step, by peer, of cells that differ in how many keys are in use: one compilation each."""
    from skipc.runtime.decoder import Decoder
    from transformers import StaticCache

    dtype, batch, cache, threads = (group[0][k] for k in ("dtype", "batch", "cache", "threads"))
    torch.set_num_threads(threads)
    model, _ = load_smollm2(getattr(torch, dtype))
    token = torch.full((batch, 1), 35)
    warm, burst = 2, 4
    caches = []

    def filled(kv: Any) -> Any:
        for layer in kv.layers:
            layer.keys.normal_()
            layer.values.normal_()
        caches.append(kv)
        return kv

    steps: dict[str, Callable[[], torch.Tensor]] = {}
    for name in NAMES if only is None else [only]:
        if name == "skipc generate":
            decoder = Decoder(model, skipc.compile(model, fullgraph=True, on_error="raise"), batch, cache, padded=False)
            filled(decoder.cache)
            tokens = token[:, 0]
            steps[name] = lambda decoder=decoder, tokens=tokens: decoder.decode(tokens, watched=False)
        else:
            kv = StaticCache(config=model.config, max_cache_len=cache)
            model(token, past_key_values=kv)
            call, kv = peers(name, model), filled(kv)
            steps[name] = lambda call=call, kv=kv: call(token, past_key_values=kv).logits

    results = []
    for one in group:
        calls = (rounds + warm) * burst + 1
        live = min(one["live"], cache - calls - 1)
        for kv in caches:
            for layer in kv.layers:
                layer.cumulative_length.fill_(live)
        result = compare(steps, rounds, warm, baselines=("inductor", "inductor max"), burst=burst)
        config = model.config
        size = torch.finfo(getattr(torch, dtype)).bits // 8
        weights = sum(p.numel() for p in model.parameters()) * size
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        result["bytes"] = weights + batch * (live + calls // 2) * 2 * config.num_hidden_layers * heads * size
        result["bandwidth"] = bandwidth()
        result["limit_ms"] = result["bytes"] / result["bandwidth"] * 1e3
        results.append(result)
    return results


@click.command()
@grid_options
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--batch", "batches", multiple=True, type=int, default=[1, 4, 8], show_default=True)
@click.option("--cache", "caches", multiple=True, type=int, default=[512, 2048, 8192], show_default=True)
@click.option("--live", "lives", multiple=True, type=int, default=[256, 1 << 30], help="Keys in use; large: all.")
@click.option("--threads", "all_threads", multiple=True, type=int, default=[2, 1], show_default=True)
def main(dtypes: Any, batches: Any, caches: Any, lives: Any, all_threads: Any, **options: Any) -> None:
    """Compare decode steps."""
    if options["cell"]:
        return cell_main(cells, options)
    check_load()
    groups = [
        [{"dtype": d, "batch": b, "cache": c, "live": v, "threads": t} for v in lives]
        for t, d, b, c in itertools.product(all_threads, dtypes, batches, caches)
    ]
    records = run_grid(__file__, groups, options, NAMES)
    table("decode step", records, ["threads", "dtype", "batch", "cache", "live"], NAMES, options["plot"])
    return None


if __name__ == "__main__":
    main()
