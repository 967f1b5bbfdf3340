"""Adapters merged into a copy of the weights for some sessions, and what decides about that."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.lora import pack
from skipc.kernels.merging import merge_lora

import skipc
from skipc.adapters.adapter import Adapter
from skipc.adapters.arranging import Arranger
from skipc.adapters.modes import Costs, Decision, majority, mixture
from tests.adapters.test_adapter import ids
from tests.adapters.test_bank import PATH, TRANSPOSED, Case, logits, made
from tests.harness import assert_no_further
from tests.models.zoo import ZOO


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("llama")


def set_costs(bank: skipc.AdapterBank, adapter: float, row: float, switch: float) -> Arranger:
    arranger: Arranger = bank._arranger
    arranger._costs = Costs(adapter, row, switch)
    if arranger._merged is not None:
        arranger._merged.seconds = None
    return arranger


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_rows_give_what_peft_gives(name: str, dtype: torch.dtype) -> None:
    case, given = Case(name, dtype, **(TRANSPOSED if name == "gpt2" else {})), ids(2, 6)
    for key in ("r4", "r16"):
        with case.compiled.session(adapters=key, adapter_mode="merged") as session:
            found = logits(case.compiled, given)
        assert str(session.stats().adapters) == f"merged with {key} to be merged"
        eager = logits(copy.deepcopy(case.peft[key]), given)
        truth = logits(copy.deepcopy(case.peft[key]).double(), given)
        merged = skipc.merge_adapters(case.base, Adapter.of(case.peft[key]))
        own = logits(case.base, given)
        functional = torch.func.functional_call(case.base, merged.weights, (given,), {"use_cache": False}).logits
        assert_no_further(truth, max(eager, functional, key=lambda e: float((e - truth).abs().max())), found, 4)
        assert not torch.allclose(found, own, atol=1e-2)


def test_from_one_to_another_to_none_and_back(llama: Case) -> None:
    """In prompts and in steps, whose inputs are bound; in all modes in turns. The same bits each time, whatever was
    merged before, and nothing is compiled."""
    given, choose = ids(3, 5), random.Random(0)
    cases: list[tuple[Any, Any]] = [
        ("r4", "merged"), ("r7", "merged"), ({"r4": 0.5, "r16": -1.0}, "merged"), (["r7"] * 3, "merged"),
        (["r4", "r4", None], "mixture"), (["r4", "r7", "r4"], "mixture"), (["r4", None, "r16"], "unmerged"),
        ([None] * 3, "unmerged"), ([None] * 3, "merged"),
    ]  # fmt: skip
    plain = skipc.generate(llama.compiled, given, max_new_tokens=6)
    first: dict[int, torch.Tensor] = {}
    strict = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    for _ in range(40):
        i = choose.randrange(len(cases))
        wanted, mode = cases[i]
        with torch._dynamo.config.patch(**strict), llama.compiled.session(adapters=wanted, adapter_mode=mode) as s:
            found = skipc.generate(llama.compiled, given, max_new_tokens=6)
        assert s.stats().recompiles == 0
        assert torch.equal(first.setdefault(i, found), found)
        assert torch.equal(skipc.generate(llama.compiled, given, max_new_tokens=6), plain)
    assert len(first) == len(cases)
    for one, other in ((0, 5), (1, 3)):  # the first rows; names for all and by row
        assert torch.equal(first[one][0], first[other][0])
    for i in (7, 8):
        assert torch.equal(first[i], plain)
    for i, name in enumerate(("r4", "r7", "r4")):
        row, mask = given[i : i + 1], torch.ones_like(given[:1])
        text = llama.eager(name).generate(input_ids=row, attention_mask=mask, max_new_tokens=6, do_sample=False)
        assert torch.equal(first[5][i], text[0])
    assert torch.equal(first[4][2], plain[2])


def test_rows_beside_what_is_merged(llama: Case) -> None:
    given, wanted = ids(4, 6), ["r16", {"r16": 1.0, "r4": 0.5}, None, "r16"]
    with llama.compiled.session(adapters=wanted):
        expected = llama.compiled(given).logits
    with llama.compiled.session(adapters=wanted, adapter_mode="mixture"):
        torch.testing.assert_close(llama.compiled(given).logits, expected, atol=5e-4, rtol=5e-4)
    assert majority([{}, {1: 1.0}, {2: 1.0}, {2: 1.0}]) == {2: 1.0}
    assert majority([{}, {}]) is None
    rows = [{1: 1.0}, {}, {1: 0.5}, {1: 1.0, 2: 2.0}, {2: 1.0}]
    assert mixture(rows, {1: 1.0}) == [{}, {1: -1.0}, {1: -0.5}, {2: 2.0}, {1: -1.0, 2: 1.0}]


def test_written_weights_are_merged_anew(llama: Case) -> None:
    given, weight = ids(1, 4), llama.base.get_parameter(f"{PATH}.weight")

    def run(**given_mode: Any) -> torch.Tensor:
        with llama.compiled.session(adapters="r4", **given_mode):
            return llama.compiled(given).logits

    before = run(adapter_mode="merged")
    weight.mul_(2)
    after, expected = run(adapter_mode="merged"), run()
    weight.div_(2)
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(run(adapter_mode="merged"), before)
    new = made(5)
    llama.bank.load("new", new)
    with llama.compiled.session(adapters="new", adapter_mode="merged"):
        first = llama.compiled(given).logits
    llama.bank.load("new", Adapter("new", {p: skipc.LoRA(x.a * 2, x.b, x.scale) for p, x in new.layers.items()}))
    with llama.compiled.session(adapters="new", adapter_mode="merged"):
        assert not torch.allclose(llama.compiled(given).logits, first, atol=1e-3)
    llama.bank.unload("new")


def test_what_does_not_go_is_refused(llama: Case) -> None:
    session = llama.compiled.session
    with pytest.raises(skipc.AdapterError, match=r"one of 'unmerged', 'merged', 'mixture', 'auto', not 'fused'"):
        session(adapters="r4", adapter_mode="fused").__enter__()
    with pytest.raises(skipc.AdapterError, match="rows that all want the same"):
        session(adapters=["r4", None], adapter_mode="merged").__enter__()
    router = skipc.AdapterRouter(torch.randn(2, 64), ["r4", "r7"])
    with pytest.raises(skipc.AdapterError, match="a router run unmerged, not 'merged'"):
        session(adapters=router, adapter_mode="merged").__enter__()
    plan = skipc.Plan(weights={f"{PATH}.weight": llama.base.get_parameter(f"{PATH}.weight") * 2})
    with pytest.raises(skipc.SessionError, match="leaves adapters unmerged"):
        session(adapters="r4", plan=plan, adapter_mode="merged")
    with (
        session(adapters="r4", adapter_mode="merged"),
        session(adapters=["r4", "r4"], adapter_mode="merged"),
    ):
        llama.compiled(ids(2, 4))
        with pytest.raises(skipc.AdapterError, match=r"2 open session\(s\) run with r4 merged"):
            session(adapters="r7", adapter_mode="merged").__enter__()
        set_costs(llama.bank, 1.0, 1.0, 0.0)
        with session(adapters="r7", adapter_mode="auto") as other:
            llama.compiled(ids(2, 4))
        assert other.stats().adapters.startswith("unmerged (adapters in 256 calls: unmerged 512000.0 ms)")
    assert not any(loaded.users for loaded in llama.bank._in_slots.values())
    base = ZOO["llama"].build()
    base.lm_head.weight = base.model.embed_tokens.weight
    tied = skipc.AdapterBank(base, targets=["lm_head"])
    tied.load("head", made(0, paths=("lm_head",)))
    with pytest.raises(skipc.AdapterError, match="lm_head is tied to another"):
        tied.lease("head", "merged")
    assert tied.lease("head", "auto").arranged.decision.mode == "unmerged"


def test_weights_of_another_form_are_refused() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base)
    bank.load("a", made(0))
    bank.lease("a", "merged").release()
    base.to(torch.bfloat16)
    with pytest.raises(skipc.AdapterError, match="another form than those that the bank was made for"):
        bank.lease("a", "merged")
    assert not any(loaded.users for loaded in bank._in_slots.values())
    base = ZOO["llama"].build()
    weight = base.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous().T
    bank = skipc.AdapterBank(base)
    bank.load("a", made(0))
    with pytest.raises(skipc.AdapterError, match="q_proj is not contiguous"):
        bank.lease("a", "merged")
    assert bank.explain("a") == Decision("unmerged")


def test_whoever_waits_gets_the_memory() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=2, when_full="wait", timeout=30)
    for name in ("a", "b"):
        bank.load(name, made(ord(name)))
    first, found = bank.lease("a", "merged"), []
    thread = threading.Thread(target=lambda: found.append(bank.lease("b", "merged")))
    thread.start()
    time.sleep(0.2)
    assert not found
    first.release()
    thread.join(timeout=30)
    assert found[0].arranged.decision == Decision("merged", "b", True)


def test_auto_takes_the_least_time(llama: Case) -> None:
    """With costs that are given: one adapter is merged if that pays within the calls, what is merged already at once,
    and rows that differ where most of them want the same."""
    arranger, explain = set_costs(llama.bank, 1.0, 1.0, 100.0), llama.bank.explain
    arranger._merged = None
    assert str(explain("r4")) == (
        "merged with r4 to be merged (adapters in 256 calls: unmerged 512000.0 ms, merged 100000.0 ms)"
    )
    assert explain([None, None]).mode == "unmerged"
    set_costs(llama.bank, 0.1, 0.1, 100.0)
    assert explain("r4").mode == "unmerged"
    llama.bank.lease("r4", "merged").release()
    set_costs(llama.bank, 0.1, 0.1, 100.0)
    assert explain("r4") == Decision("merged", "r4", False, 256, explain("r4").seconds)
    assert explain("r7").mode == "unmerged"
    set_costs(llama.bank, 1.0, 1.0, 0.0)
    assert explain(["r4"] * 5 + ["r7", None]).mode == "mixture"
    assert explain(["r4", "r7", None, "r16"]).mode == "unmerged"
    set_costs(llama.bank, 1.0, 1.0, 100.0)
    with llama.compiled.session(adapters=["r4", "r4"], adapter_mode="auto") as session:
        llama.compiled(ids(2, 4))
    assert session.stats().adapters.startswith("merged with r4 in place (adapters in 256 calls: unmerged 768000.0 ms")
    assert "adapters: merged with r4 in place" in str(session.stats())


def test_costs_are_measured() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=2)
    bank.load("a", made(0, rank=16))
    decision = bank.explain("a")
    assert decision.seconds is not None
    assert decision.seconds.keys() == {"unmerged", "merged"}
    costs = bank._arranger._costs
    assert costs is not None
    assert 0 <= costs.adapter < 0.1
    assert 0 < costs.switch < 1
    assert bank._arranger._merged is None  # nobody's memory is taken for a guess


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (37, 33), (64, 192), (130, 64)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_native_kernel(shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> None:
    assert native.available() is None
    torch.manual_seed(0)
    n, k = shape
    ranks, parts = (5, 0, 16), []
    arena, at, where = torch.full((60_000,), float("nan"), dtype=dtype), 3, []
    for rank in ranks:
        a, b = torch.randn(rank, k).to(dtype), torch.randn(n, rank).to(dtype)
        parts.append((a, b))
        packed = pack(b)
        arena[at : at + rank * k] = a.flatten()
        where.append([rank, at, at + rank * k, 16])
        arena[at + rank * k :][: len(packed)] = packed
        at += rank * k + len(packed) + 5
    lora = [arena, arena, torch.tensor(where), torch.tensor([0.5, float("nan"), 2.0])]
    weight = torch.randn(shape).to(dtype)
    stored = weight.T.contiguous() if transposed else weight
    for chosen in ({}, {0: 1.0}, {0: 0.3, 1: 1.0, 2: -1.5}):
        truth = weight.double()
        for slot, factor in chosen.items():
            if ranks[slot]:
                a, b = parts[slot]
                truth = truth + factor * lora[3][slot].item() * (b.double() @ a.double())
        truth = truth.T if transposed else truth
        slots, factors = torch.tensor(list(chosen), dtype=torch.int64), torch.tensor(list(chosen.values()))
        found = []
        for run in (merge_lora, torch.ops.skipc.merge_lora):
            out = torch.full_like(stored, float("nan"))
            run([stored], [out], lora, [transposed], slots, factors)
            found.append(out)
        assert_no_further(truth, *found)
        if not chosen:
            assert torch.equal(found[1], stored)
