"""Adapters on GPUs, under Triton's interpreter, beside the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skipc.kernels.gpu import lora
from skipc.kernels.gpu.kernel import forced, recorded
from skipc.kernels.lora import add_lora, nobody_wants_adapters
from skipc.kernels.tables import Choice

from tests.kernels.gpu import DTYPES, a_gpu, assert_close, in_double, slots_of, table_of

RANKS = (3, 16, 0, 17)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with a_gpu():
        yield


def rows_choice(split: int, block_k: int = 64, block_n: int = 32) -> dict[str, Choice]:
    return {"lora_rows": Choice(constants={"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": 16, "SPLIT_K": split})}


def tiles_choice(block_m: int = 16) -> dict[str, Choice]:
    return {"lora_tiles": Choice(constants={"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_R": 16})}


def check(
    rows: int, k: int, widths: tuple[int, ...], wanted: list[list[int]], dtype: torch.dtype, choices: dict[str, Choice],
    tokens: bool = False, ranks: tuple[int, ...] = RANKS,
) -> list[torch.Tensor]:  # fmt: skip
    operands = [t for n in widths for t in slots_of(k, n, ranks, dtype)]
    operands += table_of(wanted, tokens)
    x, outs = torch.randn(rows, k).to(dtype), [torch.randn(rows, n).to(dtype) for n in widths]
    truths, eagers, made = ([o.double() for o in outs], [o.clone() for o in outs], [o.clone() for o in outs])
    for i in range(len(widths)):
        add_lora(truths[i], x.double(), in_double(operands), i)
        add_lora(eagers[i], x, operands, i)
    with forced(choices), recorded() as launches:
        lora.add_adapters(made, x, operands)
    assert len(launches) == -(-len(widths) // 3)
    for m, t, e, o in zip(made, truths, eagers, outs, strict=True):
        assert_close(m, t, e)
        untouched = (e == o).all(1)
        assert torch.equal(m[untouched], o[untouched])
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [0, 1, 4])
def test_rows_with_adapters_of_their_own(dtype: torch.dtype, split: int) -> None:
    check(4, 70, (40, 16, 16), [[0], [3], [-1], [2]], dtype, rows_choice(split))


@pytest.mark.parametrize("split", [0, 2])
def test_several_adapters_of_a_row(split: int) -> None:
    check(4, 64, (50,), [[0, 3, -1], [1, 0, 3]], torch.float32, rows_choice(split))


@pytest.mark.parametrize("tokens", [False, True])
def test_more_layers_than_a_launch_takes(tokens: bool) -> None:
    check(2, 40, (20, 8, 8, 33), [[1], [0]], torch.float32, rows_choice(2), tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype: torch.dtype) -> None:
    wanted = [[i % 5 - 1, 3 - i % 4] for i in range(70)]
    check(70, 70, (40, 17), wanted, dtype, tiles_choice(), tokens=True)


def test_prompts_with_adapters_of_their_own() -> None:
    check(3 * 33, 64, (48,), [[1], [-1], [3]], torch.float32, tiles_choice(32))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    rows = groups * data.draw(st.integers(1, 2))
    per = data.draw(st.integers(1, 2))
    ranks = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    wanted = [[data.draw(st.integers(-1, len(ranks) - 1)) for _ in range(per)] for _ in range(groups)]
    widths = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    choices = rows_choice(data.draw(st.sampled_from([0, 1, 3])), data.draw(st.sampled_from([16, 64])))
    check(rows, data.draw(st.integers(1, 90)), widths, wanted, torch.float32, choices, ranks=ranks)


@pytest.mark.parametrize("rows", [2, 70])
def test_nobody_wants_anything(rows: int) -> None:
    operands = [*slots_of(32, 20, RANKS, torch.float32), *table_of([])]
    out, x = torch.randn(rows, 20), torch.randn(rows, 32)
    before = out.clone()
    with forced({**rows_choice(2), **tiles_choice()}):
        lora.add_adapters([out], x, operands)
        assert torch.equal(out, before)
        with recorded() as launches, nobody_wants_adapters():
            lora.add_adapters([out], x, operands)
    assert not launches
    assert torch.equal(out, before)


@pytest.mark.parametrize("rows", [3, 66])
def test_matrices_as_they_are(rows: int) -> None:
    """One adapter, not packed, and x of which rows do not follow each other."""
    a, b, where = torch.randn(5, 40), torch.randn(30, 5), torch.tensor([[5, 0, 0, 5]])
    operands = [a, b, where, torch.tensor([0.7]), *table_of([[0]])]
    x, out = torch.randn(rows, 80)[:, :40], torch.zeros(rows, 30)
    with forced({**rows_choice(2), **tiles_choice()}):
        lora.add_adapters([out], x, operands)
    truth = (x.double() @ a.double().T) @ b.double().T * 0.7 * float(operands[5][2])
    assert (out - truth).abs().max() < 1e-4


@pytest.mark.parametrize("rows", [3, 66])
def test_layers_of_one_input_in_different_forms(rows: int) -> None:
    """As PEFT's models have them: one adapter as it is, and several, packed, of the next layer; x by columns."""
    a, b, where = torch.randn(5, 40), torch.randn(30, 5), torch.tensor([[5, 0, 0, 5], [0, 0, 0, 5]])
    operands = [a, b, where, torch.tensor([0.7]), *slots_of(40, 20, (3, 6), torch.float32), *table_of([[0, 1]])]
    x, outs = torch.randn(40, rows).T, [torch.zeros(rows, 30), torch.zeros(rows, 20)]
    truths = [out.double() for out in outs]
    for i, truth in enumerate(truths):
        add_lora(truth, x.double(), in_double(operands), i)
    with forced({**rows_choice(2), **tiles_choice()}), recorded() as launches:
        lora.add_adapters(outs, x, operands)
    assert len(launches) == 2
    assert all((out - truth).abs().max() < 1e-4 for out, truth in zip(outs, truths, strict=True))


def test_fp64_stays_with_torch() -> None:
    operands = in_double([*slots_of(16, 8, (3,), torch.float32), *table_of([[0]])])
    x, w = torch.randn(2, 16).double(), torch.randn(8, 16).double()
    truth = x @ w.T
    add_lora(truth, x, operands)
    assert (torch.ops.skipc.lora_linear(x, w, None, operands) - truth).abs().max() < 1e-12


@pytest.mark.parametrize("split", [0, 4])
def test_a_row_does_not_depend_on_the_others(split: int) -> None:
    operands, x = slots_of(64, 40, RANKS, torch.float32), torch.randn(4, 64)
    wanted = [[0], [3], [1], [-1]]
    table, gates = table_of(wanted)
    all_rows = torch.zeros(4, 40)
    with forced(rows_choice(split)):
        lora.add_adapters([all_rows], x, [*operands, table, gates])
        for r in range(4):
            one, (alone, amounts) = torch.zeros(1, 40), table_of([wanted[r]])
            amounts[2] = gates[2 + r]
            lora.add_adapters([one], x[r : r + 1], [*operands, alone, amounts])
            assert torch.equal(one[0], all_rows[r])


def test_slots_are_read_at_each_launch() -> None:
    """Another adapter in the same place, and a table that says something else, where kernels were given tensors
    once."""
    operands, x = slots_of(32, 20, (4, 4), torch.float32), torch.randn(2, 32)
    table, gates = table_of([[0], [1]])
    with forced(rows_choice(2)):
        for change in (lambda: None, lambda: operands[0].mul_(2), lambda: operands[2][0].zero_(), table.neg_):
            change()
            made, truth = torch.zeros(2, 20), torch.zeros(2, 20, dtype=torch.float64)
            lora.add_adapters([made], x, [*operands, table, gates])
            if table[0] >= 0:
                add_lora(truth, x.double(), in_double([*operands, table, gates]))
            assert (made - truth).abs().max() < 1e-4
