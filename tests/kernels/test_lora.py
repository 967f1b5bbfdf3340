"""Adapters in the kernels for few rows: against fp64, and rows that want none against the kernels without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.blocks import attention_block
from skipc.kernels.linear import gated_mlp, skinny_linear
from skipc.kernels.lora import MOST, PACK, add_lora, lora_linear, pack, pack_lora, unpack
from skipc.kernels.memory import zeros
from torch.nn import functional as F

from tests.harness import assert_no_further
from tests.kernels.test_blocks import DTYPES, case, spelled_out

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
OPS = torch.ops.skipc

# For each group of rows the slots that it wants, with a gate each.
WANTED: dict[str, list[dict[int, float]]] = {
    "nobody": [],
    "nobody, by row": [{}, {}, {}, {}],
    "all the same": [{1: 1.0}],
    "each its own": [{0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}],
    "some": [{2: 1.0}, {}, {2: 1.0}, {2: 1.0}],
    "an empty slot": [{3: 1.0}, {0: 1.0}, {3: 1.0}, {}],
    "two at a time": [{0: 0.3, 1: -1.5}, {1: 2.0}, {}, {2: 0.5, 0: 0.5}],
}


@pytest.fixture(autouse=True)
def _built() -> None:
    assert native.available() is None


def wants(rows: Sequence[dict[int, float]]) -> list[torch.Tensor]:
    """Table and gates."""
    most = max((len(row) for row in rows), default=0)
    table, gates = torch.full((400,), -7), torch.full((400,), float("nan"))  # nobody may read what is not theirs
    flat = [(s, g) for row in rows for s, g in [*row.items(), *[(-1, float("nan"))] * (most - len(row))]]
    table[:2] = torch.tensor([len(rows) if most else 0, most])
    for i, (slot, gate) in enumerate(flat):
        table[2 + i], gates[2 + i] = slot, gate
    return [table, gates]


class Layers:
    """Adapters of some weights: in slots of a bank, where there is more room than they need and NaN in the rest, or as
    they are; and what they add, in any dtype."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype, packed: bool = True
    ):
        generator = torch.Generator().manual_seed(3)
        self.parts: list[list[tuple[torch.Tensor, torch.Tensor, float] | None]] = []
        self.operands: list[torch.Tensor | None] = []
        room, at = max(ranks) + 3, 5
        arena = torch.full(
            (at + sum(len(ranks) * room * (n + PACK + k) for n, k in shapes),), float("nan"), dtype=dtype
        )
        for n, k in shapes:
            scales, own, where = torch.full((len(ranks),), float("nan")), [], []
            for slot, rank in enumerate(ranks):
                if not rank:
                    own.append(None)
                    where.append([0, -1, -1, room])
                    continue
                first = torch.randn(rank, k, generator=generator).to(dtype)
                second = torch.randn(n, rank, generator=generator).to(dtype)
                scales[slot] = 0.5 + slot
                own.append((first, second, float(scales[slot])))
                arena[at : at + rank * k] = first.flatten()
                where.append([rank, at, at + rank * k + 2, room])
                at += rank * k + 2
                arena[at : at + len(pack(second))] = pack(second)
                at += len(pack(second)) + 1
            self.parts.append(own)
            if packed:
                self.operands += [arena, arena, torch.tensor(where), scales]
            else:
                (first, second, _), rank = own[0], ranks[0]  # type: ignore[misc]
                self.operands += [first, second, torch.tensor([[rank, 0, 0, rank]]), scales]

    def given(self, rows: Sequence[dict[int, float]]) -> list[Any]:
        return [*self.operands, *wants(rows)]

    def adapted(
        self, x: torch.Tensor, w: torch.Tensor, b: Any, i: int, rows: Sequence[dict[int, float]]
    ) -> torch.Tensor:
        """The layer as eager would have it, in the dtype of ``x``."""
        dtype, out = x.dtype, F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))
        made = []
        for r, row in enumerate(x):
            made.append(out[r])
            for slot, gate in (rows[r * len(rows) // len(x)] if rows else {}).items():
                if (found := self.parts[i][slot]) is not None:
                    first, second, scale = found
                    made[r] = made[r] + gate * scale * F.linear(F.linear(row, first.to(dtype)), second.to(dtype))
        return torch.stack(made)


def fits(rows: Sequence[dict[int, float]], count: int) -> list[dict[int, float]]:
    return list(rows) if not rows or count % len(rows) == 0 else list(rows)[:1]


def test_packing() -> None:
    b = torch.randn(37, 5)
    assert torch.equal(unpack(torch.cat([pack(b), torch.full((9,), float("nan"))]), 37, 5), b.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize(("width", "heights"), [(576, [576, 192, 192]), (33, [37, 9]), (64, [16, 48])])
@pytest.mark.parametrize("ranks", [(16, 16, 16, 0), (1, 24, 7, 128)], ids=str)
@pytest.mark.parametrize("wanted", WANTED)
def test_linear(count: int, width: int, heights: list[int], ranks: Any, wanted: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, width, generator=generator).to(dtype)
    weights = [torch.randn(n, width, generator=generator).to(dtype) for n in heights]
    biases = [torch.randn(n, generator=generator).to(dtype) if i else None for i, n in enumerate(heights)]
    layers, rows = Layers([(n, width) for n in heights], ranks, dtype), fits(WANTED[wanted], count)
    lora = layers.given(rows)
    found = OPS.skinny_linear(x, weights, biases, None, 0.0, None, lora)

    def plain(x: torch.Tensor) -> torch.Tensor:
        every = zip(weights, biases, strict=True)
        return torch.cat([layers.adapted(x, w, b, i, rows) for i, (w, b) in enumerate(every)], -1)

    exact, eager = plain(x.double()), plain(x)
    assert_no_further(exact, eager, found)
    assert_no_further(exact, eager, skinny_linear(x, weights, biases, lora=lora))
    parts = [[*lora[4 * i : 4 * i + 4], *lora[-2:]] for i in range(len(weights))]
    apart = [lora_linear(x, w, b, part) for w, b, part in zip(weights, biases, parts, strict=True)]
    assert_no_further(exact, eager, torch.cat(apart, -1))
    spelled = [add_lora(F.linear(x, w, b), x, part) for w, b, part in zip(weights, biases, parts, strict=True)]
    assert_no_further(exact, eager, torch.cat(spelled, -1))
    without = OPS.skinny_linear(x, weights, biases, None, 0.0, None, [])
    for r in range(count):  # bit for bit the base model, and the row by itself
        row = rows[r * len(rows) // count] if rows else {}
        if not row:
            assert torch.equal(found[r], without[r])
            assert torch.equal(apart[0][r], F.linear(x, weights[0], biases[0])[r])
        alone = OPS.skinny_linear(x[r : r + 1], weights, biases, None, 0.0, None, [*layers.operands, *wants([row])])
        assert torch.equal(found[r], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "groups"), [(17, 17), (150, 150), (96, 4), (64, 1), (130, 2)])
@pytest.mark.parametrize(("width", "height"), [(576, 192), (33, 37)])
@pytest.mark.parametrize("tokens", [False, True])
def test_many_rows(count: int, groups: int, width: int, height: int, tokens: bool, dtype: torch.dtype) -> None:
    """Rows of their own, in groups of neighbours, and tokens that a router decided for."""
    generator = torch.Generator().manual_seed(count)
    x, w = (torch.randn(n, width, generator=generator).to(dtype) for n in (count, height))
    layers = Layers([(height, width)], (16, 3, 0, 40), dtype)
    rows: list[dict[int, float]] = []
    for _ in range(groups):
        chosen = torch.randperm(4, generator=generator)[: int(torch.randint(0, 3, (1,), generator=generator))]
        rows.append({slot: float(torch.rand(1, generator=generator)) for slot in chosen.tolist()})
    rows[0] = {0: 0.5, 3: 1.0}
    lora = layers.given(rows)
    if tokens and groups == count:
        lora[-2][0] *= -1
    exact, eager = (layers.adapted(x.to(t), w, None, 0, rows) for t in (torch.float64, dtype))
    found, plain = lora_linear(x, w, None, lora), F.linear(x, w)
    assert_no_further(exact, eager, found)
    assert_no_further(exact, eager, add_lora(F.linear(x, w), x, lora))
    for r in range(count):
        assert rows[r * groups // count] or torch.equal(found[r], plain[r])
    if tokens:  # layers of other rows must have nothing for them
        lora[-2][0] = -groups
        for op in (lora_linear, lambda x, w, _, lora: add_lora(F.linear(x, w), x, lora)):
            with pytest.raises(RuntimeError, match=f"a router decided for {groups} tokens, and adapters of a layer"):
                op(x[:-1] if groups == count else x, w, None, lora)
        bare = [*lora[:2], lora[2] * torch.tensor([0, 1, 1, 1]), *lora[3:]]
        assert torch.equal(lora_linear(x[:-1], w, None, bare), F.linear(x[:-1], w)) or groups == count - 1


@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_many(dtype: torch.dtype, into: torch.dtype) -> None:
    shapes, places, at = [(37, 20, 3), (16, 8, 1), (5, 64, 40)], [], 2
    a, b = ([torch.randn(*((r, k) if which else (n, r))).to(dtype) for n, k, r in shapes] for which in (1, 0))
    for n, k, r in shapes:
        places += [at, at + r * k + 1]
        at += r * (k + n + PACK) + 3
    made = [torch.full((at,), float("nan"), dtype=into) for _ in range(2)]
    pack_lora(a, b, made[0], places)
    OPS.pack_lora(a, b, made[1], places)
    assert torch.equal(made[0].nan_to_num(nan=1e9), made[1].nan_to_num(nan=1e9))
    for i, (n, _, r) in enumerate(shapes):
        assert torch.equal(unpack(made[1][places[2 * i + 1] :], n, r).T, b[i].to(into))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 16, 20])
def test_matrices_as_they_are(rank: int, dtype: torch.dtype) -> None:
    x, w = torch.randn(3, 40).to(dtype), torch.randn(53, 40).to(dtype)
    layers, rows = Layers([(53, 40)], [rank], dtype, packed=False), [{0: 1.0}, {}, {0: 2.0}]
    exact, eager = (layers.adapted(x.to(t), w, None, 0, rows) for t in (torch.float64, dtype))
    assert_no_further(exact, eager, OPS.skinny_linear(x, [w], [None], None, 0.0, None, layers.given(rows)))
    assert_no_further(exact, eager, lora_linear(x, w, None, layers.given(rows)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("count", "width", "inner"), [(1, 576, 1536), (4, 33, 45), (16, 64, 24)])
@pytest.mark.parametrize("wanted", ["all the same", "some", "two at a time"])
def test_gated_mlp(count: int, width: int, inner: int, merged: bool, wanted: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(count, width, generator=generator).to(dtype) for _ in range(2))
    gate, up = (torch.randn(inner, width, generator=generator).to(dtype) / width**0.5 for _ in range(2))
    down = torch.randn(width, inner, generator=generator).to(dtype) / inner**0.5
    both, rows = torch.cat([gate, up]), fits(WANTED[wanted], count)
    entry = [(2 * inner, width)] if merged else [(inner, width)] * 2
    layers = Layers([*entry, (width, inner)], (4, 16, 9, 0), dtype)
    operands = layers.operands if not merged else [*layers.operands[:4], *[None] * 4, *layers.operands[4:]]

    def plain(x: torch.Tensor) -> torch.Tensor:
        if merged:
            g, u = layers.adapted(x, both, None, 0, rows).chunk(2, -1)
        else:
            g, u = (layers.adapted(x, w, None, i, rows) for i, w in enumerate((gate, up)))
        return layers.adapted(F.silu(g) * u, down, None, len(entry), rows) + residual.to(x.dtype)

    weights = (both, None) if merged else (gate, up)
    args = (x, None, 0.0, *weights, down, 0, residual, [*operands, *wants(rows)])
    assert_no_further(plain(x.double()), plain(x), OPS.gated_mlp(*args))
    assert_no_further(plain(x.double()), plain(x), gated_mlp(*args))
    if wanted == "some" and count == 4:
        assert torch.equal(OPS.gated_mlp(*args)[1], OPS.gated_mlp(*args[:-1], [])[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (4, 1), (2, 3)])
def test_attention(batch: int, tokens: int, dtype: torch.dtype) -> None:
    a = case(batch, tokens, dtype)
    shapes = [tuple(w.shape) for w in (*a["projections"], a["out"])]
    layers = Layers(shapes, (8, 3, 16, 0), dtype)
    rows = [{0: 1.0}, {1: 0.5, 2: 0.1}, {}, {2: 1.0}][:batch]

    def merged(row: dict[int, float], t: torch.dtype) -> dict[str, Any]:
        """The block of one row, with its adapters in the weights."""
        weights = [w.to(t) for w in (*a["projections"], a["out"])]
        for i in range(len(weights)):
            for slot, gate in row.items():
                first, second, scale = layers.parts[i][slot]  # type: ignore[misc]
                weights[i] = weights[i] + gate * scale * second.to(t) @ first.to(t)
        return {"projections": weights[:-1], "out": weights[-1]}

    def plain(t: torch.dtype) -> list[torch.Tensor]:
        made = []
        for b, row in enumerate(rows):
            one = {k: v[b : b + 1] if k in ("x", "keys", "values", "residual", "mask", "live", "cos", "sin")
                   and v is not None and len(v) == batch else v for k, v in a.items()}  # fmt: skip
            made.append(spelled_out({**one, **merged(row, t)}, t))
        return [torch.cat(parts) for parts in zip(*made, strict=True)]

    lora = layers.given(rows)
    exact, eager = plain(torch.float64), plain(dtype)
    for op in (OPS.attention_block, attention_block):
        given = {**a, "keys": a["keys"].clone(), "values": a["values"].clone()}
        assert_no_further(exact, eager, (op(**given, lora=lora), given["keys"], given["values"]))
    names = ("x", "norm", "eps", "projections", "biases", "k_norm", "head_eps", "cos", "sin")
    keys, values = a["keys"].clone(), a["values"].clone()
    key_value = {**a, "projections": a["projections"][1:], "biases": a["biases"][1:]}
    OPS.cache_block(*(key_value[n] for n in names), keys, values, a["position"], [*lora[4:12], *lora[-2:]])
    assert_no_further(exact[1:], eager[1:], [keys, values])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, w = torch.randn(8, 576), torch.randn(600, 576)
    lora = Layers([(600, 576)], (16, 5, 9, 0), torch.float32).given([{0: 1.0}, {1: 1.0}, {}, {2: 1.0}])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(OPS.skinny_linear(x, [w], [None], None, 0.0, None, lora))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f, found[0]) for f in found)


def test_what_a_table_says_is_read_at_each_call() -> None:
    x, w = torch.randn(2, 32), torch.randn(48, 32)
    layers = Layers([(48, 32)], (4, 4), torch.float32)
    lora, plain = layers.given([{0: 1.0}, {1: 1.0}]), OPS.skinny_linear(x, [w], [None], None, 0.0, None, [])
    assert not torch.equal(OPS.skinny_linear(x, [w], [None], None, 0.0, None, lora), plain)
    for there, now in zip(lora[-2:], wants([]), strict=True):
        there.copy_(now)
    assert torch.equal(OPS.skinny_linear(x, [w], [None], None, 0.0, None, lora), plain)


def test_tables_that_do_not_fit_are_refused() -> None:
    x, w = torch.randn(3, 32), torch.randn(48, 32)
    layers = Layers([(48, 32)], (4, 4), torch.float32)
    for op in (OPS.skinny_linear, skinny_linear):
        with pytest.raises(RuntimeError, match="adapters for 2 rows in a call of 3"):
            op(x, [w], [None], None, 0.0, None, layers.given([{0: 1.0}, {}]))
    many = [{i % 2 + i * 100: 1.0 for i in range(MOST + 1)}]
    routed = layers.given([{0: 1.0}] * 4)
    routed[-2][0] = -4
    for op in (OPS.skinny_linear, skinny_linear):
        with pytest.raises(RuntimeError, match="a router decided for 4 tokens, and adapters of a layer met 3"):
            op(x, [w], [None], None, 0.0, None, routed)
    with pytest.raises(RuntimeError, match=f"{MOST + 1} adapters for a row"):
        OPS.skinny_linear(x, [w], [None], None, 0.0, None, layers.given(many))


def test_registration() -> None:
    lora = Layers([(8, 16)], (4, 2), torch.float32).given([{0: 1.0}, {}])
    args = (torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(8), lora)
    torch.library.opcheck(OPS.lora_linear.default, args, test_utils=("test_schema", "test_faketensor"))


def test_memory_is_the_process_s_own() -> None:
    """Memory that a fork shares would have one process's adapters replaced by another's, and gets no huge pages."""
    made = zeros(3_000_000, torch.bfloat16)
    assert made.data_ptr() % (2 << 20) == 0
    assert not made.any()
    made.fill_(1)
    at = made.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode = line.split()[:2]
        first, end = (int(n, 16) for n in span.split("-"))
        if first <= at < end:
            assert mode == "rw-p"
            return
    raise AssertionError("no mapping of this process has the memory")
