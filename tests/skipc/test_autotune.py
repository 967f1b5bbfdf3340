"""Choosing constants by measuring: the engine on timers that are made up, and the command on small layers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from skipc.kernels import native, products, tables
from skipc.kernels.tables import Choice, Entry, Table, cpu_name

from skipc import autotune, tunable
from skipc.autotune import Problem, Sample, measured, ranges, rows_for
from skipc.cli import main
from skipc.ir.errors import ConfigError
from tests.models.zoo import ZOO

CUTS = {"rows": (1,)}


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables for the test alone, which kernels forget with it."""
    monkeypatch.setenv("SKIPC_TABLES", str(tmp_path))
    tables.forget()
    yield tmp_path
    monkeypatch.undo()
    tables.forget()
    native.available()


def choice(number: int) -> Choice:
    return Choice(constants={"TILE": number})


class Bench:
    """A kernel whose runs take what they are said to, with noise; it counts them."""

    def __init__(self, takes: Callable[[int], float], noise: float = 0.05):
        self.takes, self.noise, self.random = takes, noise, random.Random(0)
        self.runs: list[int] = []

    def start(self) -> Callable[[Choice], Sample]:
        def sampler(choice: Choice) -> Sample:
            def sample() -> float:
                tile = choice.constants["TILE"]
                self.runs.append(tile)
                return self.takes(tile) * self.random.lognormvariate(0, self.noise)

            return sample

        return sampler


def problem(bench: Bench, sizes: dict[str, int] | None = None, floor: float = 0.0, tiles: int = 9) -> Problem:
    return Problem(
        kernel="fake",
        source="0123456789ab",
        sizes=sizes or {"rows": 1, "k": 64},
        default=choice(0),
        candidates=tuple(choice(i) for i in range(1, tiles)),
        start=bench.start,
        floor=lambda choice: floor,
        moved=1000,
        label="fake",
        cuts=CUTS,
    )


def test_a_faster_candidate_replaces_the_default() -> None:
    result = autotune.tune(problem(Bench(lambda tile: 0.9 if tile == 5 else 1.0 + 0.01 * tile)))
    assert result.choice == result.finalist == choice(5)
    assert result.low < 0.9 < result.high < 1
    assert result.default_s == pytest.approx(1, rel=0.05)
    assert result.best_s == pytest.approx(0.9, rel=0.05)
    assert result.tried == 8


def test_equal_candidates_leave_the_default() -> None:
    results = [autotune.tune(problem(Bench(lambda tile: 1.0, noise))) for noise in (0.0, 0.01, 0.2)]
    assert all(r.choice == choice(0) and r.best_s == r.default_s for r in results)
    assert all(r.finalist != choice(0) for r in results)


def test_luck_in_the_first_measurement_does_not_count() -> None:
    bench = Bench(lambda tile: 1.0, noise=0.0)
    lucky = (autotune.SCREENING[0] + 1) * 9  # runs of the default and of the first screening
    bench.takes = lambda tile: 0.5 if tile == 3 and len(bench.runs) <= lucky else 1.0
    result = autotune.tune(problem(bench))
    assert result.choice == choice(0)
    assert result.low == result.high == 1


def test_what_cannot_be_better_is_not_measured() -> None:
    bench = Bench(lambda tile: 1.0, noise=0.0)
    result = autotune.tune(problem(bench, floor=0.995))
    assert (result.choice, result.finalist, result.tried) == (choice(0), None, 0)
    assert set(bench.runs) == {0}


def test_measuring_takes_turns() -> None:
    bench = Bench(float)
    sampler = bench.start()
    times = autotune.measure({choice(i): sampler(choice(i)) for i in (1, 2, 3)}, 3)
    assert bench.runs == [1, 2, 3, 3, 2, 1, 1, 2, 3, 3, 2, 1]
    assert [len(t) for t in times.values()] == [3, 3, 3]


def test_a_second_run_measures_nothing(own_tables: Path) -> None:
    benches = [Bench(lambda tile, best=best: 0.5 if tile == best else 1.0) for best in (2, 0, 4)]
    sizes: list[dict[str, int]] = [{"rows": 1, "k": 64}, {"rows": 4, "k": 64}, {"rows": 4, "k": 1000}]
    work = [problem(b, s) for b, s in zip(benches, sizes, strict=True)]
    chosen = [r.choice for r in autotune.autotune(work[:2], "fake-1", "a fake device")]
    assert chosen == [choice(2), choice(0)]
    table = Table.read(own_tables / "fake-1.json")
    assert table.measured == "a fake device"
    counts = [len(b.runs) for b in benches[:2]]
    results = list(autotune.autotune(work, "fake-1", "a fake device"))  # goes on where it was
    assert [r.known for r in results] == [True, True, False]
    assert [r.choice for r in results] == [choice(2), choice(0), choice(4)]
    assert [len(b.runs) for b in benches[:2]] == counts
    assert all(r.known for r in autotune.autotune(work, "fake-1", "a fake device"))
    assert not any(r.known for r in autotune.autotune(work, "fake-1", "a fake device", again=True))
    assert list(autotune.autotune(work, "fake-2", "a fake device", seconds=0)) == []


def test_results_stay_after_each_shape_and_other_kernels_are_left(own_tables: Path) -> None:
    def broken() -> Any:
        raise KeyboardInterrupt

    other = Entry(source="ba9876543210", rows=())
    Table(arch="fake-1", kernels={"other": other}).write(own_tables / "fake-1.json")
    bench = Bench(lambda tile: 0.5 if tile == 2 else 1.0)
    interrupted = problem(bench, {"rows": 2, "k": 64})
    object.__setattr__(interrupted, "start", broken)
    with pytest.raises(KeyboardInterrupt):
        list(autotune.autotune([problem(bench), interrupted], "fake-1", ""))
    table = Table.read(own_tables / "fake-1.json")
    assert table.kernels["other"] == other
    assert table.find("fake", "0123456789ab", {"rows": 1, "k": 64}) == choice(2)
    assert table.find("fake", "0123456789ab", {"rows": 2, "k": 64}) is None


def test_results_for_other_code_are_replaced(own_tables: Path) -> None:
    path = own_tables / "fake-1.json"
    old = rows_for({(1, 64): choice(7), (9, 9): choice(7)}, ["rows", "k"], CUTS)
    Table(arch="fake-1", kernels={"fake": Entry(source="ba9876543210", rows=old)}).write(path)
    (result,) = autotune.autotune([problem(Bench(lambda tile: 0.5 if tile == 2 else 1.0))], "fake-1", "")
    assert not result.known
    entry = Table.read(path).kernels["fake"]
    assert entry.source == "0123456789ab"
    assert measured(entry, ["rows", "k"]) == {(1, 64): choice(2)}


def test_a_damaged_table_is_named(own_tables: Path) -> None:
    (own_tables / "fake-1.json").write_text("{")
    with pytest.raises(ConfigError, match=r"fake-1\.json is no table"):
        list(autotune.autotune([problem(Bench(lambda tile: 1.0))], "fake-1", ""))


def test_ranges_meet_between_what_was_measured() -> None:
    assert ranges([4, 16, 100]) == {4: (2, 8), 16: (9, 40), 100: (41, 200)}
    assert ranges([1, 2, 8], (1,)) == {1: (1, 1), 2: (2, 4), 8: (5, 16)}
    assert ranges([1, 4], (1,)) == {1: (1, 1), 4: (2, 8)}
    assert ranges([16, 32], (15, 16, 31, 32)) == {16: (16, 16), 32: (32, 32)}
    assert ranges([5, 6]) == {5: (3, 5), 6: (6, 12)}
    assert ranges([]) == {}


def test_rows_of_a_table_hold_for_shapes_between() -> None:
    points = {(1, 64): choice(1), (1, 1024): choice(2), (4, 64): choice(3), (4, 70): choice(4)}
    entry = Entry(source="x", rows=rows_for(points, ["rows", "k"], CUTS))
    table = Table(arch="fake-1", kernels={"fake": entry})
    assert measured(entry, ["rows", "k"]) == points

    def find(rows: int, k: int) -> int | None:
        found = table.find("fake", "x", {"rows": rows, "k": k})
        return None if found is None else found.constants["TILE"]

    assert [find(*at) for at in points] == [1, 2, 3, 4]
    assert [find(1, k) for k in (31, 32, 256, 257, 2048, 2049)] == [None, 1, 1, 2, 2, None]
    assert [find(rows, 64) for rows in (1, 2, 3, 8, 9)] == [1, 3, 3, 3, None]
    assert [find(4, k) for k in (65, 66, 67, 140)] == [3, 3, 4, 4]


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_layers_are_joined_as_passes_join_them(name: str) -> None:
    model = ZOO[name].build().to("meta")
    layers = tunable.layers_of(model, input_ids=torch.ones(1, 1, dtype=torch.long, device="meta"))
    expected = {
        "llama": [(64, (64, 32, 32)), (64, (64,)), (64, (128, 128)), (128, (64,)), (64, (96,))],
        "phi3": [(64, (128,)), (64, (64,)), (64, (256,)), (128, (64,)), (64, (96,))],
    }
    assert [(layer.k, layer.parts) for layer in layers] == expected.get(name, expected["llama"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rounds, and layers that any cache holds; on a CPU without tile registers."""
    monkeypatch.setattr(autotune, "SCREENING", (1, 1))
    monkeypatch.setattr(autotune, "ROUNDS", 2)
    monkeypatch.setattr(tunable, "bandwidth", lambda: 1e15)
    monkeypatch.setattr(tunable, "MOST_COPIES", 3)
    with native.without_tiles():
        yield


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["autotune", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.usefixtures("quick")
def test_the_command_tunes_and_kernels_follow(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "ratio", lambda a, b: (0.5, 0.4, 0.6))  # whatever wins is better
    figures = own_tables / "figures.json"
    arguments = ("--shape", "64,48", "--shape", "64,32+16+16", "--rows", "1,9", "--json", str(figures))
    printed = run(*arguments)
    path = own_tables / f"{cpu_name()}.json"
    assert "linear 64x32+16+16 bfloat16, 1 row" in printed
    assert "6 of 6 measured shapes have better constants" in printed  # bf16 layers of 9 rows are torch's
    assert f"table: {path}" in printed
    record = json.loads(figures.read_text())
    assert record["arch"] == cpu_name()
    assert [shape["sizes"] for shape in record["shapes"][:2]] == [
        {"dtype_bits": 32, "rows": rows, "k": 64, "n": 48} for rows in (1, 9)
    ]
    assert native.available() is None
    entry = Table.read(path).kernels[products.KERNEL]
    assert tables.rows_of(products.KERNEL, products.source(), cpu_name()) == entry.rows
    assert set(measured(entry, products.SIZES)) == {
        (b, r, 64, n) for b, r in ((32, 1), (32, 9), (16, 1)) for n in (48, 64)
    }
    stamp = path.read_bytes()
    assert "0 of 0 measured shapes have better constants than the default; 6 were in the table already" in run(
        *arguments
    )
    assert path.read_bytes() == stamp
    assert "6 of 6 measured shapes" in run(*arguments, "--again")
    assert "time was up before 2 others" in run("--shape", "8,8", "--rows", "1", "--seconds", "0")


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.usefixtures("quick")
def test_the_command_reads_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ZOO["llama"].build().save_pretrained(folder)  # type: ignore[operator]
    printed = run("--model", str(folder), "--rows", "2", "--dtype", "float32", "--seconds", "0")
    assert "time was up before 5 others" in printed


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_bf16_has_nothing_to_tune_in_tile_registers(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "tiles", lambda: True)
    work = tunable.Work(tunable.COMMON[:1], (torch.float32, torch.bfloat16), (1, 16))
    assert [p.sizes["dtype_bits"] for p in tunable.cpu_problems(work)] == [32, 32]
    with pytest.raises(ConfigError, match="nothing to tune"):
        tunable.cpu_problems(dataclasses.replace(work, dtypes=(torch.bfloat16,)))


def test_mistakes_are_told_in_a_line(own_tables: Path) -> None:
    def fail(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["autotune", *arguments])
        assert result.exit_code in (1, 2), result.output
        return " ".join(result.output.split())

    assert "'64' is no shape: write K,N or K,N+N+N" in fail("--shape", "64")
    assert "'0,8' is no shape" in fail("--shape", "0,8")
    assert "is no folder" in fail("--model", "gpt5")
    assert "no kernels are tuned on 'tpu', but on cpu" in fail("--device", "tpu")
    assert "rows must be positive" in fail("--rows", "0,1")
    if native.find_compiler() is not None:
        (own_tables / f"{cpu_name()}.json").write_text("{}")
        tables.forget()
        assert f"{cpu_name()}.json is no table of kernels" in fail("--shape", "8,8")


class TestTriton:
    def problems(self) -> list[Problem]:
        from skipc.tunable_gpu import gpu_problems

        layers = (tunable.Layer("qkv", 64, (64, 16, 16)), tunable.Layer("o", 64, (64,)))
        return gpu_problems(tunable.Work(layers, (torch.float32,), (1,)), "sm_90", "cpu")

    def test_every_kernel_has_problems(self) -> None:
        from skipc.kernels.gpu.catalog import KERNELS

        problems = self.problems()
        assert {p.kernel for p in problems} == KERNELS.keys()
        assert len({(p.kernel, tuple(p.sizes.items())) for p in problems}) == len(problems)
        for p in problems:
            assert p.source == KERNELS[p.kernel].source
            assert p.sizes.keys() == set(KERNELS[p.kernel].sizes)
            assert len(p.candidates) > 0
            assert p.default not in p.candidates
            assert p.floor(p.default) > 0

    def test_samples_run_the_kernel_with_the_constants_that_are_tried(self) -> None:
        from skipc.kernels.device import simulated
        from skipc.kernels.gpu.kernel import recorded

        few = next(p for p in self.problems() if p.kernel == "lora_rows" and p.sizes["n"] == 64)
        with simulated():
            sampler = few.start()
            for tried in (few.default, few.candidates[0]):
                sample = sampler(tried)
                with recorded() as launches:
                    assert sample() > 0
                assert [(x.kernel.name, x.choice) for x in launches] == [("lora_rows", tried)]

    def test_without_a_gpu_the_command_says_so(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        result = CliRunner().invoke(main, ["autotune", "--device", "cuda"])
        assert result.exit_code == 1
        assert "there is no GPU here" in result.output
