"""What plans of a profile lose against published ways to skip sublayers, at the same share of the sublayers' time saved
and on the same text: SmolLM2, the half of CPython's help topics that was not calibrated on, and chats of its own.

Each baseline takes what it calibrates on from the same text as the profile. Baselines that skip whole numbers of
sublayers may save up to half a percentage point less than the plan that they are compared with.

* random: sublayers, mean of so many draws.
* Unified: layers evenly spread. last layers: exit before the last N.
* ShortGPT (arXiv 2403.03853): layers by block influence. SLEB (arXiv 2402.09025): layers one after the other, by the
  loss of what is left.
* LLM-Drop, joint (arXiv 2406.15786): sublayers by similarity. AdaSkip (arXiv 2501.02336): the same, and the stream is
  scaled in their place.
* FFN-SkipLLM (arXiv 2404.03865): MLPs, by similarity at earlier layers of the same token.

Run: skipc calibrate smollm2 --effort thorough --out profile; python benchmarks/quality.py --profile profile
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from common import console, save
from rich.progress import track
from rich.table import Table

import skipc
from skipc.calibration.batches import Batch, call_on, in_half
from skipc.calibration.calibrate import EFFORTS
from skipc.calibration.judging import Judge, Judgement
from skipc.calibration.profile import Profile
from skipc.calibration.subject import Subject as Text
from skipc.loading import load_smollm2

_SLACK = 0.005  # of the sublayers' time


class Subject:
    """SmolLM2, its profile, and the similarities that baselines go by."""

    def __init__(self, model: Any, profile: Profile, calibration: Sequence[Batch]):
        self.model, self.profile, self.calibration = model, profile, list(calibration)
        self.layers = len(model.model.layers)
        self.time = {n: profile.costs.of_site(profile.regime, n) for n in profile.sites}
        self.total = sum(self.time.values())
        self.similarity = {n: f.similarity["prefill"] for n, f in profile.sites.items()}
        self.scale = {n: f.scale["prefill"] for n, f in profile.sites.items()}

    def of_layers(self, layers: Sequence[int]) -> frozenset[str]:
        """The sublayers of some layers."""
        chosen = set(layers)
        return frozenset(n for n, f in self.profile.sites.items() if f.layer in chosen)

    def removed(self, names: Sequence[str] | frozenset[str]) -> float:
        """Share of the sublayers' time that leaving some out saves."""
        return sum(self.time[n] for n in names) / self.total

    def first(self, ranked: Sequence[str], share: float) -> frozenset[str]:
        """As many of the first sublayers as it takes to save ``share``, or slightly less."""
        chosen: list[str] = []
        for name in ranked:
            if self.removed(chosen) >= share - _SLACK:
                break
            chosen.append(name)
        return frozenset(chosen)

    def first_layers(self, ranked: Sequence[int], share: float) -> frozenset[str]:
        """The same for layers."""
        chosen: list[int] = []
        for layer in ranked:
            if self.removed(self.of_layers(chosen)) >= share - _SLACK:
                break
            chosen.append(layer)
        return self.of_layers(chosen)

    @torch.no_grad()
    def influences(self) -> list[int]:
        """Layers by block influence, the least first: 1 minus the mean cosine of the stream before and after."""
        sums = torch.zeros(self.layers, dtype=torch.float64)

        def note(i: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                after = output if isinstance(output, torch.Tensor) else output[0]
                sums[i] += F.cosine_similarity(args[0], after, dim=-1).double().sum()

            return hook

        with ExitStack() as stack:
            for i, layer in enumerate(self.model.model.layers):
                stack.callback(layer.register_forward_hook(note(i)).remove)
            for batch in self.calibration[:16]:
                call_on(self.model, batch)
        return sums.argsort(descending=True).tolist()

    @torch.no_grad()
    def one_by_one(self, most: float, windows: int) -> list[int]:
        """Layers in the order in which SLEB removes them; the first and the last stay."""
        gone: list[int] = []
        while self.removed(self.of_layers(gone)) < most:
            left = [i for i in range(1, self.layers - 1) if i not in gone]
            losses = {i: self._loss(self.of_layers([*gone, i]), windows) for i in track(left, f"SLEB {len(gone) + 1}")}
            gone.append(min(losses, key=lambda i: losses[i]))
        return gone

    def _loss(self, skip: frozenset[str], windows: int) -> float:
        total = 0.0
        for batch in self.calibration[:windows]:
            with in_half(torch.device("cpu")):
                logits = call_on(self.model, batch, skipc.Plan(skip)).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), batch.inputs["input_ids"][0, 1:]))
        return total

    # -- ways to run --------------------------------------------------------------------------------------------------

    @contextmanager
    def streams(self, act: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        """Let ``act(site, stream before it, what it adds)`` replace what sublayers add."""
        points: dict[str, torch.Tensor] = {}

        def before(name: str) -> Callable[..., None]:
            return lambda module, args: points.__setitem__(name, args[0])

        def after(name: str) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Any) -> Any:
                value = output if isinstance(output, torch.Tensor) else output[0]
                made = act(name, points.pop(name), value)
                if made is None:
                    return None
                return made if isinstance(output, torch.Tensor) else (made, *output[1:])

            return hook

        with ExitStack() as stack:
            for i, layer in enumerate(self.model.model.layers):
                parts = (
                    ("self_attn", layer.input_layernorm, layer.self_attn),
                    ("mlp", layer.post_attention_layernorm, layer.mlp),
                )
                for part, norm, module in parts:
                    name = f"model.layers.{i}.{part}"
                    stack.callback(norm.register_forward_pre_hook(before(name)).remove)
                    stack.callback(module.register_forward_hook(after(name)).remove)
            yield

    def scaled(self, skip: frozenset[str]) -> Callable[[Batch], Any]:
        """AdaSkip: the stream is scaled in the place of sublayers that are left out."""

        def call(batch: Batch) -> Any:
            with self.streams(lambda name, x, f: (self.scale[name] - 1) * x if name in skip else None):
                return call_on(self.model, batch)

        return call

    def by_token(self, threshold: float, counts: list[int]) -> Callable[[Batch], Any]:
        """FFN-SkipLLM: once the stream around an MLP of the middle layers is as similar as ``threshold``, the token
        skips the others; attention always runs. The first 32 tokens run in full. ``counts`` receives MLPs skipped, and
        tokens."""

        def call(batch: Batch) -> Any:
            tokens = batch.inputs["input_ids"].shape[1]
            closed = torch.zeros(1, tokens, dtype=torch.bool)

            def act(name: str, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor | None:
                layer = self.profile.sites[name].layer
                if not name.endswith("mlp") or not 2 <= layer < self.layers - 2:
                    return None
                made = f.masked_fill(closed[..., None], 0.0)
                counts[0] += int(closed.sum())
                similar = F.cosine_similarity(x, x + f, dim=-1) >= threshold
                similar[:, :32] = False
                closed.logical_or_(similar)
                return made

            with self.streams(act):
                output = call_on(self.model, batch)
            counts[1] += tokens
            return output

        return call

    def threshold_for(self, share: float) -> float | None:
        """The threshold under which FFN-SkipLLM saves ``share``; None if it cannot."""
        mlp = max(t for n, t in self.time.items() if n.endswith("mlp"))
        low, high = 0.0, 1.0
        for _ in range(9):
            middle, counts = (low + high) / 2, [0, 0]
            call = self.by_token(middle, counts)
            with torch.no_grad(), in_half(torch.device("cpu")):
                for batch in self.calibration[:2]:
                    call(batch)
            low, high = (middle, high) if counts[0] / counts[1] * mlp / self.total >= share - _SLACK else (low, middle)
        return low if low > 0 else None


def baselines(subject: Subject, judge: Judge, share: float, sleb: list[int], draws: int) -> dict[str, dict[str, Any]]:
    """Judgements of all baselines that save ``share``."""
    ranked = sorted(subject.similarity, key=lambda n: -subject.similarity[n])
    depth = subject.layers
    count = max(1, round(share * depth))
    spread = [round((i + 0.5) * depth / count) for i in range(count)]
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, judgement: Judgement, removed: float) -> None:
        found[name] = {**asdict(judgement), "removed": removed}
        console.print(f"  {name}: {removed:.1%} removed, {judgement}")

    def left_out(name: str, skip: frozenset[str]) -> None:
        note(name, judge.judge(skipc.Plan(skip)), subject.removed(skip))

    left_out("Unified", subject.of_layers([min(depth - 1, i) for i in spread]))
    left_out("last layers", subject.first_layers(list(range(depth))[::-1], share))
    left_out("ShortGPT", subject.first_layers(subject.influences(), share))
    left_out("SLEB", subject.first_layers(sleb, share))
    left_out("LLM-Drop, joint", subject.first(ranked, share))
    skip = subject.first(ranked, share)
    note("AdaSkip", judge.judge_call(subject.scaled(skip)), subject.removed(skip))
    threshold = subject.threshold_for(share)
    if threshold is not None:
        counts = [0, 0]
        judgement = judge.judge_call(subject.by_token(threshold, counts))
        mlp = max(t for n, t in subject.time.items() if n.endswith("mlp"))
        note("FFN-SkipLLM", judgement, counts[0] / counts[1] * mlp / subject.total)
    rng = random.Random(0)
    names, drawn = list(subject.profile.sites), []
    for _ in range(draws):
        skip = subject.first(rng.sample(names, len(names)), share)
        drawn.append((judge.judge(skipc.Plan(skip)), subject.removed(skip)))
    drawn.sort(key=lambda d: d[0].loss)
    note("random (median)", *drawn[len(drawn) // 2])
    return found


@click.command()
@click.option("--profile", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--windows", default=32, show_default=True, help="Of 512 tokens, to judge by, of each kind of text the same number."
)
@click.option("--draws", default=5, show_default=True, help="Of random sets.")
@click.option("--search", default=2, show_default=True, help="Windows that SLEB takes the loss on.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
def main(folder: Path, windows: int, draws: int, search: int, threads: int, path: str | None) -> None:
    """Compare."""
    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2()
    profile = Profile.load(folder)
    profile.check(model)
    effort = EFFORTS[profile.effort]
    text = Text(model, None, None, tokenizer, effort.judged, profile.about["seed"], chats=effort.chats, kept=folder)
    kinds = list(dict.fromkeys(text.kinds))
    members = {kind: [i for i, k in enumerate(text.kinds) if k == kind] for kind in kinds}
    few = [i for kind in kinds for i in members[kind][: windows // len(kinds)]]
    subject = Subject(model, profile, text.given[:48])
    judge = Judge(model, [text.judged[i] for i in few], [text.kinds[i] for i in few])
    record: dict[str, Any] = {"effort": profile.effort, "points": {}}
    sleb = subject.one_by_one(max(e.removed for e in profile.menu), search)
    for entry in profile.menu:
        console.print(f"{entry.name}")
        plan = judge.judge(profile.plan_of(entry))
        console.print(f"  skipc: {entry.removed:.1%} removed, {plan}")
        others_found = baselines(subject, judge, entry.removed, sleb, draws)
        record["points"][entry.name] = {
            "skipc": {**asdict(plan), "removed": entry.removed, "speedup": profile.speedup(entry)}, **others_found
        }  # fmt: skip
        save(path, record)
    table = Table(title=f"perplexity over the whole model's, minus 1 ({windows * 512} tokens not calibrated on)")
    table.add_column("")
    for name in record["points"]:
        table.add_column(f"{name} of sublayer time removed", justify="right")
    for row in dict.fromkeys(n for p in record["points"].values() for n in p):
        cells = [p.get(row) for p in record["points"].values()]
        table.add_row(row, *("-" if c is None else f"{c['loss']:.1%} [{c['low']:.1%}, {c['high']:.1%}]" for c in cells))
    console.print(table)


if __name__ == "__main__":
    main()
