"""The decode attention kernel against attention in fp64, over masks, ranges, groups, shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.attention import attention_reference, grouped_attention, live_range
from torch.nn import functional as F

from tests.harness import assert_no_further

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _built() -> None:
    assert native.available() is None


def heads(batch: int, count: int, tokens: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(batch, count, tokens, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float, softcap: float = 0.0) -> Any:
    """Attention as torch has it, on repeated heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


SHAPES = [
    (1, 9, 3, 1, 512, 64),
    (2, 8, 2, 3, 1000, 80),
    (3, 4, 4, 1, 37, 20),
    (1, 8, 1, 8, 300, 96),
    (2, 2, 1, 2, 1, 7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive", "per head", "wide"])
def test_against_fp64(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    b, h, kv, n, length, size = shape
    q, k, v = heads(b, n, h, size, dtype, 0).transpose(1, 2), *(heads(b, kv, length, size, dtype, s) for s in (1, 2))
    allowed = torch.rand(b, h if kind == "per head" else 1, n, length, generator=torch.Generator().manual_seed(3)) > 0.4
    allowed[..., 0] = True
    mask: Any = None
    if kind in ("bool", "per head"):
        mask = allowed
    elif kind in ("additive", "wide"):
        wide = torch.float32 if kind == "wide" else dtype
        mask = torch.where(allowed, torch.randn(b, 1, n, 1).to(wide), torch.finfo(wide).min)
    causal, scale = kind == "causal", 0.3
    found = torch.ops.skipc.decode_attention(q, k, v, mask, None, causal, scale, 0.0)
    exact = truth(
        q.double(), k.double(), v.double(), mask if mask is None or mask.dtype == torch.bool else mask.double(),
        causal, scale,
    )  # fmt: skip
    eager_mask = mask.to(dtype) if kind == "wide" and mask is not None else mask
    eager = truth(q, k, v, eager_mask, causal, scale)
    assert_no_further(exact, eager, found)
    assert found.stride() == eager.stride()
    if mask is not None:
        live = live_range(mask)
        narrowed = torch.ops.skipc.decode_attention(q, k, v, mask, live, causal, scale, 0.0)
        assert torch.equal(found, narrowed), "keys outside the live range had a part"


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(dtype: torch.dtype) -> None:
    q, k, v = heads(2, 8, 1, 32, dtype, 0), heads(2, 4, 50, 32, dtype, 1), heads(2, 4, 50, 32, dtype, 2)
    mask = torch.zeros(2, 1, 1, 50, dtype=dtype)
    mask[1, ..., :7] = torch.finfo(dtype).min
    found = torch.ops.skipc.decode_attention(q, k, v, mask, live_range(mask), False, 2.0, 5.0)
    exact = truth(q.double(), k.double(), v.double(), mask.double(), False, 2.0, 5.0)
    assert_no_further(exact, truth(q, k, v, mask, False, 2.0, 5.0), found)


def test_what_is_not_live_is_not_read() -> None:
    q, k, v = (
        heads(2, 4, 1, 16, torch.float32, 0),
        heads(2, 2, 900, 16, torch.float32, 1),
        heads(2, 2, 900, 16, torch.float32, 2),
    )
    mask = torch.zeros(2, 1, 1, 900, dtype=torch.bool)
    mask[0, ..., 300:310] = True
    mask[1, ..., :5] = True
    expected = truth(q, k, v, mask, False, 0.25)
    for row, (start, stop) in enumerate([(300, 310), (0, 5)]):
        for t in (k, v):
            t[row, :, stop:] = float("nan")
            t[row, :, : start // 16 * 16] = float("nan")
    found = torch.ops.skipc.decode_attention(q, k, v, mask, live_range(mask), False, 0.25, 0.0)
    torch.testing.assert_close(found, expected)


def test_queries_that_see_nothing() -> None:
    q, k, v = (
        heads(1, 2, 2, 16, torch.float32, 0),
        heads(1, 2, 40, 16, torch.float32, 1),
        heads(1, 2, 40, 16, torch.float32, 2),
    )
    mask = torch.ones(1, 1, 2, 40, dtype=torch.bool)
    mask[:, :, 0] = False
    found = torch.ops.skipc.decode_attention(q, k, v, mask, live_range(mask), False, 0.25, 0.0)
    torch.testing.assert_close(found, truth(q, k, v, mask, False, 0.25))
    assert (found[:, :, 0] == 0).all()
    mask[:] = False
    assert (torch.ops.skipc.decode_attention(q, k, v, mask, live_range(mask), False, 0.25, 0.0) == 0).all()
    low = torch.full((1, 1, 2, 40), torch.finfo(torch.float32).min)  # additive: an average over everything
    found = torch.ops.skipc.decode_attention(q, k, v, low, live_range(low), False, 0.25, 0.0)
    torch.testing.assert_close(found, truth(q, k, v, low, False, 0.25))


def test_a_query_does_not_depend_on_its_company_or_on_threads() -> None:
    q, k, v = (
        heads(3, 6, 4, 64, torch.float32, 0),
        heads(3, 2, 700, 64, torch.float32, 1),
        heads(3, 2, 700, 64, torch.float32, 2),
    )
    mask = torch.rand(3, 1, 4, 700) > 0.5
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(torch.ops.skipc.decode_attention(q, k, v, mask, live_range(mask), False, 0.2, 0.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)
    for row, i in itertools.product(range(3), range(4)):
        part = mask[row : row + 1, :, i : i + 1]
        one = torch.ops.skipc.decode_attention(
            q[row : row + 1, :, i : i + 1], k[row : row + 1], v[row : row + 1], part, live_range(part), False, 0.2, 0.0
        )
        assert torch.equal(one, found[0][row : row + 1, :, i : i + 1])


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_many_queries(queries: int, groups: int, softcap: float) -> None:
    q = heads(2, 2 * groups, queries, 16, torch.float32, 0)
    k, v = heads(2, 2, 400, 16, torch.float32, 1), heads(2, 2, 400, 16, torch.float32, 2)
    mask = torch.arange(400) <= 20 + torch.arange(queries)[:, None]
    mask = mask.expand(2, 1, -1, -1).clone()
    mask[1, :, :, :9] = False
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    found = grouped_attention(q, k, v, additive, live_range(additive), False, 0.25, softcap)
    torch.testing.assert_close(found, truth(q, k, v, additive, False, 0.25, softcap))
    torch.testing.assert_close(
        found, attention_reference(q, k, v, additive, live_range(additive), False, 0.25, softcap)
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "padded", "window", "additive", "blind rows", "continued"])
def test_long_prompts(kind: str, dtype: torch.dtype, softcap: float) -> None:
    """Stretches of queries look at the keys that they may see, of a cache that is longer than the prompt."""
    queries, keys = 1100, 1200
    q, k, v = heads(2, 4, queries, 16, dtype, 0), *(heads(2, 2, keys, 16, dtype, s) for s in (1, 2))
    i, j = torch.arange(queries)[:, None] + (90 if kind == "continued" else 0), torch.arange(keys)
    mask = (j <= i).expand(2, 1, queries, keys).clone()
    if kind == "padded":
        mask[1, :, :, :700] = False
        mask[1, :, :700, 0] = True  # padding sees something, too
    elif kind == "window":
        mask &= j > i - 40
    elif kind == "blind rows":
        mask[0, :, 260:300] = False
    if kind in ("additive", "blind rows") or softcap:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    args = (mask, live_range(mask), False, 0.25, softcap)
    exact = truth(
        q.double(), k.double(), v.double(), mask if mask.dtype == torch.bool else mask.double(), False, 0.25, softcap
    )
    found = grouped_attention(q, k, v, *args)
    assert_no_further(exact, truth(q, k, v, mask, False, 0.25, softcap), found)
    assert found.stride() == attention_reference(q, k, v, *args).stride()


def test_live_range_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        b, h, n, length = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(4))
        mask = torch.rand(b, h, n, length, generator=generator) > 0.7
        for row, (start, stop) in zip(mask, live_range(mask).tolist(), strict=True):
            seen = row.flatten(0, 1).any(0).nonzero().flatten().tolist()
            assert (start, stop) == ((seen[0], seen[-1] + 1) if seen else (length, 0))
        additive = torch.where(mask, 0.0, -torch.inf)
        for row, found in zip(mask, live_range(additive).tolist(), strict=True):
            seen = row.flatten(0, 1).any(0).nonzero().flatten().tolist()
            blind = not row.any(-1).all()
            assert found == ([0, length] if blind else [seen[0], seen[-1] + 1])


def test_registration() -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for op in (torch.ops.skipc.decode_attention.default, torch.ops.skipc.grouped_attention.default):
        torch.library.opcheck(
            op,
            (q, k, k.clone(), mask, live_range(mask), False, 0.25, 0.0),
            test_utils=("test_schema", "test_faketensor"),
        )
