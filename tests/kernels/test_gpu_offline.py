"""All kernels with all constants that are shipped, compiled for GPUs that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels.device import simulated
from skipc.kernels.gpu import lora
from skipc.kernels.gpu.catalog import DTYPES, KERNELS, Case, cases
from skipc.kernels.gpu.kernel import forced, launch, pick, recorded
from skipc.kernels.gpu.linear import LINEAR
from skipc.kernels.gpu.offline import ARCHS, Arch, Binary, compiled, form
from skipc.kernels.tables import SHIPPED, Choice, Table, choose, folder, forget, tables_of

from skipc.ir.errors import ConfigError

PRODUCTS = {"decode_attention", "prefill_attention", "lora_tiles", "merge_weights"}  # by tensor cores


def different(arch: Arch, dtype: torch.dtype) -> list[Case]:
    return list({form(case.launch): case for case in cases(arch.name, (dtype,))}.values())


# fp16 compiles to what bf16 does, with other instructions of the same form.
OFTEN_AND_SELDOM = [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", OFTEN_AND_SELDOM, ids=str)
@pytest.mark.parametrize("name", ARCHS)
def test_nothing_spills_and_everything_fits(name: str, dtype: torch.dtype) -> None:
    arch, wrong = ARCHS[name], []
    for case in different(arch, dtype):
        made: Binary = compiled(case.launch, arch)
        of, few = case.launch.kernel.name, case.launch.sizes.get("rows", 2) == 1
        fine = made.spills == 0 and made.shared <= arch.shared and made.programs(arch) >= 1
        half = case.dtype != torch.float32
        if of in PRODUCTS or (of in ("mlp_rows", "linear_rows") and not few):
            fine &= made.tensor > 0 or not half
        if of in ("lora_rows", "mlp_rows", "linear_rows", "add_norm", "decode_attention"):
            fine &= made.wide > 0
        if not fine:
            wrong.append((of, case.name, case.dtype, made))
    assert not wrong


@pytest.mark.parametrize("split", [0, 1, 8])
def test_what_tables_do_not_ship_compiles_too(split: int) -> None:
    """Constants that change what is compiled, not only its sizes."""
    run = lora.example(2, 64, (32, 16), torch.bfloat16)("meta")
    constants = {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 16, "SPLIT_K": split}
    with recorded() as launches, forced({"lora_rows": Choice(constants=constants)}):
        run()
    assert compiled(launches[0], ARCHS["sm_90"]).spills == 0


def test_tables_are_for_these_kernels() -> None:
    for name in ARCHS:
        table = Table.read(SHIPPED / f"{name}.json")
        assert table.kernels.keys() == KERNELS.keys()
        for of, entry in table.kernels.items():
            kernel = KERNELS[of]
            assert entry.source == kernel.source, f"{of} has changed: run benchmarks/kernel_tables.py again"
            for row in entry.rows:
                assert set(row.when) <= set(kernel.sizes)
                assert row.constants.keys() == kernel.space.keys() - {"warps", "stages"}


def test_every_size_has_a_row() -> None:
    for name in ARCHS:
        for case in cases(name, DTYPES):
            kernel, sizes = case.launch.kernel, case.launch.sizes
            assert any(t.find(kernel.name, kernel.source, sizes) for t in tables_of(name)), (name, case.name)


class TestTables:
    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("SKIPC_TABLES", str(tmp_path))
        forget()
        yield
        forget()

    SIZES = (("rows", 1), ("k", 64), ("n", 64), ("bits", 16))

    def write(self, arch: str, source: str, rows: list[dict[str, Any]]) -> None:
        content = {"format": 1, "arch": arch, "kernels": {"linear_rows": {"source": source, "rows": rows}}}
        (folder() / f"{arch}.json").write_text(json.dumps(content))
        forget()

    def chosen(self, arch: str) -> Choice:
        return choose(LINEAR.name, LINEAR.source, LINEAR.default, arch, self.SIZES)

    def test_own_tables_go_first_and_the_first_row_that_holds(self) -> None:
        shipped = self.chosen("sm_90")
        mine = {"constants": dict(LINEAR.default.constants), "warps": 8, "stages": 1}
        self.write(
            "sm_90", LINEAR.source, [{"when": {"rows": [2, 16]}, **mine}, {"when": {"k": [1, 64]}, **mine, "warps": 2}]
        )
        assert self.chosen("sm_90").warps == 2
        self.write("sm_90", LINEAR.source, [{"when": {"rows": [2, 16]}, **mine}])
        assert self.chosen("sm_90") == shipped

    def test_an_unknown_device_gets_safe_defaults_and_a_word(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.chosen("sm_75") == LINEAR.default
        assert self.chosen("sm_75") == LINEAR.default
        assert caplog.text.count("no table of kernels for sm_75") == 1

    def test_a_table_for_other_code_is_not_used(self, caplog: pytest.LogCaptureFixture) -> None:
        shipped = self.chosen("sm_90")
        self.write("sm_90", "0" * 12, [{"when": {}, "constants": {}, "warps": 1}])
        assert self.chosen("sm_90") == shipped
        assert "run `skipc autotune` again" in caplog.text

    @pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "arch": "sm_90", "kernels": {}}',
                                      '{"format": 1, "arch": "sm_80", "kernels": {}}'])  # fmt: skip
    def test_a_damaged_table_is_an_error_that_names_it(self, text: str) -> None:
        (folder() / "sm_90.json").write_text(text)
        forget()
        with pytest.raises(ConfigError, match="sm_90"):
            self.chosen("sm_90")

    def test_a_row_that_chooses_by_what_there_is_not(self) -> None:
        self.write("sm_90", LINEAR.source, [{"when": {"moon": [1, 2]}, "constants": {}}])
        with pytest.raises(ConfigError, match="'moon'"):
            self.chosen("sm_90")

    def test_a_row_with_other_constants_is_an_error(self) -> None:
        self.write("sm_90", LINEAR.source, [{"when": {}, "constants": {"BLOCK_N": 16}}])
        with pytest.raises(ConfigError, match="linear_rows takes"):
            self.chosen("sm_90")


def test_kernels_are_not_for_the_cpu() -> None:
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="on the CPU"):
        launch(LINEAR, LINEAR.default, (1,), {"x": x}, sizes={}, moved=0)


def test_launches_of_nothing_are_none() -> None:
    with simulated(), recorded() as launches:
        launch(LINEAR, LINEAR.default, (0,), {"x": torch.zeros(0)}, sizes={}, moved=0)
    assert not launches


def test_the_architecture_that_is_simulated_chooses() -> None:
    x, sizes = torch.zeros(4), {"rows": 1, "k": 64, "n": 64, "bits": 32}
    with simulated("sm_75"):
        assert pick(LINEAR, x, **sizes) == LINEAR.default
