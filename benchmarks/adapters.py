"""SmolLM2 with 8 LoRA adapters of rank 16 on all linear layers: decode steps with rows that choose among them, beside
the base model and PEFT; adapters merged into the weights; what a switch costs, and what the bank takes.

Peers take turns in one process. ``base`` is skipc exact without a bank; ``none`` has a bank, and no row wants anything.
PEFT runs as users run it: ``adapter_names`` for rows that differ, ``set_adapter`` for one adapter. Compiling PEFT's
model takes long, so that it is compared with on the first layers alone, with all peers cut likewise.

Run: python benchmarks/adapters.py [--dtype bfloat16] [--batch 1] [--layers 4]
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import click
import torch
from common import check_load, console, resident, save
from rich.table import Table
from skipc.runtime.decoder import Decoder

import skipc
from skipc.adapters.adapter import Adapter
from skipc.calibration.timing import ratio
from skipc.ir.adapters import operands_of
from skipc.loading import load_smollm2

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT, CACHE = 128, 256


def base_model(dtype: str, layers: int) -> Any:
    """SmolLM2, or its first layers."""
    model, _ = load_smollm2(getattr(torch, dtype))
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def bank_of(model: Any, adapters: Collection[Adapter], max_rank: int) -> skipc.AdapterBank:
    """With a slot for each adapter."""
    bank = skipc.AdapterBank(model, slots=len(adapters), max_rank=max_rank)
    for adapter in adapters:
        bank.load(adapter.name, adapter)
    return bank


def with_adapters(base: Any, count: int, rank: int) -> Any:
    """PEFT's model of ``base`` with adapters of random numbers, ``a0``, ``a1``, ..."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS)
    model = peft.get_peft_model(base, config, adapter_name="a0").eval()
    for i in range(1, count):
        model.add_adapter(f"a{i}", config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


class Step:
    """A decode step at a context that stays, of the whole batch."""

    def __init__(self, model: Any, call: Callable[..., Any], batch: int):
        from transformers import StaticCache

        self.call, self.token = call, torch.full((batch, 1), 35)
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        call(torch.arange(3, 3 + CONTEXT).expand(batch, -1), past_key_values=self.cache)

    def __call__(self) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(CONTEXT)
        return self.call(self.token, past_key_values=self.cache).logits  # type: ignore[no-any-return]


class Skipc:
    """The same as :func:`skipc.generate` runs it, under a session of its own."""

    def __init__(self, compiled: Any, batch: int, adapters: Any = None, mode: str = "unmerged"):
        self.decoder = Decoder(compiled.model, compiled, batch, CACHE, padded=False)
        self.decoder.fix_sizes()
        wanted = adapters is not None
        self.session = compiled.session(adapters=adapters, adapter_mode=mode) if wanted else nullcontext()
        self.token = torch.full((batch,), 35)
        with self.session:
            self.decoder.prefill(torch.arange(3, 3 + CONTEXT).expand(batch, -1), None)
            for _ in range(4):
                self()

    def __call__(self) -> torch.Tensor:
        for layer in self.decoder.cache.layers:
            layer.cumulative_length.fill_(CONTEXT)
        return self.decoder.decode(self.token, watched=False)


def turns(peers: dict[str, Any], rounds: int, burst: int = 4) -> dict[str, list[float]]:
    """Seconds of each call, in turns of some calls, of which the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds + 1):
        for name, run in peers.items():
            with getattr(run, "session", nullcontext()):  # opened off the clock: once a request
                for j in range(burst):
                    start = time.perf_counter()
                    run()
                    if i and j:
                        times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]], against: str) -> dict[str, Any]:
    """A table of times and of ratios to the peer ``against``."""
    shown, found = Table(title=title), {}
    for column in ("", "ms", f"of {against}"):
        shown.add_column(column, justify="right")
    for name, seconds in times.items():
        value, low, high = ratio(seconds, times[against])
        milliseconds = statistics.median(seconds) * 1e3
        found[name] = {"ms": milliseconds, "ratio": value, "low": low, "high": high}
        shown.add_row(name, f"{milliseconds:.2f}", f"{value:.3f} [{low:.3f}, {high:.3f}]")
    console.print(shown)
    return found


def switches(base: Any, adapters: dict[str, Adapter], slots: int, rank: int) -> dict[str, float]:
    """What the bank takes, and what putting adapters into it does, in seconds."""
    before = resident()
    bank = skipc.AdapterBank(base, slots=slots, max_rank=rank)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    empty = resident()
    for name in list(adapters)[:slots]:
        bank.lease(name).release()
    full = resident()
    choose, evict = [], []
    names = list(adapters)
    for i in range(40):
        start = time.perf_counter()
        bank.lease([names[i % 2]] * 8).release()
        choose.append(time.perf_counter() - start)
    small = skipc.AdapterBank(base, slots=1, max_rank=rank)
    for name, adapter in adapters.items():
        small.load(name, adapter)
    for i in range(40):
        start = time.perf_counter()
        small.lease(names[i % len(names)]).release()
        evict.append(time.perf_counter() - start)
    reserved = sum(t.nbytes for t in operands_of(bank.layers.values()))
    return {
        "reserved_mb": reserved / 1e6,
        "empty_mb": (empty - before) / 1e6,
        "adapters_mb": (full - empty) / 1e6,
        "choose_ms": statistics.median(choose) * 1e3,
        "evict_ms": statistics.median(evict) * 1e3,
    }


@click.command()
@click.option("--rounds", default=20, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--layers", default=0, help="Only the first so many; then PEFT under Inductor is a peer, too.")
@click.option("--rank", default=16, show_default=True)
@click.option("--max-rank", default=64, show_default=True)
@click.option("--count", default=8, show_default=True, help="Adapters.")
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(
    rounds: int,
    threads: int,
    dtype: str,
    batch: int,
    layers: int,
    rank: int,
    max_rank: int,
    count: int,
    path: str | None,
) -> None:
    """Compare decode steps with adapters."""
    torch.set_num_threads(threads)
    model = base_model(dtype, layers)
    peft_model = with_adapters(copy.deepcopy(model), count, rank)
    adapters = {f"a{i}": Adapter.of(peft_model, f"a{i}") for i in range(count)}
    bank = bank_of(model, adapters.values(), max_rank)
    rows = [f"a{i % count}" for i in range(batch)]
    load = check_load()
    plain = skipc.compile(model, fullgraph=True, on_error="raise")
    banked = skipc.compile(model, adapters=bank, fullgraph=True, on_error="raise")
    with console.status("compiling"):
        peers = {
            "base": Skipc(plain, batch),
            "base again": Skipc(plain, batch),
            "none": Skipc(banked, batch),
            "one for all": Skipc(banked, batch, "a0"),
            "merged": Skipc(banked, batch, "a0", "merged"),
            "mixed": Skipc(banked, batch, rows),
        }
        if batch > 3:  # most rows want one
            skewed = ["a0"] * (batch - 2) + ["a1", None]
            peers["skewed"] = Skipc(banked, batch, skewed)
            peers["skewed, mixture"] = Skipc(banked, batch, skewed, "mixture")
    record: dict[str, Any] = {"dtype": dtype, "batch": batch, "layers": layers, "rank": rank, "load": load}
    title = f"{dtype}, batch {batch}, {count} adapters of rank {rank}, {threads} threads"
    record["steps"] = report(title, turns(peers, rounds), "base")
    decisions = {"one for all": bank.explain("a0" if batch == 1 else ["a0"] * batch), "mixed": bank.explain(rows)}
    record["decisions"] = {name: str(decision) for name, decision in decisions.items()}
    console.print(record["decisions"])

    def chosen(**settings: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: peft_model(*args, **kwargs, **settings)

    others: dict[str, Any] = {"mixed": peers["mixed"]}
    if batch > 1:
        others["PEFT"] = Step(peft_model, chosen(adapter_names=rows), batch)
    else:
        peft_model.set_adapter("a0")
        others["PEFT"] = Step(peft_model, peft_model, batch)
    expected = others["PEFT"]()[:, -1].float()
    with peers["mixed"].session:
        found = peers["mixed"]().float()
    worst = float((found - expected).abs().max() / expected.std())
    console.print(f"logits differ from PEFT's by at most {worst:.1e} of their standard deviation")
    if layers:
        call = torch.compile(chosen(adapter_names=rows) if batch > 1 else peft_model)
        with console.status("compiling PEFT's model"):
            others["PEFT under Inductor"] = Step(peft_model, call, batch)
            for _ in range(3):
                others["PEFT under Inductor"]()
    record["peft"] = report(title, turns(others, max(3, rounds // 4)), "mixed")
    record["worst"] = worst
    if not layers:
        record["bank"] = switches(model, adapters, count, max_rank)
        console.print({k: round(v, 3) for k, v in record["bank"].items()})
    save(path, record)


if __name__ == "__main__":
    main()
