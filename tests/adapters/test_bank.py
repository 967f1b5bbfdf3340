"""Rows that choose among the adapters of a bank, beside PEFT's eager models; and who may have which slot."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels.lora import matrices
from skipc.runtime.decoder import Decoder

import skipc
from skipc.adapters.adapter import Adapter, LoRA
from tests.adapters.test_adapter import LINEARS, ids, trained
from tests.harness import STRICT, assert_no_further, in_threads
from tests.models.zoo import ZOO
from tests.runtime.test_backfill import Scheduled

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(seed: int, rank: int = 2, paths: tuple[str, ...] = (PATH,)) -> Adapter:
    """An adapter of the small llama."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in paths:
        weight = ZOO["llama"].build().get_parameter(f"{path}.weight")
        a, b = (torch.randn(*s, generator=generator) for s in ((rank, weight.shape[1]), (weight.shape[0], rank)))
        layers[path] = LoRA(a, b, 0.3)
    return Adapter(str(seed), layers)


class Case:
    """A compiled model with a bank, and PEFT models with the same adapters."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, ranks: tuple[int, ...] = (4, 7, 16), **config: Any
    ):
        self.base = ZOO[name].build().to(dtype)
        self.peft = {f"r{r}": trained(name, r, dtype, r=r, **config) for r in ranks}
        self.bank = skipc.AdapterBank(self.base, slots=4, max_rank=max(ranks))
        for key, model in self.peft.items():
            self.bank.load(key, model)
        self.compiled = skipc.compile(self.base, adapters=self.bank, fullgraph=True, **STRICT)

    def eager(self, name: str | None, double: bool = False) -> Any:
        model = self.base if name is None else self.peft[name]
        return model.double() if double else model


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("llama")


def logits(model: Any, given: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=given, **({"use_cache": False} if hasattr(model, "generate") else {}))
    return getattr(out, "logits", None) if getattr(out, "logits", None) is not None else out[0]


TRANSPOSED = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "gpt2": TRANSPOSED,
    "gemma2": {},
    "opt": {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]},
    "gpt_neox": {"target_modules": "all-linear"},
    "bert": {"target_modules": ["query", "value", "dense"]},
}


SLOW = ("gemma2", "opt", "gpt_neox")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ARCHITECTURES])
def test_mixed_rows_give_what_peft_gives(name: str) -> None:
    case = Case(name, torch.bfloat16 if name == "llama" else torch.float32, **ARCHITECTURES[name])
    given, wanted = ids(4, 9), ["r4", None, "r16", "r7"]
    with case.compiled.session(adapters=wanted):
        found = logits(case.compiled, given)
    base = logits(case.base, given)
    eager = torch.cat([logits(case.eager(w), given[i : i + 1]) for i, w in enumerate(wanted)])
    truth = torch.cat([logits(case.eager(w, True), given[i : i + 1]) for i, w in enumerate(wanted)])
    case.base.to(base.dtype)
    assert_no_further(truth, eager, found, factor=4)  # rows of one call meet other products than rows alone
    assert all(not torch.allclose(found[i], base[i], atol=1e-2) for i in (0, 2, 3))
    assert torch.equal(logits(case.compiled, given)[1], found[1])  # no session: no row wants anything


def test_generated_text_is_that_of_peft(llama: Case) -> None:
    given = ids(3, 5)
    for wanted in (["r4", None, "r16"], ["r7", "r7", "r7"], [None, "r16", "r4"]):
        with llama.compiled.session(adapters=wanted):
            found = skipc.generate(llama.compiled, given, max_new_tokens=8)
        for i, name in enumerate(wanted):
            row = given[i : i + 1]
            mask = torch.ones_like(row)
            text = llama.eager(name).generate(input_ids=row, attention_mask=mask, max_new_tokens=8, do_sample=False)
            assert torch.equal(found[i], text[0])


def test_several_at_a_time_and_one_for_all(llama: Case) -> None:
    given = ids(2, 6)
    both = skipc.merge_adapters(llama.base, {Adapter.of(llama.peft["r4"]): 0.5, Adapter.of(llama.peft["r7"]): -1.0})
    expected = torch.func.functional_call(llama.base, both.weights, (given,), tie_weights=False).logits
    with llama.compiled.session(adapters={"r4": 0.5, "r7": -1.0}):
        torch.testing.assert_close(llama.compiled(given).logits, expected, atol=2e-4, rtol=2e-4)
    with llama.compiled.session(adapters=[None, {"r4": 0.5, "r7": -1.0}]):
        found = llama.compiled(given).logits
    torch.testing.assert_close(found[1], expected[1], atol=2e-4, rtol=2e-4)
    assert torch.equal(found[0], llama.compiled(given).logits[0])
    with llama.compiled.session(adapters="r16"):
        for rows in (1, 2):  # whatever the batch
            expected = llama.peft["r16"](given[:rows]).logits
            torch.testing.assert_close(llama.compiled(given[:rows]).logits, expected, atol=2e-4, rtol=2e-4)


def test_random_switches_loads_and_evictions_compile_nothing(llama: Case) -> None:
    """Also: whatever was there before, the same rows get the same bits."""
    bank, given, choose = llama.bank, ids(3, 1), random.Random(0)
    extra = {f"x{i}": made(i, rank=1 + i % 9, paths=(PATH, "model.layers.1.mlp.down_proj")) for i in range(6)}
    first: dict[str | None, torch.Tensor] = {}
    with llama.compiled.session(adapters=[None, None, None]):
        skipc.generate(llama.compiled, given, max_new_tokens=4)
    before, strict = bank.switches, {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    for _ in range(200):
        if choose.random() < 0.3:
            name = choose.choice(list(extra))
            bank.load(name, extra[name])
        if choose.random() < 0.1 and (loaded := [n for n in bank.names if n in extra]):
            bank.unload(choose.choice(loaded))
        wanted = [choose.choice([None, *bank.names]) for _ in range(3)]
        with torch._dynamo.config.patch(**strict), llama.compiled.session(adapters=wanted) as session:
            found = skipc.generate(llama.compiled, given[:1].expand(3, 1).contiguous(), max_new_tokens=4)
        assert session.stats().recompiles == 0
        for name, row in zip(wanted, found, strict=True):
            assert torch.equal(first.setdefault(name, row), row)
    assert bank.switches - before > 50
    assert len({tuple(row.tolist()) for row in first.values()}) > 4
    for name in [n for n in bank.names if n in extra]:
        bank.unload(name)


def test_from_one_to_another_to_none(llama: Case) -> None:
    given, found = ids(2, 6), []
    for wanted in ("r4", "r16", "r4", None):
        with llama.compiled.session(adapters=[wanted, wanted]):
            found.append(llama.compiled(given).logits)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[3], llama.compiled(given).logits)


def test_a_decode_loop_follows_its_sessions(llama: Case) -> None:
    """One decoder, whose inputs are bound, under one session after the other, without a new prompt between them."""
    decoder = Decoder(llama.base, llama.compiled, 2, 64, padded=False)
    decoder.fix_sizes()
    decoder.prefill(ids(2, 5), None)

    def step() -> torch.Tensor:
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(5)
        return decoder.decode(torch.tensor([7, 8]), watched=False).clone()

    plain = [step() for _ in range(4)][-1]
    assert decoder.replay.replayed
    found = {}
    for _ in range(2):
        for wanted in (("r4", "r7"), ("r7", "r4"), ("r16", None)):
            with llama.compiled.session(adapters=wanted):
                assert torch.equal(found.setdefault(wanted, step()), step())
        assert torch.equal(step(), plain)
    assert torch.equal(found["r16", None][1], plain[1])
    assert not torch.allclose(found["r4", "r7"], found["r7", "r4"])
    assert llama.bank._tables  # which they had one after the other


def test_threads_never_mix(llama: Case) -> None:
    given, names = ids(1, 6), [None, "r4", "r7", "r16"]
    expected = {}
    for name in names:
        with llama.compiled.session(adapters=[name]):
            expected[name] = llama.compiled(given).logits
    wrong: list[str | None] = []

    def requests(name: str | None) -> None:
        with torch.no_grad():
            for _ in range(20):
                with llama.compiled.session(adapters=[name]):
                    if not torch.equal(llama.compiled(given).logits, expected[name]):
                        wrong.append(name)

    in_threads(requests, names)
    assert not wrong


def test_a_skipped_site_skips_its_adapters(llama: Case) -> None:
    given, site = ids(2, 6), "model.layers.1.mlp"
    with llama.compiled.session(adapters="r4", skip={site}):
        found = llama.compiled(given).logits
    module = llama.peft["r4"].base_model.model.model.layers[1].mlp
    hook = module.register_forward_hook(lambda _, __, out: out * 0)
    expected = llama.peft["r4"](given).logits
    hook.remove()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_plans(llama: Case) -> None:
    """Replaced sites lose their adapters, weights of the same shape keep them, other shapes are refused."""
    base, given = llama.base, ids(2, 6)
    weight = base.get_parameter(f"{PATH}.weight")
    plan = skipc.Plan(weights={f"{PATH}.weight": weight * 2})
    with llama.compiled.session(adapters="r4", plan=plan):
        found = llama.compiled(given).logits
    layer = llama.peft["r4"].base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    layer.mul_(2)
    expected = llama.peft["r4"](given).logits
    layer.div_(2)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)

    site, mlp = "model.layers.1.mlp", base.model.layers[1].mlp
    source = next(s for s in skipc.find_sites(base, given).sites if s.name == site).source
    assert source is not None
    zero = skipc.Affine(source, torch.zeros(1), torch.zeros(1))
    with llama.compiled.session(adapters="r4", plan=skipc.Plan(replace={site: zero})):
        found = llama.compiled(given).logits
    with llama.compiled.session(adapters="r4", skip={site}):
        torch.testing.assert_close(found, llama.compiled(given).logits)

    thin = {f"{site}.{name}.weight": getattr(mlp, name).weight[:8] for name in ("gate_proj", "up_proj")}
    thin[f"{site}.down_proj.weight"] = mlp.down_proj.weight[:, :8].contiguous()
    plan = skipc.Plan(weights=thin)
    with llama.compiled.session(plan=plan):
        llama.compiled(given)
    with (
        pytest.raises(skipc.PlanError, match=r"changes the shape of model.layers.1.mlp.*which adapter 'r4' adds to"),
        llama.compiled.session(adapters="r4", plan=plan),
    ):
        llama.compiled(given)
    measured = skipc.Plan(plan.skip, plan.weights, skipc.ir.plan.Expectation("10%", 0.02, 0.01, 0.03, 1.1))
    with pytest.raises(skipc.PlanError, match="measured without adapters"):
        llama.compiled.session(adapters="r4", plan=measured)


def test_slots_go_to_who_needs_them() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=2, max_rank=4)
    for i in range(4):
        bank.load(str(i), made(i))
    first = bank.lease(["0", "1"])
    assert bank.resident == ("0", "1")
    first.release()
    bank.lease("0").release()  # used last
    second = bank.lease("2")
    assert bank.resident == ("0", "2")
    third = bank.lease(["2", "0", None])
    with pytest.raises(skipc.AdapterError, match="no slot is free for '3': open sessions use 2 of 2"):
        bank.lease("3")
    with pytest.raises(skipc.AdapterError, match="'0' is in use by 1 open session"):
        bank.unload("0")
    third.release()
    third.release()  # does nothing
    bank.lease("3").release()
    assert bank.resident == ("2", "3")
    second.release()
    bank.unload("2")
    assert bank.resident == ("3",)
    assert bank.names == ("0", "1", "3")
    with pytest.raises(skipc.AdapterError, match="3 adapters at a time, and the bank has 2 slots"):
        bank.lease(["0", "1", "3"])


def test_sessions_wait_for_a_slot() -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, slots=1, max_rank=4, when_full="wait", timeout=20)
    bank.load("0", made(0))
    bank.load("1", made(1))
    held, found = bank.lease("0"), []

    def wait() -> None:
        found.append(bank.lease("1"))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    assert not found
    held.release()
    thread.join()
    assert bank.resident == ("1",)
    bank.timeout = 0.05
    with pytest.raises(skipc.AdapterError, match="seconds were waited"):
        bank.lease("0")


def test_a_replaced_adapter_stays_with_open_sessions(llama: Case) -> None:
    bank, given = llama.bank, ids(1, 4)
    bank.load("mine", made(1))
    with llama.compiled.session(adapters="mine"):
        old = llama.compiled(given).logits
        bank.load("mine", made(2))
        assert torch.equal(llama.compiled(given).logits, old)
        with llama.compiled.session(adapters="mine"):
            new = llama.compiled(given).logits
        assert not torch.equal(new, old)
        assert torch.equal(llama.compiled(given).logits, old)
    with llama.compiled.session(adapters="mine"):
        assert torch.equal(llama.compiled(given).logits, new)
    bank.enable("mine", False)
    with llama.compiled.session(adapters="mine"):
        assert torch.equal(llama.compiled(given).logits, llama.compiled(given).logits)
        off = llama.compiled(given).logits
    assert torch.equal(off, llama.compiled(given).logits)
    bank.unload("mine")
    assert bank.resident.count("mine") == 0


def test_folders_models_and_adapters_are_loaded(tmp_path: Path) -> None:
    model = trained(r=3)
    model.save_pretrained(tmp_path)
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, max_rank=8)
    bank.load("folder", tmp_path)
    bank.load("memory", model)
    bank.load("adapter", Adapter.load(tmp_path))
    bank.lease(["folder", "memory", "adapter"]).release()
    for layer in bank.layers.values():
        found = [matrices([*layer.operands], 0, slot, layer.shape[1], layer.shape[0]) for slot in range(3)]
        for a, b, scale in found:
            assert torch.equal(a, found[0][0])
            assert torch.equal(b, found[0][1])
            assert scale == found[0][2]
        assert layer.where[:, 0].tolist() == [3, 3, 3, 0, 0, 0, 0, 0]
    assert repr(bank) == "AdapterBank(3 adapters, 3 of 8 slots, 14 layers, rank 8)"


def test_what_a_bank_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = ZOO["llama"].build()
    bank = skipc.AdapterBank(base, max_rank=4, targets=["q_proj", "layers.0.mlp.up_proj"])
    assert list(bank.layers) == [PATH, "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    cases: dict[str, Any] = {
        "rank 9 at .*max_rank is 4": made(0, rank=9),
        "changes model.layers.0.mlp.down_proj, which is no target": made(0, paths=("model.layers.0.mlp.down_proj",)),
        "a value of its own for model.norm.weight": Adapter("x", {}, {"model.norm.weight": torch.ones(64)}),
        "a bias of its own": Adapter("x", {PATH: LoRA(torch.ones(1, 64), torch.ones(64, 1), 1.0, torch.ones(64))}),
        "has no adapter_config.json": tmp_path,
        "has no adapters": torch.nn.Linear(2, 2),
        "which the model does not have": Adapter("x", {"model.layer": LoRA(torch.ones(1, 4), torch.ones(4, 1), 1.0)}),
    }
    for message, source in cases.items():
        with pytest.raises(skipc.AdapterError, match=message):
            bank.load("x", source)
    with pytest.raises(skipc.AdapterError, match=r"no adapter is loaded as 'y'.*loaded: none"):
        bank.lease("y")
    with pytest.raises(skipc.AdapterError, match=r"no module 'q_prj' \(did you mean 'q_proj'\?\)"):
        skipc.AdapterBank(base, targets=["q_prj"])
    with pytest.raises(skipc.AdapterError, match="is a Embedding: rows choose adapters of linear layers"):
        skipc.AdapterBank(base, targets=["embed_tokens"])
    with pytest.raises(skipc.AdapterError, match="the base model, not PEFT's"):
        skipc.AdapterBank(trained())
    for options in ({"slots": 0}, {"max_rank": 0}, {"when_full": "cry"}):
        with pytest.raises(skipc.AdapterError):
            skipc.AdapterBank(base, **options)
    with pytest.raises(skipc.ConfigError, match="made for another model"):
        skipc.compile(ZOO["llama"].build(), adapters=bank)
    for options in ({"adapters": 3}, {"adapters": bank, "lowering": "cond"}, {"adapters": bank, "preset": "off"}):
        with pytest.raises(skipc.ConfigError, match="adapters"):
            skipc.Config(**options)


def test_sessions_say_what_cannot_be_honoured(llama: Case) -> None:
    given = ids(3, 4)
    with (
        pytest.raises(skipc.SessionError, match="adapters for 2 rows, and the call has 3"),
        llama.compiled.session(adapters=["r4", None]),
    ):
        llama.compiled(given)
    with pytest.raises(skipc.AdapterError, match="no adapter is loaded as 'r5'"), llama.compiled.session(adapters="r5"):
        pass
    with pytest.raises(skipc.SessionError, match="adapters come from a bank"):
        skipc.session(llama.base, adapters="r4")
    with pytest.raises(TypeError, match="a row wants"), llama.compiled.session(adapters=[3]):  # type: ignore[list-item]
        pass
    bare = skipc.compile(ZOO["llama"].build(), fullgraph=True, **STRICT)
    with (
        pytest.raises(skipc.SessionError, match="no call had a use for"),
        skipc.session(bare.model, adapters="r4", bank=llama.bank),
    ):
        bare(given)
    assert not any(loaded.users for loaded in llama.bank._loaded.values())


def test_a_weight_that_goes_elsewhere_is_refused() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.first(x)
            return x + self.second(x) @ self.first.weight

    model = Odd().eval()
    compiled = skipc.compile(model, adapters=skipc.AdapterBank(model), fullgraph=True, **STRICT)
    with pytest.raises(Exception, match="first cannot have adapters in this model: its weight goes into"):
        compiled(torch.randn(2, 3, 64))


def test_tied_and_unequal_weights() -> None:
    """The head of a model whose embedding is its weight; and what many layers share is in no list twice."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes, **heads)
    base = transformers.LlamaForCausalLM(config).eval()
    bank = skipc.AdapterBank(base, max_rank=5, targets=["lm_head", *LINEARS])
    layers = {}
    for path, layer in bank.layers.items():
        layers[path] = LoRA(torch.randn(5, layer.shape[1]) * 0.2, torch.randn(layer.shape[0], 5) * 0.2, 1.0)
    bank.load("all", Adapter("all", layers))
    compiled, given = skipc.compile(base, adapters=bank, fullgraph=True, **STRICT), ids(2, 5)
    with compiled.session(adapters=["all", None]):
        found = compiled(given).logits

    def adapt(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        lora = layers[next(p for p, m in base.named_modules() if m is module)]
        return out + lora.scale * inputs[0] @ lora.a.T @ lora.b.T

    plain = base(given).logits
    hooks = [base.get_submodule(path).register_forward_hook(adapt) for path in layers]
    adapted = base(given).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, torch.stack([adapted[0], plain[1]]), atol=2e-4, rtol=2e-4)


class Positions(torch.nn.Module):
    """One of its layers takes positions, which all rows share, and one takes rows one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places, self.last = (torch.nn.Linear(64, 64) for _ in range(3))
        self.embedding = torch.nn.Parameter(torch.randn(6, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        x = x + torch.tanh(x @ self.places(self.embedding).T) @ self.embedding
        return x + self.last(x.flatten(0, 1)).view_as(x)


def test_rows_that_are_not_those_of_the_batch_are_refused() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    bank = skipc.AdapterBank(model, max_rank=4)
    loras = {path: LoRA(torch.randn(2, 64), torch.randn(64, 2), 0.1) for path in ("first", "places", "last")}
    for path, lora in loras.items():
        bank.load(path, Adapter(path, {path: lora}))
    compiled, x = skipc.compile(model, adapters=bank, fullgraph=True, **STRICT), torch.randn(2, 3, 64)
    plain = compiled(x)
    for path in ("first", "last"):
        with compiled.session(adapters=[path, None]):
            found = compiled(x)
        lora = loras[path]

        def adapt(_: Any, given: Any, out: torch.Tensor, lora: LoRA = lora) -> torch.Tensor:
            return out + lora.scale * given[0] @ lora.a.T @ lora.b.T

        hook = getattr(model, path).register_forward_hook(adapt)
        torch.testing.assert_close(found[0], model(x)[0], atol=1e-4, rtol=1e-4)
        hook.remove()
        assert torch.equal(found[1], plain[1])
    with (
        pytest.raises(skipc.PlanError, match=r"the rows that places takes are not those of the batch.*'places' adds"),
        compiled.session(adapters=["places", None]),
    ):
        compiled(x)


def test_tokens_that_run_again_have_their_adapters(llama: Case) -> None:
    """Under ``kv="backfill"``, beside the same with the adapter merged; and with names by row, and a router."""
    given, site = ids(2, 5), "model.layers.0.self_attn"
    router = skipc.AdapterRouter(torch.zeros(1, 64), ["r4"], top_k=1)
    plan = skipc.merge_adapters(llama.base, Adapter.of(llama.peft["r4"]))
    cached: list[tuple[torch.Tensor, torch.Tensor]] = []
    for settings in ({"plan": plan}, {"adapters": "r4"}, {"adapters": ["r4", "r4"]}, {"adapters": router},
                     {"adapters": "r4", "adapter_mode": "merged"}):  # fmt: skip
        policy = Scheduled(lambda position: frozenset([site] if position % 4 else []))
        with llama.compiled.session(policy=policy, kv="backfill", **settings) as session:  # type: ignore[arg-type]
            text = skipc.generate(llama.compiled, given, max_new_tokens=12)
        assert session.stats().backfilled > 4
        layer = vars(llama.compiled)["_decoder"].cache.layers[1]
        cached.append((text, layer.keys[:, :, : text.shape[1] - 1].clone()))
    for text, keys in cached[1:]:
        assert torch.equal(text, cached[0][0])
        torch.testing.assert_close(keys, cached[0][1], atol=1e-3, rtol=1e-3)
