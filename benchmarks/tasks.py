"""What plans of a profile do to tasks that likelihood hides: greedy text, facts planted in a long text, and the
perplexity of contexts far longer than those that the plans were fitted on. SmolLM2, text that was not calibrated on.

Run: python benchmarks/tasks.py --profile profile
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from common import console, save
from rich.progress import track
from rich.table import Table

import skipc
from skipc.calibration.batches import batches_of
from skipc.calibration.judging import Judge
from skipc.calibration.profile import Profile
from skipc.calibration.text import english_text, halves
from skipc.loading import load_smollm2

_PLACES = ("London", "Cairo", "Lima", "Oslo", "Delhi", "Quito", "Seoul", "Rome", "Accra", "Tunis")
_THINGS = ("blue box", "garden gate", "old safe", "bicycle lock", "tower door")


def rouge_l(a: Sequence[int], b: Sequence[int]) -> float:
    """F1 of the longest common subsequence of two token lists (Lin 2004)."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j + 1], row[j])
    return 2 * row[-1] / (len(a) + len(b)) if len(a) + len(b) else 1.0


def generations(compiled: Any, ids: torch.Tensor, plans: dict[str, skipc.Plan], count: int, new: int) -> dict[str, Any]:
    """Greedy continuations of ``count`` prompts of 96 tokens under each plan, against the whole model's."""
    stride = (len(ids) - 96) // count
    totals = {name: [0.0, 0.0, 0.0] for name in plans}
    for i in track(range(count), description="greedy text"):
        prompt = ids[i * stride : i * stride + 96][None]
        full = skipc.generate(compiled, prompt, max_new_tokens=new, eos_token_id=None)[0, 96:].tolist()
        for name, plan in plans.items():
            with compiled.session(plan=plan):
                found = skipc.generate(compiled, prompt, max_new_tokens=new, eos_token_id=None)[0, 96:].tolist()
            same = [a == b for a, b in zip(full, found, strict=True)]
            totals[name][0] += (same.index(False) if False in same else new) / count
            totals[name][1] += rouge_l(full, found) / count
            totals[name][2] += (False not in same) / count
    return {
        n: {"tokens until the first difference": a, "ROUGE-L": b, "identical": c} for n, (a, b, c) in totals.items()
    }


def retrieval(
    compiled: Any, tokenizer: Any, ids: torch.Tensor, plans: dict[str, skipc.Plan], count: int, context: int
) -> dict[str, Any]:
    """How many of the planted facts that the whole model finds are found under each plan."""
    rng = random.Random(context)
    found = dict.fromkeys(plans, 0)
    full = 0
    for _ in track(range(count), description=f"facts, {context} tokens"):
        thing, place, code = rng.choice(_THINGS), rng.choice(_PLACES), str(rng.randrange(1000, 10000))
        fact = f"\n\nThe code of the {thing} in {place} is {code}.\n\n"
        start = rng.randrange(len(ids) - context)
        where = rng.randrange(context // 8, context - context // 8)
        before, after = (tokenizer.decode(ids[start + a : start + b]) for a, b in ((0, where), (where, context)))
        asked = f"the code of the {thing} in {place}"
        text = f"{before}{fact}{after}\n\nQuestion: What is {asked}?\nAnswer: {asked.capitalize()} is"
        prompt = tokenizer(text, return_tensors="pt", verbose=False).input_ids

        def answer(plan: skipc.Plan, prompt: torch.Tensor = prompt) -> str:
            with compiled.session(plan=plan):
                made = skipc.generate(compiled, prompt, max_new_tokens=8, eos_token_id=None)
            return str(tokenizer.decode(made[0, prompt.shape[1] :]))

        if code not in answer(skipc.Plan()):
            continue
        full += 1
        for name, plan in plans.items():
            found[name] += code in answer(plan)
    return {"facts": count, "whole model": full, **found}


@click.command()
@click.option("--profile", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--prompts", default=20, show_default=True)
@click.option("--new", default=64, show_default=True)
@click.option("--facts", default=12, show_default=True)
@click.option("--context", "contexts", multiple=True, default=[512, 1024], show_default=True, help="Of planted facts.")
@click.option("--long", "lengths", multiple=True, default=[4096, 8192], show_default=True, help="Of long texts.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(
    folder: Path, prompts: int, new: int, facts: int, contexts: tuple[int, ...], lengths: tuple[int, ...],
    threads: int, path: str | None,
) -> None:  # fmt: skip
    """Run the tasks."""
    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2()
    profile = Profile.load(folder)
    profile.check(model)
    plans = {e.name: profile.plan_of(e) for e in profile.menu}
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    ids = tokenizer(halves(english_text())[1], return_tensors="pt", verbose=False).input_ids[0]
    record: dict[str, Any] = {"effort": profile.effort}
    record["greedy text"] = generations(compiled, ids, plans, prompts, new)
    for context in contexts:
        record[f"facts in {context} tokens"] = retrieval(compiled, tokenizer, ids, plans, facts, context)
        save(path, record)
    for length in lengths:
        count = min(4, len(ids) // length)
        windows = [ids[i * length : (i + 1) * length][None] for i in range(count)]
        judge = Judge(model, batches_of(model, windows))
        record[f"{length} tokens"] = {n: asdict(judge.judge(p)) for n, p in plans.items()}
        save(path, record)
    table = Table(title="SmolLM2 under the plans of a profile, against the whole model")
    for column in ("", *plans):
        table.add_column(column, justify="right")
    for key in ("tokens until the first difference", "ROUGE-L", "identical"):
        table.add_row(f"greedy text: {key}", *(f"{record['greedy text'][n][key]:.2f}" for n in plans))
    for context in contexts:
        found = record[f"facts in {context} tokens"]
        table.add_row(f"facts in {context} tokens", *(f"{found[n]} of {found['whole model']}" for n in plans))
    for length in lengths:
        cells = [record[f"{length} tokens"][n] for n in plans]
        table.add_row(
            f"perplexity, {length} tokens",
            *(f"{c['loss']:+.1%} [{c['low']:+.1%}, {c['high']:+.1%}]" for c in cells),
        )
    console.print(table)


if __name__ == "__main__":
    main()
