"""``skipc.generate`` against transformers' own, and its loop without guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.runtime import registry
from skipc.runtime.chaining import chains_of
from skipc.runtime.decoder import cache_length
from skipc.runtime.generation import draw
from transformers import StaticCache

import skipc
from tests.harness import STRICT, eager_skip
from tests.models.zoo import ZOO

GREEDY = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "disable_compile": True}


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    model = ZOO["llama"].build()
    model.generation_config.eos_token_id = None
    return model, skipc.compile(model, **STRICT)


def prompt(batch: int = 1, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_tokens_of_transformers_without_guards(llama: tuple[Any, Any]) -> None:
    model, compiled = llama
    for length in (7, 9):
        ids = prompt(length=length)
        expected = model.generate(ids, max_new_tokens=20, **GREEDY)
        assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=20), expected)
    replay = compiled._decoder.replay
    assert replay.refused is None
    assert replay.replayed == (19 - 2) + (19 - 1)  # a later request is proven by one call
    before = sum(registry._compiled.values())
    skipc.generate(compiled, prompt(length=11), max_new_tokens=20)
    assert sum(registry._compiled.values()) == before, "a third prompt length compiled again"


def test_other_sizes_keep_the_kernels(llama: tuple[Any, Any]) -> None:
    """Dynamo makes variable what it sees change; steps must stay compiled for few rows and one cache length."""
    model = llama[0]
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    for batch, new in ((1, 12), (3, 12), (1, 300), (2, 400)):
        ids = prompt(batch)
        expected = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=new, eos_token_id=None), expected)
        decoder = compiled._decoder
        assert decoder.length == cache_length(7 + new)
        program = decoder.replay._last[0]
        assert len(chains_of(program.spec, program.exact)) == 1
    before = sum(registry._compiled.values())
    skipc.generate(compiled, prompt(2), max_new_tokens=10)
    assert compiled._decoder is decoder, "a longer cache serves shorter requests"
    assert sum(registry._compiled.values()) == before


@pytest.mark.parametrize(("tokens", "length"), [(1, 256), (256, 256), (257, 384), (385, 512), (1025, 1536)])
def test_cache_lengths(tokens: int, length: int) -> None:
    assert cache_length(tokens) == length


def test_left_padding(llama: tuple[Any, Any]) -> None:
    model, compiled = llama
    ids, mask = prompt(3), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    assert torch.equal(skipc.generate(compiled, ids, attention_mask=mask, max_new_tokens=12), expected)
    assert compiled._decoder.replay.replayed > 0


def test_end_tokens(llama: tuple[Any, Any]) -> None:
    model, compiled = llama
    ids = prompt(3)
    free = skipc.generate(compiled, ids, max_new_tokens=12)
    ends = [int(free[0, 9]), int(free[1, 12])]
    expected = model.generate(ids, max_new_tokens=12, eos_token_id=ends, **GREEDY)
    assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=12, eos_token_id=ends, pad_token_id=0), expected)


def test_streaming_stops_and_progress_is_shown(llama: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _, compiled = llama
    seen: list[int] = []

    def on_token(tokens: torch.Tensor) -> bool:
        seen.append(int(tokens))
        return len(seen) == 5

    out = skipc.generate(compiled, prompt(), max_new_tokens=12, on_token=on_token, progress=True)
    assert out[0, 7:].tolist() == seen
    assert "generating" in capsys.readouterr().out


def test_sampling(llama: tuple[Any, Any]) -> None:
    _, compiled = llama
    ids = prompt(2)

    def draw(seed: int, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return skipc.generate(compiled, ids, max_new_tokens=8, do_sample=True, generator=generator, **options)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    greedy = skipc.generate(compiled, ids, max_new_tokens=8)
    assert torch.equal(draw(1, top_k=1), greedy)
    assert torch.equal(draw(1, temperature=1e-5), greedy)
    assert torch.equal(draw(1, top_p=1e-9), greedy)

    def never(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[:, greedy[0, 7]] = -torch.inf
        return logits

    assert skipc.generate(compiled, ids, max_new_tokens=1, logits_processor=[never])[0, 7] != greedy[0, 7]


def test_draws_have_the_probabilities_of_the_logits() -> None:
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, generator=generator) * 2
    logits[0, ::3] = logits[1, -5:] = logits[2, :7] = -torch.inf
    for row in logits:
        drawn = draw(row.expand(count, -1), generator).bincount(minlength=40)
        expected = row.double().softmax(-1) * count
        assert not drawn[expected == 0].any()
        some = expected > 0
        statistic = float(((drawn[some] - expected[some]) ** 2 / expected[some]).sum())
        freedom = int(some.sum()) - 1
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_at_the_ends_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((2, 9), -torch.inf)
    logits[0, 3:5], logits[1, 8] = 0.0, 0.0
    for number, expected in ((0.0, [3, 8]), (0.49, [3, 8]), (0.51, [4, 8]), (1.0, [4, 8])):
        monkeypatch.setattr(torch, "rand", lambda size, number=number, **_: torch.full(size, number))
        assert draw(logits, None).tolist() == expected
    with pytest.raises(ValueError, match="no token to draw"):
        draw(torch.full((1, 4), -torch.inf), None)
    with pytest.raises(ValueError, match="no token to draw"):
        draw(torch.tensor([[0.0, torch.nan]]), None)


def test_sessions(llama: tuple[Any, Any]) -> None:
    model, compiled = llama
    ids, skip = prompt(), {"model.layers.1.mlp", "model.layers.0.self_attn"}
    plain = skipc.generate(compiled, ids, max_new_tokens=10)
    with eager_skip(model, skip):
        expected = model.generate(ids, max_new_tokens=10, **GREEDY)
    with compiled.session(skip=skip) as session:
        assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=10), expected)
        assert session.stats().skipped["model.layers.1.mlp"] == 10
        assert session.stats().recompiles == 0
    assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=10), plain)


@pytest.mark.parametrize("edit", ["in place", "replaced", "hook", "submodule"])
def test_an_edit_between_tokens_is_noticed(edit: str) -> None:
    model: Any = ZOO["llama"].build()
    model.generation_config.eos_token_id = None
    compiled = skipc.compile(model, **STRICT)
    mlp = model.model.layers[1].mlp

    def apply() -> None:
        if edit == "in place":
            with torch.no_grad():
                mlp.down_proj.weight.zero_()
        elif edit == "replaced":
            mlp.down_proj.weight = torch.nn.Parameter(torch.zeros_like(mlp.down_proj.weight))
        elif edit == "hook":
            mlp.register_forward_hook(lambda m, a, o: o * 0)
        else:
            mlp.down_proj = torch.nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
            torch.nn.init.zeros_(mlp.down_proj.weight)

    seen: list[int] = []

    def on_token(tokens: torch.Tensor) -> None:
        seen.append(int(tokens))
        if len(seen) == 8:
            apply()

    ids = prompt()
    out = skipc.generate(compiled, ids, max_new_tokens=16, on_token=on_token)
    # The same in eager: the prompt and 7 tokens with the first weights, the rest with the edited ones.
    fresh: Any = ZOO["llama"].build()
    cache = StaticCache(config=fresh.config, max_cache_len=64)
    with torch.no_grad():
        logits = fresh(out[:, :14], past_key_values=cache).logits[:, -1]
        assert int(logits.argmax()) == int(out[0, 14])
        for i in range(14, 22):
            logits = model(out[:, i : i + 1], past_key_values=cache).logits[:, -1]
            assert int(logits.argmax()) == int(out[0, i + 1])


def test_a_cache_that_counts_in_python_keeps_its_guards() -> None:
    model: Any = ZOO["gemma2"].build()  # sliding windows
    model.generation_config.eos_token_id = None
    compiled = skipc.compile(model, **STRICT)
    ids = prompt()
    expected = model.generate(ids, max_new_tokens=12, **GREEDY)
    assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=12), expected)
    assert compiled._decoder.replay.replayed == 0
    assert compiled._decoder.replay.refused


def test_what_torch_compile_returned(llama: tuple[Any, Any]) -> None:
    model, _ = llama
    compiled = torch.compile(model, backend="skipc", options=STRICT)
    ids = prompt()
    assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=6), model.generate(ids, max_new_tokens=6, **GREEDY))


def test_bad_requests(llama: tuple[Any, Any]) -> None:
    _, compiled = llama
    ids = prompt(2)
    with pytest.raises(ValueError, match="int64"):
        skipc.generate(compiled, ids.float())
    with pytest.raises(ValueError, match="padded on the left"):
        skipc.generate(compiled, ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0]] * 2))
    with pytest.raises(ValueError, match="does not fit"):
        skipc.generate(compiled, ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(TypeError, match="takes no cache"):
        skipc.generate(skipc.compile(torch.nn.Linear(2, 2)), ids)
    with pytest.raises(TypeError, match="decoders alone"):
        skipc.generate(skipc.compile(ZOO["t5"].build()), ids)
    assert torch.equal(skipc.generate(compiled, ids, max_new_tokens=0), ids)
