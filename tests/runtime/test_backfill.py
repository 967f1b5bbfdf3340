"""``kv="backfill"``: keys that skipped attentions did not write are computed later, in full, some tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skipc.runtime.policies.base import Call, Policy
from transformers import DynamicCache, StaticCache

import skipc
from tests.end_to_end.test_caches import deeper_llama
from tests.harness import STRICT, eager_skip

SKIP = frozenset(["model.layers.1.self_attn", "model.layers.2.mlp", "model.layers.3.self_attn"])


class EveryFourth(Policy):
    """Decode steps skip some sites, but for every fourth."""

    def __init__(self, skip: frozenset[str] = SKIP):
        self.skip = skip

    def decide(self, call: Call) -> skipc.GateTable:
        skips = call.phase == "decode" and call.position % 4
        return skipc.GateTable.of(call.names, skip=self.skip if skips else (), measures=False)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    model = deeper_llama()
    model.generation_config.eos_token_id = None
    return model, skipc.compile(model, fullgraph=True, kv="backfill", **STRICT)


def spelled_out(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, new: int) -> tuple[torch.Tensor, Any, int]:
    """The same in eager, token by token: tokens, cache, and how many ran again."""
    kv = StaticCache(config=model.config, max_cache_len=256)
    batch, prompt = ids.shape
    full = torch.ones(batch, 256, dtype=torch.long)
    if mask is not None:
        full[:, :prompt] = mask
    positions = (full.cumsum(-1) - 1).clamp(min=0)

    def call(start: int, end: int) -> torch.Tensor:
        for layer in kv.layers:
            layer.cumulative_length.fill_(start)
        extra = {} if mask is None else {"attention_mask": full, "position_ids": positions[:, start:end]}
        return model(ids[:, start:end], past_key_values=kv, **extra).logits[:, -1].argmax(-1)

    again, hole = 0, None
    following = call(0, prompt)
    for at in range(prompt, prompt + new):
        ids = torch.cat([ids, following[:, None]], 1)
        if at == prompt + new - 1:
            break
        skips = at % 4 != 0
        if not skips and hole is not None:
            call(hole, at)
            again, hole = again + at - hole, None
        hole = at if skips and hole is None else hole
        with eager_skip(model, SKIP if skips else ()):
            following = call(at, at + 1)
    return ids, kv, again


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_cache_of_running_again(models: tuple[Any, Any], batch: int) -> None:
    model, compiled = models
    ids = torch.randint(3, 90, (batch, 10), generator=torch.Generator().manual_seed(batch))
    mask = None if batch == 1 else torch.tensor([[0] * n + [1] * (10 - n) for n in (0, 4, 1)])
    expected, kv, again = spelled_out(model, ids, mask, 18)
    with compiled.session(policy=EveryFourth()) as session:
        found = skipc.generate(compiled, ids, attention_mask=mask, max_new_tokens=18)
    assert torch.equal(found, expected)
    assert session.stats().backfilled == again > 8
    valid = torch.ones(batch, 24, dtype=torch.bool)  # behind the last step that ran everything
    if mask is not None:
        valid[:, :10] = mask.bool()
    for mine, theirs in zip(compiled._decoder.cache.layers, kv.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            torch.testing.assert_close(a.transpose(1, 2)[:, :24][valid], b.transpose(1, 2)[:, :24][valid])


def test_holes_that_nobody_fills_are_refused(models: tuple[Any, Any]) -> None:
    model, compiled = models
    kv = StaticCache(config=model.config, max_cache_len=256)
    with compiled.session(policy=EveryFourth()) as session:
        compiled(torch.arange(3, 9)[None], past_key_values=kv)
        for token in (9, 10):
            assert session.missing == 0
            compiled(torch.tensor([[token]]), past_key_values=kv)
        assert session.missing == 2
        with pytest.raises(skipc.PlanError, match="lacks the keys of tokens 6 to 7"):
            compiled(torch.tensor([[11]]), past_key_values=kv)
        for layer in kv.layers:
            layer.cumulative_length.fill_(6)
        with compiled.session():
            compiled(torch.tensor([[9, 10]]), past_key_values=kv)
        session.filled(2)
        compiled(torch.tensor([[11]]), past_key_values=kv)
        assert session.stats().backfilled == 2


def test_growing_caches_are_refused(models: tuple[Any, Any]) -> None:
    model, compiled = models
    with pytest.raises(skipc.PlanError, match="keeps its keys"), compiled.session(skip=SKIP):
        compiled(torch.arange(3, 9)[None], past_key_values=DynamicCache(config=model.config))
