"""Sublayers as one kernel: against fp64, against themselves in other company, and at the edges of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.blocks import attention_block, copy_rows
from skipc.kernels.chain import ENTRY, NOTHING, BoundChain, Links, chain
from torch.nn import functional as F

from tests.harness import assert_no_further

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
LENGTH, DIM = 300, 24


@pytest.fixture(autouse=True)
def _built(products: None) -> None:
    assert native.available() is None


def case(batch: int, tokens: int, dtype: torch.dtype, width: int = 70, heads: int = 6, kv: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch * 10 + tokens)

    def rand(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    angles = torch.rand(batch, tokens, 8, generator=generator).repeat(1, 1, 2) * 6
    mask = torch.rand(batch, 1, tokens, LENGTH, generator=generator) > 0.3
    return {
        "x": rand(batch, tokens, width),
        "norm": rand(width),
        "eps": 1e-5,
        "projections": [rand(n * DIM, width) / 8 for n in (heads, kv, kv)],
        "biases": [rand(heads * DIM), None, rand(kv * DIM)],
        "q_norm": rand(DIM),
        "k_norm": None,
        "head_eps": 1e-6,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": rand(batch, kv, LENGTH, DIM),
        "values": rand(batch, kv, LENGTH, DIM),
        "position": torch.tensor(261),
        "mask": mask,
        "live": None,
        "causal": False,
        "scale": DIM**-0.5,
        "softcap": 0.0,
        "out": rand(width, heads * DIM) / 8,
        "out_bias": None,
        "residual": rand(batch, tokens, width),
    }


def spelled_out(a: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in plain torch, in one dtype: result, keys and values."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    a = {k: cast(v) for k, v in a.items()}
    batch, tokens, width = a["x"].shape
    h = a["x"] if a["norm"] is None else F.rms_norm(a["x"], (width,), a["norm"], a["eps"])
    q, k, v = (
        F.linear(h, w, b).view(batch, tokens, -1, DIM).transpose(1, 2)
        for w, b in zip(a["projections"], a["biases"], strict=True)
    )
    if a["q_norm"] is not None:
        q = F.rms_norm(q, (DIM,), a["q_norm"], a["head_eps"])
    if a["k_norm"] is not None:
        k = F.rms_norm(k, (DIM,), a["k_norm"], a["head_eps"])
    if a["cos"] is not None:
        cos, sin = a["cos"].unsqueeze(1), a["sin"].unsqueeze(1)

        def turn(t: torch.Tensor) -> torch.Tensor:
            t, kept = t[..., :16], t[..., 16:]
            return torch.cat([t * cos + torch.cat([-t[..., 8:], t[..., :8]], -1) * sin, kept], -1)

        q, k = turn(q), turn(k)
    places = a["position"] + torch.arange(tokens) if a["position"].dim() == 0 else a["position"]
    keys, values = a["keys"].clone(), a["values"].clone()
    used = k.shape[1]  # heads, of those that the cache has
    keys[:, :used, places] = k
    values[:, :used, places] = v
    read = (t[:, :used].repeat_interleave(q.shape[1] // used, 1) for t in (keys, values))
    mixed = F.scaled_dot_product_attention(q, *read, a["mask"], scale=a["scale"])
    out = F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), a["out"], a["out_bias"])
    return out if a["residual"] is None else out + a["residual"], keys, values


def native_block(a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a = {**a, "keys": a["keys"].clone(), "values": a["values"].clone()}
    return torch.ops.skipc.attention_block(**a, lora=[]), a["keys"], a["values"]


VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "bare": {"norm": None, "q_norm": None, "cos": None, "sin": None, "mask": None, "residual": None},
    "places": {"position": torch.tensor([7, 299, 0, 31])},
    "both norms": {"k_norm": torch.linspace(0.5, 2, DIM)},
    "roomy cache": {},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_against_fp64(batch: int, tokens: int, dtype: torch.dtype, variant: str) -> None:
    a = case(batch, tokens, dtype)
    for name, value in VARIANTS[variant].items():
        a[name] = value.to(dtype) if name == "k_norm" else value
    if variant == "places":
        a["position"] = a["position"][:tokens]
    if variant == "roomy cache":
        for name in ("keys", "values"):
            a[name] = torch.cat([a[name], a[name].flip(2)[:, :1]], 1)
    exact, eager = spelled_out(a, torch.float64), spelled_out(a, dtype)
    assert_no_further(exact, eager, native_block(a))
    theirs = {**a, "keys": a["keys"].clone(), "values": a["values"].clone()}
    assert_no_further(exact, eager, (attention_block(**theirs), theirs["keys"], theirs["values"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_neither_on_its_company_nor_on_threads(dtype: torch.dtype) -> None:
    a = case(5, 2, dtype)
    found = native_block(a)
    threads = torch.get_num_threads()
    for row in range(5):
        one = {k: v[row : row + 1] if isinstance(v, torch.Tensor) and v.dim() > 2 else v for k, v in a.items()}
        torch.set_num_threads(1 + row % 2)
        try:
            for whole, alone in zip(found, native_block(one), strict=True):
                assert torch.equal(whole[row : row + 1], alone)
        finally:
            torch.set_num_threads(threads)


def test_a_cache_of_too_few_heads_is_an_error() -> None:
    a = case(1, 1, torch.float32)
    with pytest.raises(RuntimeError, match="2 heads of keys for a cache of 1"):
        native_block({**a, "keys": a["keys"][:, :1], "values": a["values"][:, :1]})


@pytest.mark.parametrize("place", [LENGTH, -1])
def test_a_full_cache_is_an_error(place: int) -> None:
    with pytest.raises(RuntimeError, match=f"position {place} of a cache of {LENGTH}"):
        native_block({**case(1, 1, torch.float32), "position": torch.tensor(place)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 2)])
def test_a_chain_has_the_bits_of_its_links(dtype: torch.dtype, batch: int, tokens: int) -> None:
    a, b = case(batch, tokens, dtype), case(batch, tokens, dtype)
    b["biases"], b["norm"], b["keys"] = [None, None, None], None, a["keys"].flip(2).contiguous()
    generator = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(s, generator=generator).to(dtype) / 8 for s in ((90, 70), (90, 70), (70, 90)))
    x, counter = a["x"], torch.tensor(261)
    a["position"] = counter
    links = Links()
    first = links.attention(ENTRY, ENTRY, list(a.values()))
    links.count(counter, tokens)
    second = links.mlp(first, ENTRY, (None, a["norm"], 1e-5, gate, up, down, 0, None))
    third = links.attention(second, NOTHING, list(b.values()))
    fourth = links.mlp(third, third, (None, None, 0.0, torch.cat([gate, up]), None, down, 0, None))
    links.linear(fourth, NOTHING, (None, [gate, up[:33]], [None, up[0, :33].contiguous()], a["norm"], 1e-5, None))
    c = case(batch, tokens, dtype)
    c["keys"], c["values"] = a["keys"].flip(1).contiguous(), a["values"].flip(1).contiguous()
    cached = [c[k] for k in ("x", "norm", "eps", "projections", "biases", "k_norm", "head_eps", "cos", "sin", "keys",
                             "values", "position")]  # fmt: skip
    cached[3:5] = c["projections"][1:], c["biases"][1:]
    links.cache(first, cached)
    d = {name: torch.zeros_like(c[name]) for name in ("keys", "values")}
    links.copy((c["keys"], c["values"], d["keys"], d["values"], c["position"], tokens))  # what was written just before
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32  # caches need not have the stream's dtype
    e = [torch.randn(d["keys"].shape).to(other) for _ in range(4)]
    links.copy((*e, c["position"], tokens))
    caches = (a["keys"], b["keys"], c["keys"], d["keys"], d["values"], *e[2:])
    kept = [t.clone() for t in caches]
    expected = chain(x, links.tensors, links.code, links.numbers)
    written = [t.clone() for t in caches]
    assert counter.item() == 261 + tokens
    counter.fill_(261)
    for cache, before in zip(caches, kept, strict=True):
        cache.copy_(before)
    found = torch.ops.skipc.chain(x, links.tensors, links.code, links.numbers, [], 0)
    assert torch.equal(found, expected)
    for cache, before, after in zip(caches, kept, written, strict=True):
        assert torch.equal(cache, after)
        assert not torch.equal(cache, before)
    assert torch.equal(d["values"][:, :, 261 : 261 + tokens], c["values"][:, :, 261 : 261 + tokens])
    assert counter.item() == 261 + tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [torch.tensor(7), torch.tensor([9, 3, 4])])
def test_rows_are_copied_between_caches_of_any_strides(dtype: torch.dtype, places: torch.Tensor) -> None:
    shape = (2, 3, 12, 8)
    lower = [torch.randn(shape).to(dtype), torch.randn(2, 12, 3, 8).to(dtype).transpose(1, 2)]
    mine = [torch.randn(2, 12, 3, 8).to(dtype).transpose(1, 2), torch.randn(2, 3, 20, 8).to(dtype)[:, :, 4:16]]
    expected = [t.clone() for t in mine]
    copy_rows(*lower, *expected, places, 3)
    torch.ops.skipc.copy_rows(*lower, *mine, places, 3)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    rows = places + torch.arange(3) if places.dim() == 0 else places
    assert torch.equal(mine[0][:, :, rows], lower[0][:, :, rows])
    with pytest.raises(RuntimeError, match="position 12 of a cache of 12"):
        torch.ops.skipc.copy_rows(*lower, *mine, torch.tensor(10), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bound_chain_sees_what_changes(dtype: torch.dtype) -> None:
    """Contents, places in memory, sizes and the input may all change from call to call."""
    generator = torch.Generator().manual_seed(2)
    gate, up, down = (torch.randn(s, generator=generator).to(dtype) / 8 for s in ((90, 70), (90, 70), (70, 90)))
    norm, head = torch.rand(70, generator=generator).to(dtype), torch.randn(33, 70, generator=generator).to(dtype)
    links = Links()
    links.linear(
        links.mlp(ENTRY, ENTRY, (None, norm, 1e-5, gate, up, down, 0, None)),
        NOTHING,
        (None, [head], [None], None, 0.0, None),
    )
    bound = BoundChain(links, [None, *links.tensors[1:]], [[0]])

    def check(x: torch.Tensor, norm: torch.Tensor) -> None:
        expected = chain(x, [norm, *links.tensors[1:]], links.code, links.numbers)
        torch.testing.assert_close(
            bound(x, [norm]), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3
        )
        assert torch.equal(
            bound(x, [norm]), torch.ops.skipc.chain(x, [norm, *links.tensors[1:]], links.code, links.numbers, [], 0)
        )

    x = torch.randn(2, 1, 70, generator=generator).to(dtype)
    check(x, norm)
    check(x + 1, norm)
    check(x, norm.clone() * 2)
    check(torch.randn(3, 2, 70, generator=generator).to(dtype), norm)
    check(torch.randn(2, 1, 1, 3, 1, 70, generator=generator).to(dtype), norm)
    up.mul_(2)
    check(x, norm)
    gate.data = gate.data.clone() * 2  # the same tensor in other memory
    check(x, norm)
    square = torch.randn(70, 70, generator=generator).to(dtype)
    head.data = square  # and of another size
    check(x, norm)
    with pytest.raises(RuntimeError, match="contiguous"):
        bound(x.expand(2, 3, 70).transpose(0, 1), [norm])
    check(x, norm)
