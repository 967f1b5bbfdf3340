"""The switch and the router on GPUs, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from skipc.kernels.gpu import merging, routing
from skipc.kernels.gpu.kernel import recorded
from skipc.kernels.merging import merge_lora
from skipc.kernels.routing import route_tokens

from tests.kernels.gpu import DTYPES, a_gpu, assert_close, in_double, slots_of


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with a_gpu():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers_in_one_launch(dtype: torch.dtype) -> None:
    shapes, turned = [(48, 70), (33, 64), (20, 20), (64, 48)], [False, False, False, True]
    weights = [torch.randn(k, n).to(dtype) if t else torch.randn(n, k).to(dtype)
               for (n, k), t in zip(shapes, turned, strict=True)]  # fmt: skip
    operands = [t for n, k in shapes for t in slots_of(k, n, (3, 17, 0), dtype)]
    operands[8:12] = [None] * 4  # a layer without adapters
    slots, factors = torch.tensor([1, 0, 2]), torch.tensor([0.5, -2.0, 1.0])
    truths, eagers, made = [w.double() for w in weights], [w.clone() for w in weights], [w + torch.nan for w in weights]
    merge_lora([w.double() for w in weights], truths, in_double(operands), turned, slots, factors)
    merge_lora(weights, eagers, operands, turned, slots, factors)
    with recorded() as launches:
        merging.merge_lora(weights, made, operands, turned, slots, factors)
    assert len(launches) == 1
    for m, t, e in zip(made, truths, eagers, strict=True):
        assert_close(m, t, e)
    assert torch.equal(made[2], weights[2])


def test_switching_back_gives_the_same_bits() -> None:
    weights = [torch.randn(40, 30) for _ in range(3)]
    operands = [t for _ in weights for t in slots_of(30, 40, (4, 7), torch.float32)]
    made = [torch.empty_like(w) for w in weights]
    seen = []
    for chosen in ([0], [1], [0], []):
        slots, factors = torch.tensor(chosen, dtype=torch.int64), torch.ones(len(chosen))
        merging.merge_lora(weights, made, operands, [False] * 3, slots, factors)
        seen.append([m.clone() for m in made])
    assert all(map(torch.equal, seen[0], seen[2]))
    assert all(map(torch.equal, seen[3], weights))
    assert not any(map(torch.equal, seen[0], seen[1]))


def test_what_cannot_be_merged_is_refused() -> None:
    weights = [torch.randn(8, 8), torch.randn(8, 8, dtype=torch.float16)]
    operands = [t for _ in weights for t in slots_of(8, 8, (2,), torch.float32)]
    with pytest.raises(RuntimeError, match="one dtype"):
        merging.merge_lora(weights, weights, operands, [False, False], torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_routing(dtype: torch.dtype, whole: float) -> None:
    experts, width, most, x = 9, 70, 3, torch.randn(2, 3, 70).to(dtype)
    slots = torch.tensor([4.0, -1.0, 0, 7, 7, 3, 2, 1, 5])
    router = torch.cat([torch.tensor([experts, width, most, whole]), slots, torch.randn(experts),
                        torch.randn(experts * width) / 8, torch.full((50,), torch.nan)])  # fmt: skip
    found = []
    for route in (route_tokens, routing.route_tokens):
        table, gates = torch.full((60,), -5), torch.full((60,), -5.0)
        route(x, router, table, gates)
        found.append((table, gates))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_equal_experts_go_in_order() -> None:
    router = torch.cat([torch.tensor([4.0, 8.0, 2.0, 1.0]), torch.arange(4.0), torch.zeros(4), torch.zeros(32)])
    table, gates = torch.zeros(40, dtype=torch.int64), torch.zeros(40)
    routing.route_tokens(torch.randn(3, 8), router, table, gates)
    assert table[:8].tolist() == [-3, 2, 0, 1, 0, 1, 0, 1]
    assert gates[2:8].tolist() == [0.5] * 6


def test_without_experts_nothing_is_written() -> None:
    table, gates = torch.full((40,), 3), torch.full((40,), 3.0)
    routing.route_tokens(torch.randn(2, 8), torch.zeros(60), table, gates)
    assert (table == 3).all()
    assert (gates == 3).all()


def test_more_tokens_than_a_table_holds_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than"):
        routing.route_tokens(torch.randn(9, 8), torch.zeros(60), torch.zeros(40, dtype=torch.int64), torch.zeros(40))
