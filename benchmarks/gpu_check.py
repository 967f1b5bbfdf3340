"""Everything about GPUs that cannot be known without one, in one report: whether kernels and whole models are right
there, how fast each kernel is beside the memory's speed, and how fast decode steps are beside what users would run
instead.

Writes ``gpu_check.json`` and ``gpu_check.md`` to ``--out``, which are whole after each part. With ``--simulate`` the
same code runs on the CPU, on a small model, with kernels interpreted: that shows that the script works, and nothing
else.

Run: python benchmarks/gpu_check.py [--out skipc-out] [--dtype bfloat16] [--skip-tests] [--simulate]
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import triton
from common import console
from skipc.kernels.device import simulated, wait_for
from skipc.kernels.gpu.catalog import DTYPES, cases
from skipc.kernels.gpu.kernel import arch_of_device, forced
from skipc.kernels.gpu.model import floor
from skipc.kernels.gpu.offline import ARCHS
from skipc.kernels.tables import Choice, tables_of
from skipc.runtime.decoder import Decoder

import skipc
from skipc.adapters.adapter import Adapter, LoRA
from skipc.calibration.timing import ratio
from skipc.loading import load_smollm2
from skipc.tunable_gpu import cold_clock

ROOT = Path(__file__).parent.parent
SMALL = {"lora_rows": Choice(constants={"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_R": 16, "SPLIT_K": 0})}


class Report:
    """What was found so far, written after each part."""

    def __init__(self, out: Path, device: str):
        self.out, self.device = out, device
        self.parts: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """A part; what goes wrong in it is its result, and the others go on."""
        console.rule(name)
        found: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            yield found
        except Exception as error:
            found["failed"] = f"{type(error).__name__}: {error}"
            console.print_exception()
        found["seconds"] = round(time.perf_counter() - start, 1)
        self.parts[name] = found
        (self.out / "gpu_check.json").write_text(json.dumps({"device": self.device, **self.parts}, indent=1))
        (self.out / "gpu_check.md").write_text(self.markdown())

    def markdown(self) -> str:
        """The report in words."""
        lines = [f"# skipc on {self.device}", ""]
        for name, found in self.parts.items():
            lines += [f"## {name}", ""]
            for key, value in found.items():
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    head = list(dict.fromkeys(key for row in value for key in row))
                    lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
                    lines += ["| " + " | ".join(str(row.get(h, "")) for h in head) + " |" for row in value]
                    lines.append("")
                else:
                    lines.append(f"* {key}: {value}")
            lines.append("")
        return "\n".join(lines)


def wall(device: str, run: Callable[[], Any]) -> float:
    """Seconds of one run, as the host sees it."""
    wait = wait_for(torch.device(device))
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def run_tests(found: dict[str, Any], simulate: bool) -> None:
    """The tests of kernels and models, on the device."""
    environment = {**os.environ, **({} if simulate else {"SKIPC_TEST_DEVICE": "cuda"})}
    where = ["tests/kernels/test_gpu_mlp.py"] if simulate else ["tests/gpu", "tests/kernels", "-k", "gpu"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *where], cwd=ROOT,
                          env=environment, capture_output=True, text=True)  # fmt: skip
    lines = done.stdout.strip().splitlines()
    found["tests"] = lines[-1] if lines else done.stderr[-500:]
    found["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    console.print(found)


def time_kernels(found: dict[str, Any], arch: str, device: str, simulate: bool, rounds: int) -> None:
    """Each kernel at the sizes that it has in models, beside the time that its bytes need."""
    known, cold, rows = ARCHS.get(arch), cold_clock(device), []
    for case in cases(arch, DTYPES[:1] if not simulate else (torch.float32,)):
        if simulate and not (case.launch.kernel.name == "lora_rows" and case.name.startswith("smollm2, 1 row")):
            continue
        run = case.prepare(device)
        run()
        took = statistics.median(cold(run) for _ in range(rounds))
        row = {"kernel": case.launch.kernel.name, "case": case.name, "us": round(took * 1e6, 2),
               "GB/s": round(case.launch.moved / took / 1e9, 1)}  # fmt: skip
        if known is not None:
            row["times the floor"] = round(took / floor(case.launch, known), 2)
        rows.append(row)
        console.print(row)
    found["kernels"] = rows


def small_model() -> Any:
    """For simulation."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def random_adapters(model: torch.nn.Module, count: int, rank: int = 16) -> list[Adapter]:
    """On all linear layers but the head."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        layers = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
                n, k = module.weight.shape
                a, b = (torch.randn(*s, generator=generator) / 30 for s in ((rank, k), (n, rank)))
                layers[path] = LoRA(a, b, 1.0)
        made.append(Adapter(f"a{i}", layers))
    return made


class Peer:
    """Decode steps of a compiled or eager model."""

    def __init__(self, model: Any, call: Any, batch: int, context: int):
        ids = torch.arange(1, batch * context + 1, device=next(model.parameters()).device).view(batch, -1) % 200
        self.decoder = Decoder(model, call, batch, 256, padded=False)
        self.decoder.fix_sizes()
        self.token = self.decoder.prefill(ids, None).argmax(-1)

    def step(self) -> torch.Tensor:
        self.token = self.decoder.decode(self.token, watched=False).argmax(-1)
        return self.token

    def rewind(self, context: int) -> None:
        for layer in self.decoder.cache.layers:
            layer.cumulative_length.fill_(context)


def time_models(found: dict[str, Any], model: Any, device: str, batch: int, rounds: int, simulate: bool) -> None:
    """Decode steps: eager, Inductor with CUDA graphs, and skipc exact, with adapters, with sublayers skipped, and with
    policies; and whether greedy tokens are eager's."""
    context, steps = (8, 4) if simulate else (128, 16)
    bank = skipc.AdapterBank(model, slots=8, max_rank=16)
    adapters = random_adapters(model, 8)
    for adapter in adapters:
        bank.load(adapter.name, adapter)
    rows = [adapters[i % 8].name for i in range(batch)]
    exact, banked = skipc.compile(model, fullgraph=True), skipc.compile(model, fullgraph=True, adapters=bank)
    sites = [s.name for s in skipc.find_sites(model, input_ids=torch.ones(1, 4, dtype=torch.long, device=device)).sites]
    skipped = [name for name in sites if name.endswith("mlp")][1::4]
    calls: dict[str, tuple[Any, Callable[[], Any] | None]] = {
        "eager": (model, None),
        "skipc exact": (exact, None),
        "skipc exact again": (exact, None),
        "skipc, bank, nobody": (banked, None),
        f"skipc, {batch} rows with adapters": (banked, lambda: banked.session(adapters=rows)),
        f"skipc, {len(skipped)} of {len(sites)} sublayers skipped": (exact, lambda: exact.session(skip=skipped)),
        "skipc, all similarities measured": (exact, lambda: exact.session(policy=skipc.Observe())),
        "skipc, every second MLP skipped by decisions on the device": (
            exact, lambda: exact.session(policy=skipc.FFNSkip(-1.0, 0, 0, warmup=0, stride=1))
        ),
    }  # fmt: skip
    if not simulate:
        calls["Inductor, reduce-overhead"] = (torch.compile(model, mode="reduce-overhead"), None)
    peers = {name: Peer(model, call, batch, context) for name, (call, _) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds + 2):
        for name, peer in peers.items():
            session = calls[name][1]
            with ExitStack() as stack:
                if session is not None:
                    stack.enter_context(session())
                peer.rewind(context)
                for _ in range(1 if simulate else 3):
                    peer.step()
                took = wall(device, lambda p=peer: [p.step() for _ in range(steps)]) / steps
            if turn > 1 or simulate:
                times[name].append(took)
    table = []
    for name, taken in times.items():
        against, low, high = ratio(taken, times["skipc exact"])
        row: dict[str, Any] = {"model": name, "ms": round(statistics.median(taken) * 1e3, 3),
                               "of skipc exact": f"{against:.3f} [{low:.3f}, {high:.3f}]"}  # fmt: skip
        repeated = peers[name].decoder.replay._repeated
        graphs = getattr(repeated, "graphs", None)
        if graphs is not None and graphs._captured:
            launches = list(graphs._captured.values())[-1].launches
            row["launches"] = ", ".join(f"{n} {k}" for k, n in Counter(x.kernel.name for x in launches).items())
            row["MB moved"] = round(sum(x.moved for x in launches) / 1e6, 2)
        table.append(row)
        console.print(row)
    found[f"decode steps, batch {batch}, context {context}"] = table
    given = torch.arange(1, 2 * context + 1, device=device).view(2, -1) % 200
    new = 4 if simulate else 64
    ours = skipc.generate(exact, given, max_new_tokens=new, eos_token_id=None)
    eager = model.generate(given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    found["greedy tokens that are eager's"] = f"{int((ours == eager).sum()) - given.numel()} of {2 * new}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("skipc-out"), show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--batches", default="1,8", show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--skip-tests", is_flag=True, help="Go straight to the timings.")
@click.option("--simulate", is_flag=True, help="On the CPU, to see that the script works.")
def main(out: Path, dtype: str, batches: str, rounds: int, skip_tests: bool, simulate: bool) -> None:
    """Entry point."""
    if not simulate and not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here; --simulate shows that this script works")
    device = "cpu" if simulate else "cuda"
    name = "a simulated GPU (times mean nothing)" if simulate else torch.cuda.get_device_name()
    report = Report(out, name)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if simulate:
            stack.enter_context(simulated())
            stack.enter_context(forced(SMALL))
            rounds, batches, dtype = 2, "2", "float32"
        arch = "sm_90" if simulate else arch_of_device(torch.cuda.current_device())
        with report.part("Machine") as found:
            found |= {"device": name, "architecture": arch, "torch": torch.__version__, "triton": triton.__version__,
                      "python": platform.python_version(), "CUDA": torch.version.cuda, "HIP": torch.version.hip,
                      "tables": ", ".join(t.measured or "shipped" for t in tables_of(arch)) or "none"}  # fmt: skip
        if not skip_tests:
            with report.part("Correctness") as found:
                run_tests(found, simulate)
        with report.part("Kernels") as found:
            time_kernels(found, arch, device, simulate, rounds)
        for batch in map(int, batches.split(",")):
            with report.part(f"Models, batch {batch}") as found:
                model = small_model() if simulate else load_smollm2(getattr(torch, dtype))[0].to(device)
                time_models(found, model, device, batch, rounds, simulate)
        if not simulate:
            with report.part("Models, fp32") as found:
                time_models(found, load_smollm2(torch.float32)[0].to(device), device, 1, rounds, simulate)
    console.print(f"report: {out / 'gpu_check.md'}")


if __name__ == "__main__":
    main()
