"""Ways to read weights: all of them give the same bits, and tables choose among them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels import native, products, tables
from skipc.kernels.chain import ENTRY, NOTHING, BoundChain, Links
from skipc.kernels.tables import Choice, Entry, Row, Table, cpu_name

from skipc.ir.errors import ConfigError
from tests.harness import in_threads
from tests.kernels.test_blocks import case, native_block

pytestmark = [
    pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("vectors"),  # in tile registers there is one way
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tables for the test alone, which kernels forget with it."""
    monkeypatch.setenv("SKIPC_TABLES", str(tmp_path))
    tables.forget()
    assert native.available() is None
    yield tmp_path
    monkeypatch.undo()
    tables.forget()
    assert native.available() is None


@pytest.fixture
def vectors() -> Iterator[None]:
    with native.without_tiles():
        yield


def row(choice: Choice, **when: tuple[int, int]) -> Row:
    return Row(when=when, constants=choice.constants)


def check_ways(rows: int, call: Callable[[], Any]) -> None:
    """What ``call`` returns has the same bits whatever the kernels are told."""
    expected = call()
    for choice in products.choices_for(rows):
        with products.using([row(choice, rows=(rows, rows))]):
            found = call()
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b), choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13])
@pytest.mark.parametrize(("width", "heights"), [(576, [96, 40]), (100, [37, 64]), (33, [3, 19]), (7, [1])])
def test_linear_layers_have_the_same_bits(rows: int, width: int, heights: list[int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, sum(heights)).to(dtype)
    weights, norm = [torch.randn(n, width).to(dtype) for n in heights], torch.rand(width).to(dtype)
    none = [None] * len(heights)
    check_ways(rows, lambda: [torch.ops.skipc.skinny_linear(x, weights, none, norm, 1e-5, residual, [])])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("halves", [False, True])
def test_gated_mlps_have_the_same_bits(rows: int, halves: bool, dtype: torch.dtype) -> None:
    x, gate, up = (torch.randn(n, 75).to(dtype) for n in (rows, 43, 43))
    down = torch.randn(75, 43).to(dtype)
    entry = (torch.cat([gate, up]), None) if halves else (gate, up)
    check_ways(rows, lambda: [torch.ops.skipc.gated_mlp(x, None, 0.0, *entry, down, 0, x, [])])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
def test_attention_has_the_same_bits(batch: int, tokens: int, dtype: torch.dtype) -> None:
    a = case(batch, tokens, dtype)
    check_ways(batch * tokens, lambda: native_block(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
def test_chains_have_the_same_bits_and_ask_when_they_are_bound(rows: int, dtype: torch.dtype) -> None:
    x, gate, up, last = (torch.randn(n, 75).to(dtype) for n in (rows, 43, 43, 50))
    down, links = torch.randn(75, 43).to(dtype), Links()
    first = links.mlp(ENTRY, ENTRY, (None, None, 0.0, gate, up, down, 0, None))
    links.linear(first, NOTHING, (None, [last], [None], None, 0.0, None))
    check_ways(rows, lambda: [BoundChain(links, links.tensors, [])(x, [])])
    bound = BoundChain(links, links.tensors, [])
    expected = bound(x, [])
    with products.using([row(products.choices_for(rows)[0], rows=(rows, rows))]):
        assert torch.equal(bound(x, []), expected)  # as it was bound
        assert torch.equal(bound(torch.cat([x, x]), [])[:rows], expected)  # bound anew


def test_kernels_are_made_while_the_table_changes() -> None:
    x, w = torch.randn(1, 96), torch.randn(64, 96)
    expected = torch.ops.skipc.skinny_linear(x, [w], [None], None, 0.0, None, [])

    def run(i: int) -> None:
        for choice in products.choices_for(1) * 20:
            torch.ops.skipc.tune_products([0, 64, 1, 1, 0, 1 << 40, 0, 1 << 40, *choice.constants.values()])
            assert torch.equal(torch.ops.skipc.skinny_linear(x, [w], [None], None, 0.0, None, []), expected)

    with products.using([]):
        in_threads(run, range(4))


def told(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the kernels are told from now on."""
    numbers: list[list[int]] = []
    op = torch.ops.skipc.tune_products
    monkeypatch.setattr(torch.ops.skipc, "tune_products", lambda rows: (numbers.append(rows), op(rows)))
    return numbers


def write(folder: Path, *rows: Row, source: str | None = None) -> Path:
    path = folder / f"{cpu_name()}.json"
    entry = Entry(source=source or products.source(), rows=rows)
    Table(arch=cpu_name(), kernels={products.KERNEL: entry}).write(path)
    tables.forget()
    return path


def test_a_table_is_followed(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = told(monkeypatch)
    assert native.available() is None
    assert numbers == []  # as before
    few = Choice(constants={"AHEAD": 4096, "PAIR": 1})
    write(own_tables, row(few, dtype_bits=(32, 32), rows=(1, 1), k=(100, 200)), row(products.default_for(2)))
    assert native.available() is None
    anything = [0, 1 << 62]
    assert numbers == [[32, 32, 1, 1, 100, 200, *anything, 4096, 1, *anything * 4, 8192, 4]]
    assert native.available() is None
    assert len(numbers) == 1


def test_rows_for_other_code_are_ignored(
    own_tables: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = told(monkeypatch)
    write(own_tables, row(products.default_for(2)), source="0123456789ab")
    with caplog.at_level(logging.WARNING, "skipc.kernels"):
        assert native.available() is None
        assert native.available() is None
    assert numbers == []
    assert [r.message for r in caplog.records if "is for other code" in r.message] == [
        f"the table of skinny_linear for {cpu_name()} is for other code than this: run `skipc autotune` again"
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"when": {"width": [1, 2]}, "constants": {"AHEAD": 8192, "PAIR": 2}}, "has no size 'width', but"),
        ({"when": {"rows": [1, 2]}, "constants": {"AHEAD": 8192, "PAIR": 1}}, "of several rows has no"),
        ({"when": {"rows": [1, 1]}, "constants": {"AHEAD": 8192, "PAIR": 3}}, "of one row has no"),
        ({"when": {}, "constants": {"AHEAD": 100, "PAIR": 2}}, "of several rows has no"),
        ({"when": {}, "constants": {"PAIR": 2}}, "of several rows has no"),
        ({"when": {"rows": [2, 1]}, "constants": {}}, "is no range"),
    ],
)
def test_a_broken_table_is_named(own_tables: Path, wrong: dict[str, Any], message: str) -> None:
    path = write(own_tables, row(products.default_for(2)))
    record = json.loads(path.read_text())
    record["kernels"][products.KERNEL]["rows"] = [wrong]
    path.write_text(json.dumps(record))
    for _ in range(2):
        with pytest.raises(ConfigError, match=path.name) as error:
            native.available()
        assert message in str(error.value)
    path.unlink()
    tables.forget()
    assert native.available() is None


def test_the_kernel_refuses_what_it_does_not_have() -> None:
    anything = [0, 1 << 40] * 4
    with products.using([]):
        with pytest.raises(RuntimeError, match="3 numbers are no rows of 10"):
            torch.ops.skipc.tune_products([1, 2, 3])
        with pytest.raises(RuntimeError, match="cannot be called 100 bytes ahead"):
            torch.ops.skipc.tune_products([*anything, 100, 2])
        with pytest.raises(RuntimeError, match="1 rows of weights cannot go together with several rows"):
            torch.ops.skipc.tune_products([*anything, 0, 1])
