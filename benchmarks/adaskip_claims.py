"""What AdaSkip (arXiv 2501.02336) claims about similarities, on SmolLM2: does it hold for a small model?

Run: python benchmarks/adaskip_claims.py
"""

from __future__ import annotations

import random
from typing import Any

import click
import torch
from common import console, save
from rich.table import Table

import skipc
from skipc.calibration.measure import perplexity
from skipc.calibration.similarity import Similarities, measure_similarity
from skipc.calibration.text import english_text, token_windows
from skipc.loading import load_smollm2


def whole_layers(found: Similarities, layers: int) -> list[str]:
    """The sublayers of the layers whose two similarities are highest in the mean, as whole-layer methods choose."""
    names = sorted({n.rpartition(".")[0] for n in found.similarity})
    score = {n: found.similarity[f"{n}.self_attn"] + found.similarity[f"{n}.mlp"] for n in names}
    chosen = sorted(names, key=lambda n: -score[n])[:layers]
    return [f"{n}.{part}" for n in chosen for part in ("self_attn", "mlp")]


@click.command()
@click.option(
    "--windows", default=8, show_default=True, help="Windows of text for calibration, and as many to judge by."
)
@click.option("--tokens", default=512, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(windows: int, tokens: int, path: str | None) -> None:
    """Check the claims."""
    model, tokenizer = load_smollm2(torch.float32)
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    text = english_text()
    half = len(text) // 2
    first = token_windows(tokenizer, text[:half], tokens, windows)
    second = token_windows(tokenizer, text[half:], tokens, windows)
    base = perplexity(compiled, second)
    record: dict[str, Any] = {"perplexity": base}

    a, b = measure_similarity(compiled, first), measure_similarity(compiled, second)
    hits = {k: len(set(a.ranked()[:k]) & set(b.ranked()[:k])) / k for k in (4, 8, 16)}
    record["hit rate of the ranking on other text"] = hits
    console.print(f"ranking on other text, share of the top k found again: {hits}")

    table = Table(title=f"perplexity over {base:.2f} (nothing skipped), by sublayers skipped in every call")
    for column in (
        "skipped",
        "AdaSkip (scaled)",
        "same, identity",
        "whole layers",
        "random (mean of 4)",
        "least similar",
    ):
        table.add_column(column, justify="right")

    def ratio(names: Any, scale: Any = None) -> float:
        with compiled.session(policy=skipc.Static(names, scale)):
            return perplexity(compiled, second) / base

    rng = random.Random(0)
    for count in (2, 4, 8):
        joint = a.ranked()[:count]
        row = {
            "AdaSkip (scaled)": ratio(joint, a.scale),
            "same, identity": ratio(joint),
            "whole layers": ratio(whole_layers(a, count // 2)),
            "random (mean of 4)": sum(ratio(rng.sample(a.ranked(), count)) for _ in range(4)) / 4,
            "least similar": ratio(a.ranked()[-count:]),
        }
        record[f"skip {count}"] = row
        table.add_row(str(count), *(f"{v:.3f}" if v < 1e3 else f"{v:.1e}" for v in row.values()))
    console.print(table)

    prompts = [w[:, :128] for w in first[:4]]
    decoding = measure_similarity(compiled, prompts, ("decode",), generate=64)
    prefill = measure_similarity(compiled, prompts, ("prefill",), generate=1)
    for part in ("mlp", "self_attn"):
        names = [n for n in prefill.similarity if n.endswith(part)]
        means = [sum(of.similarity[n] for n in names) / len(names) for of in (prefill, decoding)]
        higher = sum(decoding.similarity[n] > prefill.similarity[n] for n in names)
        record[f"{part}: prefill, decode"] = means
        console.print(f"{part}: mean similarity {means[0]:.4f} in prefill, {means[1]:.4f} in decode; "
                      f"higher in decode at {higher} of {len(names)} sites")  # fmt: skip
    save(path, record)


if __name__ == "__main__":
    main()
