"""Many adapters of many ranks, in batches of many sizes and of several kinds of popularity, beside eager in fp64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import skipc
from skipc.adapters.adapter import Adapter, LoRA
from tests.adapters.test_adapter import ids
from tests.harness import STRICT, assert_no_further
from tests.models.zoo import ZOO

RANKS = (1, 2, 3, 5, 8, 13, 16, 24, 32, 48, 63)  # of a layer's 64 inputs and outputs, fewer
COUNT = 32


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def adapters_of(base: Any) -> dict[str, Adapter]:
    """Each with a rank of its own in each layer; one in five leaves the layer as it is."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i in range(COUNT):
        layers = {}
        for j, (path, module) in enumerate(base.named_modules()):
            if isinstance(module, torch.nn.Linear) and path != "lm_head" and (i + j) % 5:
                n, k = module.weight.shape
                rank = min(RANKS[(3 * i + j) % len(RANKS)], n, k)
                a, b = (torch.randn(*s, generator=generator) * 0.3 / rank**0.5 for s in ((rank, k), (n, rank)))
                layers[path] = LoRA(a, b, 0.5 + i / COUNT)
        made[f"a{i}"] = Adapter(f"a{i}", layers)
    return made


def popular(kind: str, batch: int) -> list[str | None]:
    generator = torch.Generator().manual_seed(batch)
    if kind == "all base":
        return [None] * batch
    if kind == "identical":
        return ["a3"] * batch
    if kind == "each its own":
        return [f"a{(5 * i) % COUNT}" for i in range(batch)]
    ranked = torch.arange(1.0, COUNT + 2).pow(-1.2)  # Zipf, the base model among the popular ones
    drawn = ranked.multinomial(batch, replacement=True, generator=generator).tolist()
    return [None if i == 1 else f"a{i % COUNT}" for i in drawn]


class Eager:
    """The base model with hooks that add what each row wants."""

    def __init__(self, base: Any, adapters: dict[str, Adapter], dtype: torch.dtype):
        self.model, self.adapters = copy.deepcopy(base).to(dtype), adapters
        self.rows: Sequence[str | None] = ()
        for path in {path for adapter in adapters.values() for path in adapter.layers}:
            self.model.get_submodule(path).register_forward_hook(self.adding(path))

    def adding(self, path: str) -> Any:
        def add(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            made = out.clone()
            for r, name in enumerate(self.rows):
                layer = self.adapters[name].layers.get(path) if name is not None else None
                if layer is not None:
                    between = F.linear(args[0][r], layer.a.to(out.dtype))
                    made[r] += layer.scale * F.linear(between, layer.b.to(out.dtype))
            return made

        return add

    def __call__(self, given: torch.Tensor, rows: Sequence[str | None]) -> torch.Tensor:
        self.rows = rows
        return self.model(given, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many(dtype: torch.dtype) -> None:
    base = ZOO["llama"].build().to(dtype)
    adapters = adapters_of(base)
    bank = skipc.AdapterBank(base, slots=COUNT, max_rank=64)
    for name, adapter in adapters.items():
        bank.load(name, adapter)
    rounded = {
        n: Adapter(n, {p: LoRA(x.a.to(dtype), x.b.to(dtype), x.scale) for p, x in a.layers.items()})
        for n, a in adapters.items()
    }
    truth, eager = (Eager(base, rounded, d) for d in (torch.float64, dtype))
    compiled = skipc.compile(base, adapters=bank, fullgraph=True, **STRICT)
    for batch in (1, 2, 8, 16, 32) if dtype == torch.float32 else (5, 32):
        for tokens in (1, 4):
            given = ids(batch, tokens, seed=batch)
            plain = compiled(given, use_cache=False).logits
            for kind in ("all base", "identical", "each its own", "zipf"):
                rows = popular(kind, batch)
                with compiled.session(adapters=rows):
                    found = compiled(given, use_cache=False).logits
                assert_no_further(truth(given, rows), eager(given, rows), found, factor=4)
                for r, name in enumerate(rows):
                    assert name is not None or torch.equal(found[r], plain[r])
