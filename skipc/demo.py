"""The demo: SmolLM2 under Inductor and under skipc, in one run, then with a few sites skipped and what that costs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from skipc.calibration.measure import SiteMeasurement, measure_sites, perplexity
from skipc.calibration.text import english_text, token_windows
from skipc.dynamo import compile_isolated
from skipc.loading import load_smollm2
from skipc.model import CompiledModel
from skipc.model import compile as compile_model
from skipc.runtime.decoder import cache_argument

PROMPT = "Explain in a few sentences why the sky is blue."
console = Console(width=120)


@dataclass
class Run:
    """One way of running the model."""

    label: str
    call: Callable[..., Any]
    skip: frozenset[str] = frozenset()
    compile_seconds: float | None = None
    ms_per_token: float = 0.0
    tokens: tuple[int, ...] = ()
    perplexity: float | None = None


def main(out: Path, new_tokens: int = 48, threads: int | None = None) -> dict[str, Any]:
    """Run the demo, print its tables and write ``demo.png`` and ``demo.json`` into ``out``."""
    torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    out.mkdir(parents=True, exist_ok=True)
    console.rule("skipc demo")
    console.print(f"SmolLM2-135M-Instruct, fp32, batch 1, static cache, {torch.get_num_threads()} threads")
    model, tokenizer = load_smollm2()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(chat, return_tensors="pt").input_ids
    with torch.no_grad():
        _start_inductor()
        inductor = compile_isolated(model)
        compiled = compile_model(model, fullgraph=True, on_error="raise")
        runs = [Run("Inductor", inductor), Run("skipc, nothing skipped", compiled)]
        for run in runs:
            with console.status(f"{run.label}: compiling prefill and decode, caches empty ..."):
                run.compile_seconds = _cold(run.call, model, prompt, new_tokens)
            console.print(f"{run.label}: first prefill and first decode step took {run.compile_seconds:.1f} s")
        sites, runs = _with_skips(compiled, tokenizer, runs)
        _time(runs, model, prompt, new_tokens)
    _tables(runs, sites, tokenizer)
    picture = _picture(sites, runs, out / "demo.png")
    record = {
        "threads": torch.get_num_threads(),
        "runs": [{k: v for k, v in asdict_run(r).items() if k != "call"} for r in runs],
        "sites": [asdict(s) for s in sites],
    }
    (out / "demo.json").write_text(json.dumps(record, indent=1))
    if picture:
        console.print(f"picture: {picture}")
    console.print(f"figures: {out / 'demo.json'}")
    return record


def asdict_run(run: Run) -> dict[str, Any]:
    """A run as plain data."""
    return {**run.__dict__, "skip": sorted(run.skip)}


def _start_inductor() -> None:
    """Inductor's own start-up, once a process (tool chain checks, worker processes), so that neither peer pays it."""
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()))(torch.randn(2, 8))


def _session(run: Run) -> Any:
    from contextlib import nullcontext

    return run.call.session(skip=run.skip) if isinstance(run.call, CompiledModel) else nullcontext()


def _new_cache(model: Any, prompt: torch.Tensor, new_tokens: int) -> dict[Any, Any]:
    from transformers import StaticCache

    return {cache_argument(model): StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)}


def _cold(call: Callable[..., Any], model: Any, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds of the first prefill and first decode step, with Inductor's caches in a new folder."""
    from torch._inductor.utils import fresh_cache

    cache = _new_cache(model, prompt, new_tokens)
    with fresh_cache():
        start = time.perf_counter()
        logits = call(prompt, **cache, logits_to_keep=1).logits
        call(logits[:, -1:].argmax(-1), **cache, logits_to_keep=1)
        return time.perf_counter() - start


def _with_skips(compiled: CompiledModel, tokenizer: Any, runs: list[Run]) -> tuple[list[SiteMeasurement], list[Run]]:
    """Measure every site on one half of the text, choose by loss per millisecond saved, judge on the other half."""
    text = english_text()
    half = len(text) // 2
    calibration = token_windows(tokenizer, text[:half], 256, 2)
    held_out = token_windows(tokenizer, text[half:], 256, 8)
    with console.status("compiling the scoring pass ..."):
        perplexity(compiled, held_out[:1])
    sites = measure_sites(
        compiled,
        calibration,
        lambda s: track(s, "skipping each site in turn, without recompiling", console=console),
    )
    order = sorted(sites, key=lambda s: max(s.loss, 0.0) / max(s.saved, 1e-3))  # loss for each millisecond saved
    for count in (2, 4, 8):
        runs.append(
            Run(
                f"skipc, {count} of {len(sites)} sites skipped",
                compiled,
                frozenset(s.name for s in order[:count]),
            )
        )
    with Progress(console=console, transient=True) as progress:
        for run in progress.track(runs[1:], description="perplexity on held-out text"):
            with _session(run):
                run.perplexity = perplexity(run.call, held_out)
    runs[0].perplexity = perplexity(runs[0].call, held_out)
    return sites, runs


def _time(runs: list[Run], model: Any, prompt: torch.Tensor, new_tokens: int) -> None:
    """Decode greedily with all runs in turn, a token each, so that the machine's drift hits all alike."""
    caches = [_new_cache(model, prompt, new_tokens) for _ in runs]
    times: list[list[float]] = [[] for _ in runs]
    last = []
    for run, cache in zip(runs, caches, strict=True):
        with _session(run):
            last.append(run.call(prompt, **cache, logits_to_keep=1).logits[:, -1:].argmax(-1))
        run.tokens = (int(last[-1]),)
    for _ in track(range(new_tokens - 1), "decoding, one token each in turn", console=console):
        for i, run in enumerate(runs):
            with _session(run):
                start = time.perf_counter()
                last[i] = run.call(last[i], **caches[i], logits_to_keep=1).logits[:, -1:].argmax(-1)
                times[i].append(time.perf_counter() - start)
            run.tokens += (int(last[i]),)
    for run, seconds in zip(runs, times, strict=True):
        run.ms_per_token = statistics.median(seconds[3:]) * 1e3


def _tables(runs: list[Run], sites: list[SiteMeasurement], tokenizer: Any) -> None:
    base = runs[0]
    table = Table(title="Prompt: " + PROMPT)
    for column in (
        "",
        "cold compile",
        "ms per token",
        "against Inductor",
        "tokens as Inductor",
        "perplexity",
        "ratio",
    ):
        table.add_column(column, justify="left" if not column else "right")
    assert base.perplexity is not None
    for run in runs:
        assert run.perplexity is not None
        same = sum(a == b for a, b in zip(run.tokens, base.tokens, strict=True))
        table.add_row(
            run.label,
            f"{run.compile_seconds:.1f} s" if run.compile_seconds is not None else "none",
            f"{run.ms_per_token:.2f}",
            f"{base.ms_per_token / run.ms_per_token:.2f}x",
            "identical" if run.tokens == base.tokens else f"{same} of {len(base.tokens)}",
            f"{run.perplexity:.2f}",
            f"{run.perplexity / base.perplexity:.3f}",
        )
    console.print(table)
    for run in runs[1:]:
        console.print(f"[bold]{run.label}:[/bold] {', '.join(sorted(run.skip)) or 'every site runs'}")
        console.print(tokenizer.decode(run.tokens, skip_special_tokens=True).strip(), markup=False)


def _picture(sites: list[SiteMeasurement], runs: list[Run], path: Path) -> Path | None:
    try:
        import matplotlib
    except ImportError:
        console.print("no picture: pip install 'skipc[report]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    skipped = next(r.skip for r in runs if len(r.skip) == 4)
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(11, 8.5), sharex=True, layout="constrained")
    colors = {"attention": "#3b6ea5", "mlp": "#d98e32"}
    for kind, color in colors.items():
        at = [i for i, s in enumerate(sites) if s.kind == kind]
        top.bar(at, [sites[i].milliseconds for i in at], color=color, label=kind)
        middle.plot(at, [sites[i].similarity for i in at], "o-", color=color, markersize=4, label=kind)
        bottom.bar(at, [max(sites[i].loss * 100, 1e-2) for i in at], color=color, label=kind)
    for axis in (top, middle, bottom):
        for i, site in enumerate(sites):
            if site.name in skipped:
                axis.axvspan(i - 0.5, i + 0.5, color="#8fbf8f", alpha=0.5, lw=0, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    top.set_ylabel("time, ms (256 tokens)")
    top.set_title("SmolLM2-135M: every sublayer's time, similarity and loss. Green: the four skipped in the table")
    top.margins(y=0.18)  # room for the legend
    top.legend(frameon=False, ncols=2)
    middle.set_ylabel("cosine of the stream,\nbefore and after")
    bottom.set_ylabel("perplexity lost when\nskipped alone, %")
    bottom.set_yscale("log")
    bottom.set_xlabel("layer")
    bottom.set_xticks(range(0, len(sites), 4), [str(sites[i].layer) for i in range(0, len(sites), 4)])
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
