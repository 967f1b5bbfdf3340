"""Speculative generation beside plain: the same greedy tokens of SmolLM2, in how much less time, by kind of prompt.

Prompts are made of what ships with Python: questions; documentation to summarise; code to edit; records to extract
from; and text that repeats itself. Each prompt runs plain and with drafts, in turns; a first divergence is listed with
the gap of the top two logits there.

Run: python benchmarks/speculative.py [--dtype bfloat16] [--batch 4] [--prompts 200] [--peers]
"""

from __future__ import annotations

import inspect
import json
import random
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import click
import torch
from common import check_load, console, save
from rich.progress import track
from rich.table import Table

import skipc
from skipc.calibration.timing import ratio
from skipc.loading import load_smollm2

TOPICS = ("rivers", "glaciers", "bees", "bridges", "clocks", "maps", "vaccines", "whales", "printing",
          "salt", "violins", "compilers", "volcanoes", "paper", "tides", "engines", "comets", "bread",
          "ice", "telescopes")  # fmt: skip
FORMS = ("What should a child know about {}?", "Explain how {} changed the way people live.")
MODULES = ("textwrap", "shlex", "statistics", "fractions", "bisect", "heapq", "difflib", "string",
           "colorsys", "calendar", "glob", "fnmatch", "csv", "configparser", "argparse", "gettext",
           "mailbox", "tokenize")  # fmt: skip


def functions() -> list[tuple[str, str, str]]:
    """Name, source and documentation of functions of Python's own library that have all three, of middling size."""
    found = []
    for name in MODULES:
        module = __import__(name)
        for value in vars(module).values():
            if inspect.isfunction(value) and value.__module__ == name:
                source, doc = inspect.getsource(value), inspect.getdoc(value) or ""
                if 200 < len(source) < 1200:
                    found.append((value.__name__, textwrap.dedent(source), doc))
    return found


def asked(kind: str, count: int) -> list[str]:
    """So many requests of a kind."""
    draw, known = random.Random(kind), functions()
    if kind == "chat":
        made = [form.format(topic) for form in FORMS for topic in TOPICS]
    elif kind == "summary":
        made = [f"Summarise this text, in its own words:\n\n{doc}" for _, _, doc in known if len(doc) > 200]
    elif kind == "code edit":
        made = [
            f"Rename the function {n} to {n}_again in this code, and give me all of the code:\n\n{s}"
            for n, s, _ in known
        ]
    elif kind == "extraction":
        made = []
        for _ in range(count):
            rows = [
                {"name": draw.choice(TOPICS), "id": draw.randrange(10_000), "ok": draw.random() < 0.5} for _ in range(8)
            ]
            made.append(f"Give me these records again, one on a line:\n\n{json.dumps(rows)}")
    else:
        made = [
            f"Go on: {' '.join([draw.choice(TOPICS), draw.choice(TOPICS), str(draw.randrange(99))] * 8)}"
            for _ in range(count)
        ]
    draw.shuffle(made)
    return [made[i % len(made)] for i in range(count)]


KINDS = ("chat", "summary", "code edit", "extraction", "repetition")


def batches(tokenizer: Any, kind: str, count: int, batch: int) -> list[dict[str, torch.Tensor]]:
    """Prompts as the model reads them, padded on the left."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
        for t in asked(kind, count)
    ]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return [
        dict(tokenizer(texts[i : i + batch], return_tensors="pt", padding=True, add_special_tokens=False))
        for i in range(0, len(texts), batch)
    ]


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What it returns, and seconds."""
    start = time.perf_counter()
    made = run()
    return made, time.perf_counter() - start


def gap(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Between the top two logits behind ``ids``."""
    top = model(input_ids=ids[mask.bool()][None]).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


class Known:
    """Drafts what is known to come."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def start(self, rows: Any) -> None:
        self.made = [0] * len(rows)

    def extend(self, row: int, tokens: Any) -> None:
        self.made[row] += len(tokens)

    def propose(self, most: Any) -> list[skipc.Proposal]:
        return [skipc.Proposal(r[n:][:m]) for r, n, m in zip(self.rows, self.made, most, strict=True)]


def start(compiled: Any, tokenizer: Any, batch: int, count: int, how: dict[str, Any]) -> None:
    """Compile what will run: calls of each width, on a cache for the longest prompt."""
    every = [given for kind in KINDS for given in batches(tokenizer, kind, count, batch)]
    given = max(every, key=lambda g: g["input_ids"].shape[1])
    for width in skipc.Speculation().widths_for(batch)[:0:-1]:
        plain = skipc.generate(compiled, **given, **how)
        draft = Known(plain[:, given["input_ids"].shape[1] :].tolist())
        skipc.generate(compiled, **given, speculative=skipc.Speculation(draft, [width]), **how)


@click.command()
@click.option("--prompts", default=200, show_default=True)
@click.option("--new", default=128, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--peers", is_flag=True, help="Run transformers' own generation and prompt look-up, too (2 prompts a kind)."
)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(prompts: int, new: int, batch: int, dtype: str, threads: int, peers: bool, path: str | None) -> None:
    """Time plain and speculative generation."""
    torch.set_num_threads(threads)
    load = check_load()
    model, tokenizer = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    speculation = skipc.Speculation()
    how: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None}
    start(compiled, tokenizer, batch, prompts // len(KINDS), how)
    table = Table(
        "kind",
        "plain / speculative",
        "tokens per s",
        "promised",
        "acceptance",
        "tokens a call",
        "calls by width",
        "drafting",
        "same",
    )
    record: dict[str, Any] = {"load": load, "dtype": dtype, "batch": batch, "new": new, "kinds": {}, "divergences": []}
    for kind in KINDS:
        times: dict[str, list[float]] = {"plain": [], "speculative": []}
        calls: Counter[int] = Counter()
        drafted = accepted = same = 0
        seconds: Counter[int] = Counter()
        drafting, rows = 0.0, 0
        for given in track(batches(tokenizer, kind, prompts // len(KINDS), batch), description=kind):
            plain, took = timed(lambda g=given: skipc.generate(compiled, **g, **how))
            times["plain"].append(took)
            ours, took = timed(lambda g=given: skipc.generate(compiled, **g, speculative=speculation, **how))
            times["speculative"].append(took)
            stats = speculation.stats
            calls.update(stats.calls)
            seconds.update(stats.seconds)
            drafted, accepted, drafting = drafted + stats.drafted, accepted + stats.accepted, drafting + stats.drafting
            prompt = given["input_ids"].shape[1]
            for row in range(len(plain)):
                rows += 1
                same += bool(torch.equal(plain[row], ours[row]))
                if not torch.equal(plain[row], ours[row]):
                    at = int((plain[row] != ours[row]).nonzero()[0])
                    mask = torch.cat([given["attention_mask"][row], torch.ones(at - prompt, dtype=torch.long)])
                    record["divergences"].append(
                        {"kind": kind, "token": at - prompt, "gap": gap(model, plain[row, :at], mask)}
                    )
        faster = [a / b for a, b in zip(times["plain"], times["speculative"], strict=True)]  # each prompt by itself
        against, low, high = ratio(faster, [1.0] * len(faster))
        total = sum(calls.values())
        step = seconds[1] / calls[1] if calls[1] else float("nan")
        promised = (rows / batch * (new - 1) * step) / sum(seconds.values())  # by counts and costs, without prefill
        found = {
            "ratio": against,
            "interval": [low, high],
            "per second": new * rows / sum(times["speculative"]),
            "promised": promised,
            "acceptance": accepted / max(1, drafted),
            "per call": (new - 1) * rows / batch / total,
            "calls": dict(calls),
            "seconds": dict(seconds),
            "drafting": drafting,
            "same": same,
            "rows": rows,
            "times": times,
        }
        record["kinds"][kind] = found
        widths = ", ".join(f"{n} of {w} ({seconds[w] / n * 1e3:.1f} ms)" for w, n in sorted(calls.items()))
        table.add_row(kind, f"{against:.2f} [{low:.2f}, {high:.2f}]", f"{found['per second']:.1f}", f"{promised:.2f}",
                      f"{found['acceptance']:.2f}", f"{found['per call']:.2f}", widths,
                      f"{drafting / sum(seconds.values()):.1%}", f"{same} of {rows}")  # fmt: skip
    console.print(table)
    for divergence in record["divergences"]:
        console.print(
            f"{divergence['kind']}: at new token {divergence['token']}, top two logits {divergence['gap']:.1e} apart"
        )
    if peers:
        record["peers"] = of_transformers(model, tokenizer, new)
    save(path, record)


def of_transformers(model: Any, tokenizer: Any, new: int) -> dict[str, Any]:
    """Tokens a second of transformers' generation, eager, and with its own prompt look-up."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        for name, how in {"eager": {}, "prompt look-up": {"prompt_lookup_num_tokens": 8}}.items():
            took = [
                timed(
                    lambda g=given, h=how: model.generate(
                        **g, max_new_tokens=new, min_new_tokens=new, do_sample=False, **h
                    )
                )[1]
                for given in batches(tokenizer, kind, 2, 1)
            ]
            found.setdefault(name, {})[kind] = new / statistics.median(took)
    for name, speeds in found.items():
        console.print(f"transformers, {name}, tokens per s: " + ", ".join(f"{k} {v:.1f}" for k, v in speeds.items()))
    return found


if __name__ == "__main__":
    main()
