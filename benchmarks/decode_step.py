"""A SmolLM2 decode step: skipc with nothing skipped over Inductor, and how much of its own time a skipped site saves.

Run: python benchmarks/decode_step.py [--dtype bfloat16] [--cache 512]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import click
import torch
from common import check_load, console, interleave, ratio, save
from skipc.runtime.program import Program

import skipc


@click.command()
@click.option("--rounds", default=100, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--cache", "cache_length", default=512, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(rounds: int, threads: int, dtype: str, cache_length: int, path: str | None) -> None:
    """Compare decode steps."""
    from transformers import StaticCache

    from skipc.smollm2 import load_smollm2

    torch.set_num_threads(threads)
    model, _ = load_smollm2(getattr(torch, dtype))
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    # As users call it, the plain backends: the handle of skipc.compile adds its hook check, timed as a run of its own.
    calls = {
        "Inductor": torch.compile(model, isolate_recompiles=True),
        "Inductor again": torch.compile(model, isolate_recompiles=True),
        "skipc": torch.compile(model, backend="skipc", isolate_recompiles=True),
        "skipc.compile": compiled,
    }
    token, prompt = torch.tensor([[35]]), torch.arange(3, 35)[None]
    caches = {name: StaticCache(config=model.config, max_cache_len=cache_length) for name in calls}
    for cache in caches.values():
        model(prompt, past_key_values=cache)

    def step(name: str) -> Any:
        for layer in caches[name].layers:
            layer.cumulative_length.fill_(prompt.shape[1])
        return calls[name](token, past_key_values=caches[name])

    logits = {}
    for name in calls:
        with console.status(f"compiling: {name}"):
            logits[name] = step(name).logits
    same = torch.equal(logits["Inductor"], logits["skipc"])
    load = check_load()
    times = interleave({name: lambda n=name: step(n) for name in calls}, rounds)  # type: ignore[misc]
    record: dict[str, Any] = {
        "dtype": dtype,
        "cache": cache_length,
        "load": load,
        "same_bits": same,
        "ratios": {},
    }
    for name in times:
        value, low, high = ratio(times[name], times["Inductor"])
        record["ratios"][name] = {
            "median_ms": statistics.median(times[name]) * 1e3,
            "ratio": value,
            "low": low,
            "high": high,
        }
        console.print(
            f"{name:>15}: {statistics.median(times[name]) * 1e3:7.2f} ms, {value:.3f} of Inductor "
            f"[{low:.3f}, {high:.3f}]"
        )
    console.print(f"logits of skipc and Inductor have the same bits: {same}")
    record["savings"] = _savings(compiled, lambda: step("skipc.compile"), rounds)
    save(path, record)


Call = tuple[Callable[[list[Any]], Any], list[Any]]


def _region_calls(compiled: skipc.CompiledModel, step: Callable[[], Any]) -> dict[str, Call]:
    """The region call of each site in one step: its function and arguments."""
    caught: list[Any] = []
    measure = Program.measure

    def spy(program: Program, inputs: Any, arms: Any) -> Any:
        scope, calls = dict(zip(program.spec.inputs, inputs, strict=True)), {}
        for s in program.spec.steps:
            arm = s.arms[0]
            assert arm.region is not None
            arguments = [scope[n] for n in arm.inputs]
            results = program.functions[arm.region](list(arguments))
            scope.update(zip(arm.outputs, results, strict=True))
            calls.update(dict.fromkeys(s.sites, (program.functions[arm.region], arguments)))
        caught.append(calls)
        return measure(program, inputs, arms)

    Program.measure = spy  # type: ignore[method-assign]
    try:
        with compiled.session(measure=True):
            step()
    finally:
        Program.measure = measure  # type: ignore[method-assign]
    return caught[0]


def _savings(compiled: skipc.CompiledModel, step: Callable[[], Any], rounds: int) -> list[dict[str, Any]]:
    """Time saved by skipping k sites, over the time that calling those sites' regions one after the other takes."""
    calls = _region_calls(compiled, step)
    mlps = [n for n in calls if n.endswith(".mlp")]
    attentions = [n for n in calls if n.endswith(".self_attn")]
    plans = {
        "10 MLPs": (mlps[5:15], None),
        "all MLPs": (mlps, None),
        "10 attentions, kv none": (attentions[5:15], "none"),
        "all attentions, kv none": (attentions, "none"),
        "10 layers, kv none": (mlps[5:15] + attentions[5:15], "none"),
        "10 attentions, kv project": (attentions[5:15], None),
    }
    results = []
    for label, (skip, kv) in plans.items():

        def skipping(skip: list[str] = skip, kv: Any = kv) -> Any:
            with compiled.session(skip=skip, kv=kv):
                return step()

        def running() -> Any:
            with compiled.session():
                return step()

        def alone(skip: list[str] = skip) -> None:
            for name in skip:
                function, arguments = calls[name]
                function(list(arguments))

        times = interleave({"run": running, "skip": skipping, "alone": alone}, rounds)
        run, without, own = (statistics.median(times[n]) for n in ("run", "skip", "alone"))
        results.append(
            {
                "plan": label,
                "saved_ms": (run - without) * 1e3,
                "own_ms": own * 1e3,
                "share": (run - without) / own,
            }
        )
        console.print(
            f"{label:>26}: saves {(run - without) * 1e3:6.2f} ms of the {own * 1e3:6.2f} ms "
            f"that these regions take alone: {(run - without) / own:.1%}"
        )
    return results


if __name__ == "__main__":
    main()
