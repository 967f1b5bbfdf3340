"""What drafts would bring, on texts that speculative.py recorded: by the pace that chooses at run time, given what
calls cost, and as trees. No model runs, so drafts are compared in seconds, and without a machine's noise.

Run: python benchmarks/speculative.py --json figures.json, then
     python benchmarks/draft_shapes.py figures.json --cost 4=1.07 --cost 8=1.35
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from common import console
from rich.table import Table
from skipc.runtime.speculation.accepting import greedy
from skipc.runtime.speculation.pace import Pace

import skipc

STEP = 0.02  # seconds of a plain step: only ratios count
Text = tuple[str, list[int], list[int]]  # kind, prompt, what came
Node = tuple[int, ...]  # of a tree: which candidate at each level

DRAFTS: dict[str, Callable[[], list[Any]]] = {
    "look-up": lambda: [skipc.PromptLookup()],
    "look-up of up to 8": lambda: [skipc.PromptLookup(8)],
    "cache": lambda: [skipc.NGramCache()],
    "look-up and cache": lambda: [skipc.PromptLookup(), skipc.NGramCache()],
    "look-up and cache of 6": lambda: [skipc.PromptLookup(), skipc.NGramCache(6)],
}


def chain(nodes: int) -> set[Node]:
    """The first candidate of the first, and so on."""
    return {(0,) * n for n in range(1, nodes + 1)}


# Of as many nodes each: what a call of 4, or of 8 tokens may judge.
SHAPES = {
    "3: chain": chain(3),
    "3: two of the first": chain(2) | {(1,)},
    "7: chain": chain(7),
    "7: two of the first": chain(5) | {(1,), (1, 0)},
    "7: two of the first, two of the second": chain(4) | {(1,), (1, 0), (0, 1)},
}


def paced(drafts: list[Any], costs: dict[int, float], texts: list[Text]) -> dict[str, list[float]]:
    """Of each text how many times as fast as plain it would have come, by kind."""
    pace, found = Pace(tuple(costs)), defaultdict[str, list[float]](list)
    for kind, prompt, text in texts:
        for draft in drafts:
            draft.start([prompt])
            draft.extend(0, text[:1])
        at, spent = 1, 0.0
        while at < len(text):
            width, promised, best = 1, 1.0, skipc.Proposal()
            for i, draft in enumerate(drafts):
                tokens, kinds = draft.propose([min(max(costs) - 1, len(text) - at - 1)])[0]
                made = skipc.Proposal(tokens, [(i, k) for k in kinds])
                chosen, gain = pace.choose([made], len(text))
                if gain > promised or not best.tokens:
                    width, promised, best = chosen, gain, made
            judged = best.tokens[: width - 1]
            came = greedy(judged, lambda i, made, at=at, text=text: text[at + i])
            if best.tokens:
                right = len(came) - 1 if width > 1 else int(best.tokens[0] == came[0])
                pace.came(best.kinds[: max(1, len(judged))], right)
            pace.took(width, costs[width] * STEP)
            spent += costs[width]
            for draft in drafts:
                draft.extend(0, came)
            at += len(came)
        found[kind].append((len(text) - 1) / spent)
    return found


class Candidates:
    """The last tokens that came behind the same ones, those of longer contexts first."""

    def __init__(self, order: int):
        self.order, self.next = order, defaultdict[tuple[int, ...], list[int]](list)

    def learn(self, before: Sequence[int], token: int) -> None:
        """``token`` came behind ``before``."""
        for n in range(1, min(self.order, len(before)) + 1):
            here = self.next[tuple(before[-n:])]
            if token in here:
                here.remove(token)
            here.insert(0, token)
            del here[3:]

    def of(self, before: Sequence[int]) -> Iterator[int]:
        """Some may come twice."""
        for n in range(min(self.order, len(before)), 0, -1):
            yield from self.next.get(tuple(before[-n:]), ())


def in_trees(shape: set[Node], cached: bool, texts: list[Text]) -> dict[str, float]:
    """Tokens a call, if each judges a tree of this shape, by kind."""
    cache, calls, tokens = Candidates(4), Counter[str](), Counter[str]()
    for kind, prompt, text in texts:
        local, known = Candidates(8), list[int]()
        for token in prompt:
            local.learn(known[-8:], token)
            known.append(token)
        at = 0
        while at < len(text):
            node: Node = ()
            came = 0
            while at + came < len(text) and at > 0:  # the first token comes of the prompt
                before = [*known[-8:], *text[at : at + came]][-8:]
                first = dict.fromkeys(local.of(before)) | (dict.fromkeys(cache.of(before)) if cached else {})
                rank = next((i for i, t in enumerate(first) if t == text[at + came]), None)
                if rank is None or (*node, rank) not in shape:
                    break
                node, came = (*node, rank), came + 1
            for token in text[at : at + came + 1]:
                local.learn(known[-8:], token)
                if cached:
                    cache.learn(known[-4:], token)
                known.append(token)
            calls[kind] += at > 0
            tokens[kind] += (at > 0) * min(came + 1, len(text) - at)
            at += came + 1
    return {kind: tokens[kind] / calls[kind] for kind in calls}


@click.command()
@click.argument("figures", type=click.Path(exists=True, path_type=Path))
@click.option("--cost", "costs", multiple=True, default=("4=1.07", "8=1.35"), show_default=True,
              help="Of a call of so many tokens, in plain steps.")  # fmt: skip
def main(figures: Path, costs: tuple[str, ...]) -> None:
    """Compare drafts and shapes of trees on recorded texts."""
    kinds = json.loads(figures.read_text())["kinds"]
    texts = [(kind, *text) for kind, found in kinds.items() for text in found["texts"]]
    known = {1: 1.0} | {int(w): float(c) for w, _, c in (cost.partition("=") for cost in costs)}
    table = Table("drafts, as the pace chooses: times plain", *kinds)
    for name, make in DRAFTS.items():
        found = paced(make(), known, texts)
        table.add_row(name, *(f"{statistics.median(found[kind]):.2f}" for kind in kinds))
    console.print(table)
    table = Table("nodes of a tree: tokens a call", "candidates", *kinds)
    for cached in (False, True):
        for name, shape in SHAPES.items():
            each = in_trees(shape, cached, texts)
            table.add_row(name, "text and cache" if cached else "text", *(f"{each[kind]:.2f}" for kind in kinds))
    console.print(table)


if __name__ == "__main__":
    main()
