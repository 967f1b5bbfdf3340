"""``kv="backfill"``: keys that skipped attentions did not write are computed later, in full, some tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skipc.runtime.policies.base import Call, Policy
from transformers import DynamicCache, StaticCache

import skipc
from tests.end_to_end.test_caches import deeper_llama
from tests.harness import STRICT, eager_skip

SKIP = frozenset(["model.layers.1.self_attn", "model.layers.2.mlp", "model.layers.3.self_attn"])


def every_fourth(position: int) -> frozenset[str]:
    """Skip some sites, but at every fourth step."""
    return SKIP if position % 4 else frozenset()


def in_turn(position: int) -> frozenset[str]:
    """An attention is skipped for long, and meanwhile another comes and goes."""
    early = {"model.layers.1.self_attn"} if position < 24 else set()
    return frozenset(early | ({"model.layers.2.self_attn"} if position % 5 < 3 else set()))


class Scheduled(Policy):
    """Decode steps skip what a schedule says."""

    def __init__(self, schedule: Callable[[int], frozenset[str]] = every_fourth):
        self.schedule = schedule

    def decide(self, call: Call) -> skipc.GateTable:
        skip = self.schedule(call.position) if call.phase == "decode" else ()
        return skipc.GateTable.of(call.names, skip=skip, measures=False)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    model = deeper_llama()
    model.generation_config.eos_token_id = None
    return model, skipc.compile(model, fullgraph=True, kv="backfill", **STRICT)


def spelled_out(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, new: int, schedule: Callable[[int], frozenset[str]]
) -> tuple[torch.Tensor, Any, int]:
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

    again, holes = 0, {}
    following = call(0, prompt)
    for at in range(prompt, prompt + new):
        ids = torch.cat([ids, following[:, None]], 1)
        if at == prompt + new - 1:
            break
        skip = schedule(at)
        if not holes.keys() <= skip:
            first = min(holes.values())
            call(first, at)
            again, holes = again + at - first, {}
        holes |= {name: at for name in skip if name.endswith("attn") and name not in holes}
        with eager_skip(model, skip):
            following = call(at, at + 1)
    return ids, kv, again


@pytest.mark.parametrize(("batch", "schedule"), [(1, every_fourth), (3, every_fourth), (1, in_turn)])
def test_tokens_and_cache_of_running_again(models: tuple[Any, Any], batch: int, schedule: Any) -> None:
    model, compiled = models
    ids = torch.randint(3, 90, (batch, 10), generator=torch.Generator().manual_seed(batch))
    mask = None if batch == 1 else torch.tensor([[0] * n + [1] * (10 - n) for n in (0, 4, 1)])
    expected, kv, again = spelled_out(model, ids, mask, 19, schedule)
    with compiled.session(policy=Scheduled(schedule), record=True) as session:
        found = skipc.generate(compiled, ids, attention_mask=mask, max_new_tokens=19)
    assert torch.equal(found, expected)
    assert session.stats().backfilled == again > 8
    valid = torch.ones(batch, 24, dtype=torch.bool)  # before the last step that ran everything
    if mask is not None:
        valid[:, :10] = mask.bool()
    caches = [(layer.keys.clone(), layer.values.clone()) for layer in compiled._decoder.cache.layers]
    for mine, theirs in zip(caches, kv.layers, strict=True):
        for a, b in zip(mine, (theirs.keys, theirs.values), strict=True):
            torch.testing.assert_close(a.transpose(1, 2)[:, :24][valid], b.transpose(1, 2)[:, :24][valid])
    with compiled.session(route=session.route):
        assert torch.equal(skipc.generate(compiled, ids, attention_mask=mask, max_new_tokens=19), found)
    for (keys, values), layer in zip(caches, compiled._decoder.cache.layers, strict=True):
        assert torch.equal(keys[:, :, :28], layer.keys[:, :, :28])
        assert torch.equal(values[:, :, :28], layer.values[:, :, :28])


def test_requests_of_one_session_have_caches_of_their_own(models: tuple[Any, Any]) -> None:
    compiled = models[1]
    ids = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(1))
    with compiled.session(policy=Scheduled()):
        skipc.generate(compiled, ids, max_new_tokens=4)
        skipc.generate(compiled, ids, max_new_tokens=4)


def test_holes_that_nobody_fills_are_refused(models: tuple[Any, Any]) -> None:
    model, compiled = models
    kv = StaticCache(config=model.config, max_cache_len=256)
    with compiled.session(policy=Scheduled()) as session:
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
