"""Rows that are chosen on a GPU, under Triton's interpreter, beside the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skipc.kernels import rows as reference
from skipc.kernels.device import simulated
from skipc.kernels.gpu import rows
from skipc.kernels.gpu.kernel import forced, recorded
from skipc.kernels.tables import Choice

from tests.kernels.gpu import DTYPES, assert_close

UNTOUCHED = 7.0


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    with nullcontext() if request.function is test_ops_on_the_cpu else simulated():
        yield


def tiles_of(m: int, n: int) -> dict[str, Choice]:
    choice = Choice(constants={"BLOCK_M": m, "BLOCK_N": n})
    return {"gather_rows": choice, "scatter_rows": choice}


def chosen_of(total: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.compact_rows(torch.rand(total) < share)


def gathered(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """With something known where nothing is written."""
    made = torch.full((len(index), x.shape[-1]), UNTOUCHED).to(x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: made)
        assert rows.gather_rows(x, index, count) is made
    return made


@pytest.mark.parametrize("total", [1, 2, 7, 16, 17, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_list_of_rows(total: int, share: float) -> None:
    mask = torch.rand(total) < share
    for block in (16, 64, 4096) if total < 100 else (256, 4096):
        with forced({"compact_rows": Choice(constants={"BLOCK": block})}), recorded() as launches:
            index, count = rows.compact(mask)
        assert len(launches) == 1
        for made, wanted in zip((index, count), reference.compact_rows(mask), strict=True):
            assert torch.equal(made, wanted)
            assert made.dtype == torch.int32


def test_list_of_many_rows_of_a_batch() -> None:
    mask = torch.rand(2, reference.MOST_ROWS // 2) < 0.5
    for made, wanted in zip(rows.compact(mask), reference.compact_rows(mask), strict=True):
        assert torch.equal(made, wanted)
    strided = (torch.rand(40, 3) < 0.5)[:, 1]
    assert torch.equal(rows.compact(strided)[0], reference.compact_rows(strided)[0])


def test_list_of_no_rows_and_of_too_many() -> None:
    index, count = rows.compact(torch.zeros(0, dtype=torch.bool))
    assert len(index) == 0
    assert count.tolist() == [0]
    for compact in (rows.compact, reference.compact_rows):
        with pytest.raises(RuntimeError, match="more than"):
            compact(torch.zeros(reference.MOST_ROWS + 1, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("width", [1, 17, 80, 1000])
def test_copy_of_rows(width: int, dtype: torch.dtype) -> None:
    index, count = chosen_of(21, 0.4)
    x = torch.randn(3, 7, width).to(dtype)
    for m, n in ((1, 64), (4, 1024)):
        with forced(tiles_of(m, n)):
            made = gathered(x, index, count)
        few = int(count)
        assert torch.equal(made[:few], reference.gather_rows(x, index, count)[:few])
        assert (made[few:] == torch.tensor(UNTOUCHED).to(dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", [1, 17, 80, 1000])
def test_rows_put_back(width: int, add: bool, dtype: torch.dtype) -> None:
    index, count = chosen_of(21, 0.4)
    base, few = torch.randn(3, 7, width).to(dtype), torch.randn(21, width).to(dtype)
    few[int(count) :] = torch.nan
    wanted = base.clone()
    reference.scatter_rows_(wanted, few, index, count, add)
    for m, n in ((1, 64), (4, 1024)):
        made = base.clone()
        with forced(tiles_of(m, n)), recorded() as launches:
            rows.scatter_rows(made, few, index, count, add)
        assert len(launches) == 1
        assert torch.equal(made, wanted)
    if add:
        exact = base.double()
        reference.scatter_rows_(exact, few.double(), index, count, True)
        assert_close(wanted, exact, wanted)


def test_rows_apart_in_memory() -> None:
    index, count = chosen_of(9, 0.5)
    wide = torch.randn(9, 100)
    few = int(count)
    assert torch.equal(rows.gather_rows(wide[:, 10:40], index, count)[:few], wide[index[:few].long(), 10:40])
    assert torch.equal(rows.gather_rows(wide[:, ::3], index, count)[:few], wide[index[:few].long(), ::3])
    made, wanted, values = wide.clone(), wide.clone(), torch.randn(30, 9).T
    rows.scatter_rows(made[:, 10:40], values, index, count, True)
    reference.scatter_rows_(wanted[:, 10:40], values, index, count, True)
    assert torch.equal(made, wanted)
    for scatter in (rows.scatter_rows, reference.scatter_rows_):
        with pytest.raises(RuntimeError):
            scatter(wide.view(3, 3, 100).transpose(0, 1), torch.randn(9, 100), index, count, False)
    with pytest.raises(RuntimeError, match="contiguous"):
        rows.scatter_rows(wide[:, ::2], torch.randn(9, 50), index, count, False)


def test_what_was_not_chosen_is_not_read() -> None:
    mask = torch.tensor([True, False, True, False])
    x = torch.randn(4, 16)
    x[~mask] = torch.nan
    index, count = rows.compact(mask)
    made = rows.gather_rows(x, index, count)
    assert torch.equal(made[:2], x[mask])
    index[2:] = 10**6  # what stands behind the count is of no account
    base = torch.zeros(4, 16)
    rows.scatter_rows(base, made, index, count, True)
    assert torch.equal(base[mask], x[mask])
    assert (base[~mask] == 0).all()
    assert torch.equal(rows.gather_rows(x, index, count)[:2], x[mask])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=st.lists(st.booleans(), max_size=70), width=st.integers(1, 40), m=st.sampled_from([1, 4, 16]))
def test_there_and_back(mask: list[bool], width: int, m: int) -> None:
    chosen, x = torch.tensor(mask, dtype=torch.bool), torch.randn(len(mask), width)
    with forced({**tiles_of(m, 16), "compact_rows": Choice(constants={"BLOCK": 16})}):
        index, count = rows.compact(chosen)
        assert index[: int(count)].tolist() == [i for i, c in enumerate(mask) if c]
        few = rows.gather_rows(x, index, count)
        back = torch.zeros_like(x)
        rows.scatter_rows(back, few, index, count, False)
    assert torch.equal(back, torch.where(chosen[:, None], x, 0.0))


def test_ops_on_the_cpu() -> None:
    ops = torch.ops.skipc
    mask, x = torch.rand(2, 9) < 0.5, torch.randn(2, 9, 16)
    index, count = ops.compact_rows(mask)
    torch.library.opcheck(ops.compact_rows.default, (mask,))
    few = ops.gather_rows(x, index, count)
    torch.library.opcheck(ops.scatter_rows_.default, (x.clone(), torch.zeros(18, 16), index, count, True))
    assert torch.equal(few[: int(count)], x[mask])
    ops.scatter_rows_(x, few, index, count, False)
