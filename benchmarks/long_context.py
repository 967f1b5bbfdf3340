"""Skipping in long contexts: SmolLM2, prefill of a long text and decode steps behind it, under policies that skip.

The text's own next tokens are fed to the decode steps, so that what skipping does to their likelihood is measured in
the same run. Policies take turns in one process. Run: python benchmarks/long_context.py
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import check_load, console, keep_freed_memory, save
from rich.table import Table

import skipc
from skipc.calibration.similarity import measure_similarity
from skipc.calibration.text import english_text, token_windows
from skipc.calibration.timing import ratio
from skipc.loading import load_smollm2


def policies_of(compiled: Any, windows: list[torch.Tensor]) -> dict[str, Callable[[], skipc.Policy] | None]:
    """What is compared, calibrated on ``windows``."""
    found = measure_similarity(compiled, windows)
    return {
        "exact": None,
        "adaskip, 4 sublayers": lambda: skipc.AdaSkip(found.similarity, found.scale, count=4, rule="released"),
        "adaskip, 12 sublayers": lambda: skipc.AdaSkip(found.similarity, found.scale, count=12, rule="released"),
        "ffn_skip, from 0.95": lambda: skipc.FFNSkip(0.95, warmup=8, stride=1),
        "unified, 1.25": lambda: skipc.Unified(1.25),
    }


@torch.no_grad()
def measure(dtype: str, prompt: int, cache: int, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """For each policy: seconds of prefills and of decode steps, and nats for each of the tokens that follow."""
    from skipc.runtime.decoder import Decoder

    model, tokenizer = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    text = english_text()
    policies = policies_of(compiled, token_windows(tokenizer, text[: len(text) // 2], 1024, 4))
    windows = token_windows(tokenizer, text[len(text) // 2 :], prompt + steps, rounds)
    decoder = Decoder(model, compiled, 1, cache, padded=False)
    decoder.fix_sizes()
    found: dict[str, dict[str, Any]] = {n: {"prefill": [], "decode": [], "loss": 0.0, "skipped": {}} for n in policies}
    for i, ids in enumerate([windows[0], *windows]):
        for name, policy in policies.items():
            with compiled.session(policy=policy()) if policy else nullcontext() as session:
                start = time.perf_counter()
                logits = decoder.prefill(ids[:, :prompt], None)
                took, loss = [time.perf_counter() - start], 0.0
                for at in range(prompt, prompt + steps):
                    loss += F.cross_entropy(logits.float(), ids[:, at]).item() / steps / rounds
                    start = time.perf_counter()
                    logits = decoder.decode(ids[:, at], watched=False)
                    took.append(time.perf_counter() - start)
            of = found[name]
            if i:  # the first round compiles
                of["loss"] += loss
                of["prefill"].append(took[0])
                of["decode"] += took[1:]
            if session is not None:
                stats = session.stats()
                assert not i or not stats.recompiles
                of["skipped"] = {n: c / stats.calls for n, c in stats.skipped.items() if c}
    return found


@click.command()
@click.option("--dtype", "dtypes", multiple=True, default=["float32", "bfloat16"], show_default=True)
@click.option("--prompt", "prompts", multiple=True, type=int, default=[2048, 8000], show_default=True)
@click.option("--cache", default=8192, show_default=True)
@click.option("--steps", default=64, show_default=True, help="Decode steps behind each prompt.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
def main(dtypes: Any, prompts: Any, cache: int, steps: int, rounds: int, threads: int, path: str | None) -> None:
    """Measure."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    check_load()
    table = Table(title=f"long contexts, cache {cache}, batch 1, {threads} threads: ms, and time over exact")
    for column in ("dtype", "prompt", "policy", "sites skipped", "prefill", "decode", "perplexity over exact"):
        table.add_column(column, justify="right")
    record: dict[str, Any] = {}
    for dtype in dtypes:
        for prompt in prompts:
            found = measure(dtype, prompt, cache, steps, rounds)
            exact = found["exact"]
            for name, of in found.items():
                cells, shown = {}, []
                for phase in ("prefill", "decode"):
                    over, low, high = ratio(of[phase], exact[phase])
                    cells[phase] = {"ms": statistics.median(of[phase]) * 1e3, "ratio": over, "low": low, "high": high}
                    shown.append(f"{cells[phase]['ms']:.1f} ({over:.3f} [{low:.3f}, {high:.3f}])")
                loss = math.exp(of["loss"] - exact["loss"])
                sites = sum(of["skipped"].values())
                record[f"{dtype} {prompt} {name}"] = {**cells, "perplexity": loss, "skipped": sites}
                table.add_row(dtype, str(prompt), name, f"{sites:.1f}", *shown, f"{loss:.3f}")
            save(path, record)
    console.print(table)


if __name__ == "__main__":
    main()
