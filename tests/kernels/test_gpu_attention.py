"""Attention over a cache on GPUs, under Triton's interpreter, beside the reference in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skipc.kernels.attention import attention_reference, live_range
from skipc.kernels.device import simulated
from skipc.kernels.gpu import attention
from skipc.kernels.gpu.kernel import forced, recorded
from skipc.kernels.gpu.workspace import own_counters
from skipc.kernels.tables import Choice

from tests.kernels.gpu import DTYPES, assert_close

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of masks, in numpy

SHAPES = {  # batch, heads, key heads, queries, keys, width of keys, of values
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "MHA": (2, 3, 3, 1, 17, 16, 16),
    "GQA": (1, 6, 2, 1, 70, 64, 64),
    "MQA": (2, 7, 1, 2, 33, 80, 80),
    "widths apart": (1, 4, 2, 3, 40, 96, 17),
    "a chunk": (1, 2, 1, 20, 50, 7, 7),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with simulated():
        yield


def blocks_of(split: int = 1, m: int = 16, n: int = 32) -> dict[str, Choice]:
    choice = Choice(constants={"BLOCK_M": m, "BLOCK_N": n, "SPLIT": split})
    return {"decode_attention": choice, "prefill_attention": choice}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """As models have them: queries a view of ``[batch, queries, heads, width]``."""
    batch, heads, key_heads, queries, keys, k_dim, v_dim = shape
    q = torch.randn(batch, queries, heads, k_dim).to(dtype).transpose(1, 2)
    return q, torch.randn(batch, key_heads, keys, k_dim).to(dtype), torch.randn(batch, key_heads, keys, v_dim).to(dtype)


def in_fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, live: torch.Tensor | None,
    causal: bool, scale: float, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Attention spelled out: each query with the keys that it sees."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    groups, keys = q.shape[1] // k.shape[1], k.shape[2]
    seen = torch.ones(q.shape[0], q.shape[1], q.shape[2], keys, dtype=torch.bool)
    bias = torch.zeros(seen.shape, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        bias += mask.double()
    if causal:
        seen &= torch.arange(keys) <= torch.arange(q.shape[2])[:, None]
    if live is not None:
        at = torch.arange(keys)
        seen &= ((at >= live[:, :1]) & (at < live[:, 1:]))[:, None, None]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).view(-1, 3).tolist():
        which = seen[b, h, i].nonzero().flatten()
        if len(which):
            scores = k[b, h // groups, which].double() @ q[b, h, i].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores + bias[b, h, i, which], 0).nan_to_num(0.0)
            out[b, h, i] = weights @ v[b, h // groups, which].double()
    return out


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
    live: torch.Tensor | None = None, causal: bool = False, softcap: float = 0.0, scale: float = 0.3,
    choices: dict[str, Choice] | None = None,
) -> torch.Tensor:  # fmt: skip
    given = (mask, live, causal, scale, softcap)
    with forced(choices or blocks_of()), recorded() as launches:
        made = attention.decode_attention(q, k, v, *given)
    assert len(launches) == bool(made.numel())
    # What is not live may be anything, but torch reads it.
    known = attention_reference(q, k.nan_to_num(0.0), v.nan_to_num(0.0), *given)
    assert made.transpose(1, 2).is_contiguous()
    assert_close(made, in_fp64(q, k, v, *given), known)
    return made


def masks_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch, heads, _, queries, keys, *_ = shape
    seen = torch.rand(batch, 1, queries, keys) < 0.7
    seen[..., 0] = True
    lowest = torch.finfo(dtype).min
    window = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).triu(keys - queries - 9)
    padded = torch.arange(keys) >= torch.arange(batch)[:, None] * 5
    return {
        "boolean": seen,
        "additive": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, lowest),
        "infinite": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf),
        "wide": torch.randn(batch, 1, queries, keys).masked_fill(~seen, torch.finfo(torch.float32).min),
        "per head": torch.rand(batch, heads, queries, keys) < 0.7,
        "biases of heads": torch.randn(1, heads, 1, keys).to(dtype),
        "one for all": torch.rand(keys) < 0.7,
        "of queries": torch.rand(batch, 1, queries, 1) < 0.5,
        "window": window[None, None],
        "left padding": padded[:, None, None],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype) -> None:
    q, k, v = operands(SHAPES[name], dtype)
    check(q, k, v, choices=blocks_of(4, n=16))
    check(q, k, v, causal=True, choices=blocks_of(1, n=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(masks_of(SHAPES["GQA"], torch.float32)))
def test_masks(kind: str, dtype: torch.dtype) -> None:
    name = "MQA" if dtype == torch.float16 else "GQA"
    q, k, v = operands(SHAPES[name], dtype)
    mask = masks_of(SHAPES[name], dtype)[kind]
    check(q, k, v, mask, choices=blocks_of(2))
    if mask.dim() == 4 and mask.shape[-1] != 1:
        check(q, k, v, mask, live_range(mask.expand(q.shape[0], -1, -1, -1)), choices=blocks_of(2))


@pytest.mark.parametrize(("m", "n"), [(16, 16), (16, 64), (32, 32)])
@pytest.mark.parametrize("split", [1, 2, 4, 8, 16])
def test_every_split_and_block(split: int, m: int, n: int) -> None:
    q, k, v = operands((2, 5, 1, 4, 130, 16, 16), torch.float32)  # twenty rows of a tile
    live = torch.tensor([[3, 129], [70, 75]])
    check(q, k, v, None, live, choices=blocks_of(split, m, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_defaults(dtype: torch.dtype) -> None:
    q, k, v = operands((1, 3, 1, 1, 300, 64, 64), dtype)
    check(q, k, v, None, torch.tensor([[0, 290]]), choices={"other": Choice(constants={})})
    q, k, v = operands((1, 4, 1, 20, 40, 16, 16), dtype)  # many rows
    check(q, k, v, causal=True, choices={"other": Choice(constants={})})


@pytest.mark.parametrize("live", [(0, 70), (0, 1), (69, 70), (15, 17), (16, 32), (5, 64), (33, 33), (40, 20),
                                  (-5, 1 << 40), (1 << 62, 0)], ids=str)  # fmt: skip
def test_only_live_keys_are_read(live: tuple[int, int]) -> None:
    q, k, v = operands((2, 4, 2, 1, 70, 16, 16), torch.float32)
    start, stop = max(live[0], 0), max(live[1], 0)
    for t in (k, v):
        t[1, :, :start] = torch.nan
        t[1, :, stop:] = torch.nan
    for split in (1, 4):
        made = check(q, k, v, None, torch.tensor([[0, 70], live]), choices=blocks_of(split, n=16))
        if start >= stop:
            assert (made[1] == 0).all()
    bounds = torch.tensor([live])  # the same for all rows
    check(q[1:].expand(2, -1, -1, -1), k[1:].expand(2, -1, -1, -1), v[1:].expand(2, -1, -1, -1), None, bounds)


def test_live_keys_are_shared_by_all_programs() -> None:
    """However much room there is."""
    q, k, v = operands((1, 2, 1, 1, 1000, 16, 16), torch.float32)
    live = torch.tensor([[0, 64]])
    with forced(blocks_of(4, n=16)), recorded() as launches:
        made = attention.decode_attention(q, k, v, None, live, False, 0.3, 0.0)
    (launch,) = launches
    assert launch.grid == (4,)  # which room alone decides
    sums = launch.arguments["planes"][4 * 16 * 16 :].view(4, 2, 16)[:, 1, 0]
    assert (sums > 0).all()
    assert_close(made, in_fp64(q, k, v, None, live, False, 0.3, 0.0), made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_get_zeros(dtype: torch.dtype) -> None:
    q, k, v = operands((2, 4, 2, 3, 40, 16, 16), dtype)
    seen = torch.rand(2, 1, 3, 40) < 0.7
    seen[0, :, 1] = False
    for mask in (seen, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)):
        for split in (1, 2):
            made = check(q, k, v, mask, choices=blocks_of(split))
            assert (made[0, :, 1] == 0).all()
    # Under an additive mask of lowest values such a query has the mean of all values.
    lowest = torch.zeros(seen.shape, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
    made = check(q, k, v, lowest, choices=blocks_of(2))
    mean = v[0].double().mean(1).repeat_interleave(2, 0)
    assert (made[0, :, 1].double() - mean).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_scores_that_are_capped(softcap: float, dtype: torch.dtype) -> None:
    q, k, v = operands(SHAPES["GQA"], dtype)
    for scale in (0.01, 0.3, 5.0):
        check(q, k, v, softcap=softcap, scale=scale, choices=blocks_of(2))
    check(q, k, v, masks_of(SHAPES["GQA"], dtype)["additive"], softcap=softcap, choices=blocks_of(2))


def test_operands_apart_in_memory() -> None:
    base = torch.randn(2, 70, 3, 2, 40)  # a cache of tokens, whose keys and values lie side by side
    k, v = (t.transpose(1, 2)[..., :33] for t in base.unbind(3))
    q = torch.randn(33, 2, 6, 2).permute(1, 2, 3, 0)
    check(q, k, v, choices=blocks_of(2))
    mask = torch.rand(70, 2, 2).permute(2, 1, 0)[:, None] < 0.7
    live = torch.tensor([[3, 0, 60], [10, 0, 70]])[:, ::2]
    check(q, k, v, mask, live, choices=blocks_of(2))
    check(q[..., 1:], k[..., 1:], v.flip(-1)[..., ::2], mask, choices=blocks_of(2))


def test_nothing_to_do() -> None:
    q, k, v = operands((2, 4, 2, 1, 0, 16, 16), torch.float32)
    assert (check(q, k, v) == 0).all()
    q, k, v = operands((0, 4, 2, 1, 8, 16, 16), torch.float32)
    assert check(q, k, v).shape == (0, 4, 1, 16)


def test_same_bits_twice_and_beside_other_rows() -> None:
    q, k, v = operands((3, 4, 2, 2, 90, 16, 16), torch.float32)
    live = torch.tensor([[0, 90], [7, 60], [50, 55]])
    for split in (1, 4):
        first, again = (check(q, k, v, None, live, choices=blocks_of(split)) for _ in range(2))
        assert torch.equal(first, again)
        alone = check(q[1:2], k[1:2], v[1:2], None, live[1:2], choices=blocks_of(split))
        assert torch.equal(first[1:2], alone)


def test_counters_are_zero_between_launches() -> None:
    q, k, v = operands((2, 4, 2, 1, 40, 16, 16), torch.float32)
    with own_counters(q.device) as counts:
        first, again = (check(q, k, v, choices=blocks_of(4, n=16)) for _ in range(2))
    assert torch.equal(first, again)
    assert (counts == 0).all()


def test_values_that_are_not_finite_stay_with_their_key_head() -> None:
    q, k, v = operands((1, 4, 2, 1, 20, 16, 16), torch.float32)
    v[0, 1, 3] = torch.inf
    with forced(blocks_of(2)):
        made = attention.decode_attention(q, k, v, None, None, False, 0.3, 0.0)
    assert torch.isfinite(made[:, :2]).all()
    assert not torch.isfinite(made[:, 2:]).any()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_call(data: Any) -> None:
    draw = data.draw
    batch, key_heads, groups, queries = (draw(st.integers(1, n)) for n in (2, 2, 3, 3))
    keys, k_dim, v_dim = (draw(st.integers(1, n)) for n in (60, 20, 20))
    dtype, split = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2, 4, 8]))
    shape = (batch, groups * key_heads, key_heads, queries, keys, k_dim, v_dim)
    q, k, v = operands(shape, dtype)
    kind = draw(st.sampled_from([None, *masks_of(shape, dtype)]))
    mask = None if kind is None else masks_of(shape, dtype)[kind]
    live = None
    if draw(st.booleans()):
        bounds = st.tuples(st.integers(0, keys), st.integers(0, keys))
        live = torch.tensor([draw(bounds) for _ in range(draw(st.sampled_from([1, batch])))])
    causal, softcap = draw(st.booleans()), draw(st.sampled_from([0.0, 20.0]))
    check(q, k, v, mask, live, causal, softcap, choices=blocks_of(split, n=draw(st.sampled_from([16, 32]))))


def test_launches_say_what_they_move() -> None:
    q, k, v = operands((2, 6, 2, 3, 40, 16, 32), torch.float16)
    mask = torch.ones(2, 1, 3, 40, dtype=torch.bool)
    with recorded() as launches:
        attention.decode_attention(q, k, v, mask, None, False, 0.3, 0.0)
    (launch,) = launches
    assert launch.moved == 2 * (q.numel() + k.numel() + v.numel() + 2 * 6 * 3 * 32) + mask.numel()
    assert launch.operations == 2 * 2 * 6 * 3 * 40 * 48
    assert launch.sizes == {"keys": 40, "rows": 9, "heads": 4, "dim": 32, "bits": 16}
