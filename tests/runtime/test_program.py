"""The host program: what it defers to its end, and what it must not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.runtime import registry
from skipc.runtime.chaining import chains_of
from torch import nn
from transformers import StaticCache

import skipc
from tests.harness import STRICT, assert_no_further, eager_skip, in_double, run_regions_uncompiled
from tests.models.zoo import ZOO

D = 16


class Counting(nn.Module):
    """Three residual linears. The first counts calls: in place, in a tensor that it gets, as a static cache does."""

    def __init__(self, late_reader: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(D, D) for _ in range(3))
        self.late_reader = late_reader

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x) * (count + 1)
        count.add_(1)
        x = x + self.second(x) * (count if self.late_reader else 1)
        return x + self.third(x) * (count if self.late_reader else 1)


@pytest.mark.parametrize("late_reader", [False, True])
def test_counters_run_last_unless_someone_reads_them(monkeypatch: Any, late_reader: bool) -> None:
    run_regions_uncompiled(monkeypatch)
    model = Counting(late_reader).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    twin = Counting(late_reader).eval()
    twin.load_state_dict(model.state_dict())
    nn.init.zeros_(twin.first.weight)
    nn.init.zeros_(twin.first.bias)
    x, count = torch.randn(1, 3, D), torch.zeros((), dtype=torch.long)
    compiled(x, count.clone())
    source = skipc.explain(model, x, count.clone()).program()
    assert ("late.append" in source) is not late_reader
    for call in range(1, 4):
        with compiled.session(skip={"first"}):
            found = compiled(x, count)
        assert count.item() == call
        torch.testing.assert_close(found, twin(x, torch.tensor(call - 1)))


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any, Any]:
    torch._dynamo.reset()  # forget sizes that other tests made dynamic
    model = ZOO["llama"].build()
    return model, in_double(model, {})[0], skipc.compile(model, fullgraph=True, **STRICT)


def steps(model: Any, call: Any, batch: int = 2, count: int = 4, length: int = 16) -> torch.Tensor:
    """Logits of a prefill and of decode steps with a static cache: float [batch, 1 + count, vocabulary]."""
    tokens = torch.randint(3, 90, (batch, 6 + count), generator=torch.Generator().manual_seed(3))
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        logits = [call(input_ids=tokens[:, :6], past_key_values=cache).logits[:, -1]]
        for i in range(6, 6 + count):
            logits.append(call(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits[:, 0])
    return torch.stack(logits, 1)


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("kv", ["project", "none"])
def test_chains_equal_eager_under_any_plan(decoder: tuple[Any, Any, Any], kv: Any) -> None:
    model, double, compiled = decoder
    steps(model, compiled)
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    for bits in range(1 << len(names)):
        skip = {n for i, n in enumerate(names) if bits >> i & 1}
        if kv == "none" and bits % 2 == 0 and bits:
            continue  # half of them will do
        with eager_skip(double, skip):
            truth = steps(double, double)
        with eager_skip(model, skip):
            eager = steps(model, model)
        with compiled.session(skip=skip, kv=kv) as session:
            first, again = steps(model, compiled), steps(model, compiled)  # step by step, and then joined
            assert session.stats().recompiles == 0
        assert_no_further(truth, eager, first)
        assert torch.equal(first, again)


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_a_decode_step_is_one_chain_and_sees_new_weights(decoder: tuple[Any, Any, Any]) -> None:
    model, _, compiled = decoder
    expected = steps(model, compiled)
    program = max((p for p in compiled_programs(model)), key=lambda p: len(chains_of(p.spec, p.exact)))
    (chain,) = chains_of(program.spec, program.exact)
    assert chain.links.results == 5, "four sublayers and the head"
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight.data
    try:
        weight.data = kept * 2  # the same parameter in other memory
        torch.testing.assert_close(steps(model, compiled), steps(model, model), rtol=1e-4, atol=1e-4)
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(kept * 3)
        torch.testing.assert_close(steps(model, compiled), steps(model, model), rtol=1e-4, atol=1e-4)
    finally:
        weight.data = kept
        model.model.layers[1].mlp.up_proj.weight = weight
    assert torch.equal(steps(model, compiled), expected)


def compiled_programs(model: Any) -> list[Any]:
    used = {id(p) for p in (*model.parameters(), *model.buffers())}
    return [p for p, parameters in registry._programs.items() if parameters <= used]


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_caches_of_other_lengths(decoder: tuple[Any, Any, Any]) -> None:
    model, double, compiled = decoder
    for length in (16, 24, 40):  # the second makes the length dynamic
        truth, eager = steps(double, double, length=length), steps(model, model, length=length)
        for _ in range(2):
            assert_no_further(truth, eager, steps(model, compiled, length=length))


class Rows(nn.Module):
    """Gated MLPs on a stream without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (
            nn.ModuleList(nn.Linear(a, b, bias=False) for _ in range(3)) for a, b in ((D, 24), (D, 24), (24, D))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            x = x + down(nn.functional.silu(gate(x)) * up(x))
        return x


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("sizes", [(4, D), (2, 1, 3, D)])
def test_chains_take_streams_of_any_rank(sizes: tuple[int, ...]) -> None:
    model = Rows().eval()
    compiled = skipc.compile(model, fullgraph=True, dynamic=False, **STRICT)
    x = torch.randn(sizes)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
    assert any(chains_of(p.spec, p.exact) for p in compiled_programs(model))


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_weights_die_with_their_model() -> None:
    def run() -> list[Any]:
        model = ZOO["llama"].build()
        compiled = skipc.compile(model, fullgraph=True, **STRICT)
        steps(model, compiled)
        steps(model, compiled)
        return [weakref.ref(p) for p in model.parameters()]

    weights = run()
    gc.collect()
    assert not any(w() is not None for w in weights)
