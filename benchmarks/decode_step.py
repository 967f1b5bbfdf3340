"""A SmolLM2 decode step: skipc with nothing skipped over Inductor, and how much of its own time a skipped site saves.

Run: python benchmarks/decode_step.py [--dtype bfloat16] [--cache 512]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from common import check_load, console, interleave, save
from skipc.runtime.chaining import chains_of
from skipc.runtime.program import Program

import skipc
from skipc.calibration.timing import ratio


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

    from skipc.loading import load_smollm2

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
    times = interleave({name: lambda n=name: step(n) for name in calls}, rounds, burst=4)  # type: ignore[misc]
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


def _captured(compiled: skipc.CompiledModel, step: Callable[[], Any]) -> tuple[Program, dict[str, Any]]:
    """The program of one step, and all its variables."""
    caught: list[Any] = []
    measure = Program.measure

    def spy(program: Program, inputs: Any, arms: Any) -> Any:
        scope = dict(zip(program.spec.inputs, inputs, strict=True))
        for s in program.spec.steps:
            arm = s.arms[0]
            assert arm.region is not None
            scope.update(zip(arm.outputs, program.functions[arm.region]([scope[n] for n in arm.inputs]), strict=True))
        caught[:] = program, scope
        return measure(program, inputs, arms)

    Program.measure = spy  # type: ignore[method-assign]
    try:
        with compiled.session(measure=True):
            step()
    finally:
        Program.measure = measure  # type: ignore[method-assign]
    return caught[0], caught[1]


def _alone(program: Program, scope: dict[str, Any], sites: list[str]) -> list[Callable[[], Any]]:
    """Calls that run ``sites`` and nothing else, joined as the program joins them."""
    arms = program.arms_for(program.site_names - set(sites), "none")
    chains = chains_of(program.spec, arms)
    calls: list[Callable[[], Any]] = []
    for c in chains:
        function = c.function()
        parameters, others = ([scope[n] for n in names] for names in (c.parameters, c.others))
        calls.append(lambda f=function, x=scope[c.entry], p=parameters, o=others: f(x, p, o))  # type: ignore[misc]
    for i, (s, index) in enumerate(zip(program.spec.steps, arms, strict=True)):
        arm = s.arms[index]
        if arm.region is not None and set(s.sites) & set(sites) and not any(c.first <= i <= c.last for c in chains):
            arguments = [scope[n] for n in arm.inputs]
            calls.append(lambda f=program.functions[arm.region], a=arguments: f(list(a)))  # type: ignore[misc]
    return calls


def _savings(compiled: skipc.CompiledModel, step: Callable[[], Any], rounds: int) -> list[dict[str, Any]]:
    """Time saved by skipping k sites, over the time that running those sites alone takes."""
    program, scope = _captured(compiled, step)
    mlps = [n.name for n in program.spec.sites if n.name.endswith(".mlp")]
    attentions = [n.name for n in program.spec.sites if n.name.endswith(".self_attn")]
    plans = {
        "10 MLPs": (mlps[5:15], None),
        "all MLPs": (mlps, None),
        "10 attentions, kv none": (attentions[5:15], "none"),
        "all attentions, kv none": (attentions, "none"),
        "10 layers, kv none": ([n for pair in zip(attentions[5:15], mlps[5:15], strict=True) for n in pair], "none"),
        "10 attentions, kv project": (attentions[5:15], None),
        "all attentions, kv project": (attentions, None),
    }
    results = []
    for label, (skip, kv) in plans.items():
        # By themselves, but without what one call costs whatever it runs: twice the difference of all and half of them.
        all_calls, half_calls = _alone(program, scope, skip), _alone(program, scope, skip[: len(skip) // 2])

        def alone(calls: list[Callable[[], Any]] = all_calls) -> None:
            for call in calls:
                call()

        def half(calls: list[Callable[[], Any]] = half_calls) -> None:
            for call in calls:
                call()

        # Each after a whole step, which leaves the caches of the machine in the same state for all three. Sessions
        # are opened off the clock: once a request, not once a step.
        whole, without = compiled.session(), compiled.session(skip=skip, kv=kv)
        times: dict[str, list[float]] = {"run": [], "skip": [], "alone": [], "half": []}
        for i in range(rounds + 3):
            for name, session, call in (
                ("run", whole, step),
                ("skip", without, step),
                ("alone", whole, alone),
                ("half", whole, half),
            ):
                step()
                with session:
                    start = time.perf_counter()
                    call()
                    took = time.perf_counter() - start
                if i >= 3:
                    times[name].append(took)
        saved = [r - s for r, s in zip(times["run"], times["skip"], strict=True)]
        own = [2 * (a - h) for a, h in zip(times["alone"], times["half"], strict=True)]
        share, low, high = ratio(saved, own)
        own_ms = statistics.median(own) * 1e3
        results.append({"plan": label, "own_ms": own_ms, "share": share, "low": low, "high": high})
        console.print(
            f"{label:>26}: saves {share:6.1%} [{low:.1%}, {high:.1%}] of the {own_ms:5.2f} ms that these regions "
            "take alone"
        )
    return results


if __name__ == "__main__":
    main()
