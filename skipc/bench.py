"""``skipc bench``: one model in eager, under Inductor, under skipc, and under the plans of a profile, in one run."""

from __future__ import annotations

import os
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import skipc
from skipc.calibration.batches import Batch, batches_of
from skipc.calibration.costs import Regime
from skipc.calibration.profile import Profile
from skipc.calibration.timing import Peer, ratio, time_peers
from skipc.dynamo import compile_isolated

console = Console(width=120)


@torch.no_grad()
def bench(model: Any, profile: Profile | None, batch: int, cache: int | None, rounds: int) -> dict[str, Any]:
    """Time calls, print a table, and return its figures."""
    decodes = bool(getattr(model, "can_generate", lambda: False)())
    if profile is not None and cache is None and batch == profile.regime.batch:
        regime = profile.regime
    elif decodes:
        regime = Regime("decode", batch, 1, (255 if cache is None else cache) + 1)
    else:
        regime = Regime("prefill", batch, 128, 128)
    example: Batch | None = None
    if regime.phase == "prefill":
        ids = torch.arange(1, regime.tokens + 1)[None]
        (example,) = batches_of(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    compiled = skipc.compile(model, on_error="raise")
    # skipc first: it moves the weights, which all peers read, to huge pages, and cannot once Inductor has forked.
    peers = {"skipc exact": Peer(compiled)}
    promised = {}
    for entry in profile.menu if profile is not None else []:
        peers[f"skipc {entry.name}"] = Peer(compiled, profile.plan_of(entry, regime))  # type: ignore[union-attr]
        promised[f"skipc {entry.name}"] = profile.speedup(entry, regime)  # type: ignore[union-attr]
    peers |= {"eager": Peer(model), "Inductor": Peer(compile_isolated(model))}
    load = os.getloadavg()[0]
    with console.status("compiling, then timing"):
        times = time_peers(model, regime, peers, rounds, example)
    table = Table(title=f"{type(model).__name__}, {regime}, {torch.get_num_threads()} threads, load {load:.1f} before")
    for column in ("", "ms", "speed over exact", "promised"):
        table.add_column(column, justify="right")
    record: dict[str, Any] = {"regime": str(regime), "threads": torch.get_num_threads(), "load": load, "peers": {}}
    for name, seconds in times.items():
        speed, low, high = ratio(times["skipc exact"], seconds)
        milliseconds = statistics.median(seconds) * 1e3
        record["peers"][name] = {
            "ms": milliseconds, "speed": speed, "low": low, "high": high, "promised": promised.get(name),
        }  # fmt: skip
        expected = f"{promised[name]:.2f}x ({speed / promised[name] - 1:+.1%})" if name in promised else ""
        table.add_row(name, f"{milliseconds:.2f}", f"{speed:.2f}x [{low:.2f}, {high:.2f}]", expected)
    console.print(table)
    return record
