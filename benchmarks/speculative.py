"""Speculative generation beside plain: the same greedy tokens of SmolLM2, in how much less time, by kind of prompt.

Prompts are made of what ships with Python, none of them twice: questions; documentation to summarise; code to edit;
records to extract from; and text that repeats itself. Each prompt runs plain, with drafts by look-up, and with those of
a cache too, which begins empty, in turns, until an end token or so many new ones; a first divergence is listed with the
gap of the top two logits there.

Run: python benchmarks/speculative.py [--dtype bfloat16] [--batch 4] [--prompts 200] [--past-end] [--peers]
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
DOCUMENTED = (*MODULES, "random", "pathlib", "json", "logging", "threading", "datetime", "decimal", "collections",
              "functools", "doctest", "zipfile", "pickle", "optparse", "ipaddress", "enum", "unittest",
              "subprocess", "ast")  # fmt: skip


def functions() -> list[tuple[str, str]]:
    """Name and source of functions of Python's own library, of middling size."""
    found = []
    for name in MODULES:
        for value in vars(importlib.import_module(name)).values():
            if inspect.isfunction(value) and value.__module__ == name:
                source = inspect.getsource(value)
                if 200 < len(source) < 1200:
                    found.append((value.__name__, textwrap.dedent(source)))
    return found


def texts() -> list[str]:
    """Documentation of modules, classes and functions of Python's own library, of middling size."""
    found = {}
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        for value in [module, *vars(module).values()]:
            own = inspect.isclass(value) or inspect.isfunction(value)
            doc = (inspect.getdoc(value) or "") if value is module or (own and value.__module__ == name) else ""
            if 400 < len(doc) < 1600 and ">>>" not in doc:
                found[doc] = None
    return list(found)


def asked(kind: str, count: int) -> list[str]:
    """So many requests of a kind, no two of them the same."""
    draw = random.Random(kind)
    if kind == "chat":
        made = [form.format(topic) for form in FORMS for topic in TOPICS]
    elif kind == "summary":
        made = [f"Summarise this text, in its own words:\n\n{doc}" for doc in texts()]
    elif kind == "code edit":
        made = [
            f"Rename the function {n} to {n}_again in this code, and give me all of the code:\n\n{s}"
            for n, s in functions()
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
    made = list(dict.fromkeys(made))
    if len(made) < count:
        raise click.UsageError(f"there are {len(made)} prompts of the kind {kind!r}, not {count}")
    return made[:count]


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


def first_difference(a: torch.Tensor, b: torch.Tensor, pad: int) -> int | None:
    """Where two rows go apart. (One of them may be longer: as long as the longest of its batch.)"""
    longest = max(len(a), len(b))
    a, b = (torch.nn.functional.pad(row, (0, longest - len(row)), value=pad) for row in (a, b))
    return next(iter((a != b).nonzero().flatten().tolist()), None)


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


def start(compiled: Any, tokenizer: Any, batch: int, count: int, widths: Sequence[int], new: int) -> None:
    """Compile what will run: calls of each width, on a cache for the longest prompt."""
    every = [given for kind in KINDS for given in batches(tokenizer, kind, count, batch)]
    given = max(every, key=lambda g: g["input_ids"].shape[1])
    for width in sorted(widths, reverse=True):
        how: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None}
        plain = skipc.generate(compiled, **given, **how)
        draft = Known(plain[:, given["input_ids"].shape[1] :].tolist())
        skipc.generate(compiled, **given, speculative=skipc.Speculation(draft, [width]), **how)


@dataclass
class Arm:
    """What one way to generate took for the prompts of a kind.

    Attributes:
        seconds: of each request, and of it without its prompt.
        calls, call_seconds: by tokens of each row.
        same: rows with the tokens of plain generation.
    """

    seconds: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)
    call_seconds: Counter[int] = field(default_factory=Counter)
    drafted: int = 0
    accepted: int = 0
    drafting: float = 0.0
    same: int = 0

    def note(self, seconds: float, prompt: float, stats: skipc.SpeculationStats) -> None:
        """One more request."""
        self.seconds.append(seconds)
        self.decoding.append(seconds - prompt)
        self.calls.update(stats.calls)
        self.call_seconds.update(stats.seconds)
        self.drafted, self.accepted = self.drafted + stats.drafted, self.accepted + stats.accepted
        self.drafting += stats.drafting

    def against(self, plain: Arm, tokens: int) -> dict[str, Any]:
        """The figures of this arm beside plain generation of so many tokens of a row in all."""
        each = [a / b for a, b in zip(plain.seconds, self.seconds, strict=True)]  # each prompt by itself
        behind = [a / b for a, b in zip(plain.decoding, self.decoding, strict=True)]
        steps = tokens - len(self.seconds)  # the first token comes of the prompt
        spent = sum(self.call_seconds.values())
        return {
            **vars(self),
            "ratio": ratio(each, [1.0] * len(each)),
            "least": min(each),
            "behind the prompt": ratio(behind, [1.0] * len(behind)),
            "promised": steps * self.call_seconds[1] / self.calls[1] / spent,  # by counts and costs, without prompts
            "tokens a call": steps / sum(self.calls.values()),
            "drafting": self.drafting / spent,
        }

    def widths(self) -> str:
        """Calls, by tokens of each row."""
        return ", ".join(f"{n} of {w} ({self.call_seconds[w] / n * 1e3:.1f} ms)" for w, n in sorted(self.calls.items()))


@click.command()
@click.option("--prompts", default=200, show_default=True)
@click.option("--new", default=128, show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--widths", help="Of calls that judge drafts, as 2,4; by default those that suit the batch.")
@click.option("--past-end", is_flag=True, help="Go on behind end tokens.")
@click.option(
    "--peers", is_flag=True, help="Run transformers' own generation and prompt look-up, too (2 prompts a kind)."
)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(
    prompts: int, new: int, batch: int, dtype: str, threads: int, widths: str | None, past_end: bool, peers: bool,
    path: str | None,
) -> None:  # fmt: skip
    """Time plain and speculative generation."""
    torch.set_num_threads(threads)
    load = check_load()
    model, tokenizer = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    how: dict[str, Any] = {"max_new_tokens": new} | ({"eos_token_id": None} if past_end else {})
    judging = tuple(map(int, widths.split(","))) if widths else skipc.Speculation().widths_for(batch, model)[1:]
    if not judging:
        raise click.UsageError(f"by default batches of {batch} are plain: give --widths")
    ways = {
        "plain": False,
        "look-up": skipc.Speculation(widths=judging),
        "and cache": skipc.Speculation([skipc.PromptLookup(), skipc.NGramCache()], judging),
    }
    start(compiled, tokenizer, batch, prompts // len(KINDS), judging, new)
    table = Table("kind", "drafts", "plain / speculative", "behind the prompt", "promised", "acceptance",
                  "tokens a call", "drafting", "same")  # fmt: skip
    record: dict[str, Any] = {"load": load, "dtype": dtype, "batch": batch, "new": new, "kinds": {}, "divergences": []}
    for kind in KINDS:
        arms = {name: Arm() for name in ways}
        rows, tokens = 0, 0
        recorded: list[list[list[int]]] = []  # prompt and what came, for draft_shapes.py
        for given in track(batches(tokenizer, kind, prompts // len(KINDS), batch), description=kind):
            _, reading = timed(lambda g=given: skipc.generate(compiled, **g, max_new_tokens=1))
            plain, prompt = torch.empty(0), given["input_ids"].shape[1]
            for name, way in ways.items():
                made, took = timed(lambda g=given, w=way: skipc.generate(compiled, **g, speculative=w, **how))
                if not way:
                    plain = made
                    whole = given["attention_mask"].sum(1).tolist()
                    recorded += [
                        [r[prompt - n : prompt], r[prompt:]] for r, n in zip(made.tolist(), whole, strict=True)
                    ]
                stats = way.stats if isinstance(way, skipc.Speculation) else skipc.SpeculationStats()
                arms[name].note(took, reading, stats)
                for row in range(len(made)):
                    at = first_difference(plain[row], made[row], model.generation_config.pad_token_id)
                    arms[name].same += at is None
                    if at is not None:
                        mask = torch.cat([given["attention_mask"][row], torch.ones(at - prompt, dtype=torch.long)])
                        record["divergences"].append(
                            {"kind": kind, "token": at - prompt, "gap": gap(model, plain[row, :at], mask)}
                        )
            rows, tokens = rows + len(plain), tokens + plain.shape[1] - prompt
        alone = arms.pop("plain")
        record["kinds"][kind] = {"rows": rows, "tokens": tokens, "plain": vars(alone), "texts": recorded}
        for name, arm in arms.items():
            record["kinds"][kind][name] = found = arm.against(alone, tokens)
            shown = [
                f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (found["ratio"], found["behind the prompt"])
            ]
            shares = (
                f"{arm.accepted / max(1, arm.drafted):.0%}",
                f"{found['tokens a call']:.2f}",
                f"{found['drafting']:.1%}",
            )
            table.add_row(kind, name, *shown, f"{found['promised']:.2f}", *shares, f"{arm.same} of {rows}")
            console.print(f"{kind}, {name}: {shown[0]}, least {found['least']:.2f}; calls: {arm.widths()}")
        save(path, record)
    console.print(table)
    for divergence in record["divergences"]:
        console.print(
            f"{divergence['kind']}: at new token {divergence['token']}, top two logits {divergence['gap']:.1e} apart"
        )
    if peers:
        record["peers"] = of_transformers(model, tokenizer, how)
    save(path, record)


def of_transformers(model: Any, tokenizer: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of transformers' generation, eager, and with its own prompt look-up of two lengths."""
    found: dict[str, Any] = {}
    ways = {"eager": {}, **{f"prompt look-up of {n}": {"prompt_lookup_num_tokens": n} for n in (3, 8)}}
    for kind in KINDS:
        for name, way in ways.items():
            speeds = []
            for given in batches(tokenizer, kind, 2, 1):
                made, took = timed(lambda g=given, w=way: model.generate(**g, do_sample=False, **how, **w))
                speeds.append((made.shape[1] - given["input_ids"].shape[1]) / took)
            found.setdefault(name, {})[kind] = statistics.median(speeds)
    for name, speeds_of in found.items():
        console.print(f"transformers, {name}, tokens per s: " + ", ".join(f"{k} {v:.1f}" for k, v in speeds_of.items()))
    return found


if __name__ == "__main__":
    main()
