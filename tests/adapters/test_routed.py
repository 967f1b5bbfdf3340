"""Routers that choose adapters for each token, beside the base model with hooks that do the same in fp64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels import native
from skipc.kernels.routing import places, route_tokens
from skipc.runtime.decoder import Decoder
from torch.nn import functional as F

import skipc
from skipc.adapters.adapter import Adapter, LoRA
from tests.adapters.test_adapter import ids
from tests.adapters.test_bank import TRANSPOSED, Case, logits, made
from tests.harness import assert_no_further, in_threads, seldom
from tests.models.zoo import ZOO

NAMES = ["r4", "r7", None, "r16"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def router(width: int, experts: Any = NAMES, seed: int = 0, **given: Any) -> skipc.AdapterRouter:
    """One whose decisions are clear: no two logits are near each other, so that no rounding changes one."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(len(experts), n, generator=generator) for n in (width, 1))
    return skipc.AdapterRouter(weight * 30, experts, bias=bias.flatten(), **given)


class Routed:
    """A model in eager whose layers add what ``chosen`` wants of the adapters of a case, decided at ``head``."""

    def __init__(self, case: Case, chosen: skipc.AdapterRouter, head: str, dtype: torch.dtype):
        self.model, self.chosen = copy.deepcopy(case.base).to(dtype), chosen
        self.amounts = torch.empty(0)
        self.model.get_submodule(head).register_forward_pre_hook(self.decide)
        for name, peft_model in case.peft.items():
            for path, layer in Adapter.of(peft_model).layers.items():
                self.model.get_submodule(path).register_forward_hook(self.adding(name, layer))

    def decide(self, _: Any, args: Any) -> None:
        x = args[0].to(torch.float64)
        scores = x @ self.chosen.weight.double().T + self.chosen.bias.double()
        found, at = scores.topk(self.chosen.top_k)
        amounts = found.softmax(-1) if self.chosen.renormalize else scores.softmax(-1).gather(-1, at)
        self.amounts = torch.zeros_like(scores).scatter(-1, at, amounts)

    def adding(self, name: str, layer: LoRA) -> Any:
        if name not in self.chosen.experts:
            return lambda *_: None

        def add(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            amount = self.amounts[..., self.chosen.experts.index(name)].to(out.dtype).reshape(*out.shape[:-1], 1)
            return out + amount * layer.scale * F.linear(
                F.linear(args[0], layer.a.to(out.dtype)), layer.b.to(out.dtype)
            )

        return add


@pytest.fixture(scope="module")
def llama() -> Case:
    return Case("llama")


HEADS = {"llama": "model.layers.0", "gpt2": "transformer.h.0", "bert": "encoder.layer.0"}


def agree(case: Case, chosen: skipc.AdapterRouter, head: str, given: torch.Tensor) -> torch.Tensor:
    with case.compiled.session(adapters=chosen):
        found = logits(case.compiled, given)
    dtype = next(case.base.parameters()).dtype
    truth, eager = (logits(Routed(case, chosen, head, d).model, given) for d in (torch.float64, dtype))
    assert_no_further(truth, eager, found, factor=4)
    return found


@pytest.mark.parametrize("given", [{}, {"top_k": 1}, {"renormalize": False}, {"top_k": 4}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5), (2, 17)], ids=str)
def test_each_token_has_its_own(llama: Case, shape: tuple[int, int], given: dict[str, Any]) -> None:
    found = agree(llama, router(64, **given), HEADS["llama"], ids(*shape))
    assert not torch.allclose(found, logits(llama.compiled, ids(*shape)), atol=1e-2)


def test_other_architectures() -> None:
    gpt2 = Case("gpt2", **TRANSPOSED)
    agree(gpt2, router(gpt2.base.config.n_embd), HEADS["gpt2"], ids(2, 9))
    layers = {"target_modules": ["query", "value", "intermediate.dense", "attention.output.dense"]}
    bert = Case("bert", **layers)
    agree(bert, router(bert.base.config.hidden_size), HEADS["bert"], ids(2, 9))


def test_bf16() -> None:
    case = Case("llama", torch.bfloat16)
    for shape in ((2, 1), (2, 9)):
        agree(case, router(64), HEADS["llama"], ids(*shape))


def test_generated_text(llama: Case) -> None:
    """Prompt and steps, whose inputs are bound, and with routers, names and nobody in turns: nothing is compiled."""
    given = ids(3, 5)
    one, other = router(64), router(64, ["r16", "r4"], seed=1, top_k=1)
    texts = {}
    for chosen in (one, other):
        eager = Routed(llama, chosen, HEADS["llama"], torch.float32).model
        mask = torch.ones_like(given)
        texts[chosen] = eager.generate(input_ids=given, attention_mask=mask, max_new_tokens=8, do_sample=False)
    with llama.compiled.session(adapters=one):
        skipc.generate(llama.compiled, given, max_new_tokens=8)
    plain = skipc.generate(llama.compiled, given, max_new_tokens=8)
    strict = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    for wanted in (one, other, "r7", one, [None, "r4", "r7"], other, one):
        with torch._dynamo.config.patch(**strict), llama.compiled.session(adapters=wanted) as session:
            found = skipc.generate(llama.compiled, given, max_new_tokens=8)
        assert session.stats().recompiles == 0
        if isinstance(wanted, skipc.AdapterRouter):
            assert torch.equal(found, texts[wanted])
        assert not torch.equal(found, plain)
        assert torch.equal(skipc.generate(llama.compiled, given, max_new_tokens=8), plain)


def test_a_decode_loop_under_a_router(llama: Case) -> None:
    decoder = Decoder(llama.base, llama.compiled, 2, 64, padded=False)
    decoder.fix_sizes()
    with llama.compiled.session(adapters=router(64)):
        decoder.prefill(ids(2, 5), None)

    def step(tokens: list[int]) -> torch.Tensor:
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(5)
        return decoder.decode(torch.tensor(tokens), watched=False).clone()

    found: dict[tuple[int, ...], torch.Tensor] = {}
    for _ in range(4):
        with llama.compiled.session(adapters=router(64)):
            for tokens in ([7, 8], [9, 7], [8, 8]):
                torch.testing.assert_close(found.setdefault(tuple(tokens), step(tokens)), step(tokens), atol=0, rtol=0)
    assert decoder.replay.replayed
    assert not torch.allclose(found[7, 8][0], found[9, 7][0])


def test_threads_of_one_session_do_not_mix(llama: Case) -> None:
    wanted, wrong = {tokens: ids(2, tokens) for tokens in (5, 6, 7)}, []
    with llama.compiled.session(adapters=router(64)) as session:
        expected = {tokens: llama.compiled(given).logits for tokens, given in wanted.items()}

        def calls(tokens: int) -> None:
            with torch.no_grad():
                for _ in range(20):
                    if not torch.allclose(llama.compiled(wanted[tokens]).logits, expected[tokens], atol=1e-4):
                        wrong.append(tokens)

        in_threads(session.bind(calls), list(wanted))
    assert not wrong


def test_adapters_that_are_off_leave_the_base(llama: Case) -> None:
    given, only = ids(2, 6), router(64, ["r4"], top_k=1)
    llama.bank.enable("r4", False)
    with contextlib.ExitStack() as after:
        after.callback(llama.bank.enable, "r4")
        with llama.compiled.session(adapters=only):
            found = llama.compiled(given).logits
    torch.testing.assert_close(found, llama.compiled(given).logits)
    with llama.compiled.session(adapters=only):
        found = llama.compiled(given).logits
    with llama.compiled.session(adapters="r4"):
        torch.testing.assert_close(found, llama.compiled(given).logits)


def test_with_skipped_sites(llama: Case) -> None:
    given, site = ids(2, 6), "model.layers.0.mlp"
    chosen = router(64)
    with llama.compiled.session(adapters=chosen, skip={site}):
        found = llama.compiled(given).logits
    eager = Routed(llama, chosen, HEADS["llama"], torch.float32).model
    eager.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out * 0)
    torch.testing.assert_close(found, eager(given).logits, atol=2e-4, rtol=2e-4)


def test_saved_routers(tmp_path: Path) -> None:
    first = router(64, top_k=3, renormalize=False)
    first.save(tmp_path / "mine")
    again = skipc.AdapterRouter.load(tmp_path / "mine")
    assert repr(again) == repr(first) == "AdapterRouter(3 of r4, r7, None, r16, width 64)"
    assert torch.equal(again.packed({"r4": 1}), first.packed({"r4": 1}))
    file = tmp_path / "mine" / "adapter_router.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    for folder in (tmp_path / "mine", tmp_path):
        with pytest.raises(skipc.AdapterError, match="holds no router"):
            skipc.AdapterRouter.load(folder)


def test_what_does_not_fit_is_refused(llama: Case) -> None:
    weight = torch.randn(2, 64)
    for text, given in {
        r"\[2, 64\] is not one of 3 experts": (weight, ["a", "b", "c"]),
        "1 to 2 of 2 experts, not 3": (weight, ["a", "b"], 3),
        "'a' for more than one": (weight, ["a", "a"]),
        r"has biases \[3\]": (weight, ["a", "b"], 1, torch.zeros(3)),
        "not finite": (weight / 0, ["a", "b"]),
    }.items():
        with pytest.raises(skipc.AdapterError, match=text):
            skipc.AdapterRouter(*given)
    with pytest.raises(skipc.AdapterError, match=r"no adapter is loaded as 'r5' "):
        llama.compiled.session(adapters=router(64, ["r4", "r5"])).__enter__()
    with (
        pytest.raises(RuntimeError, match="router for tokens of width 32 met some of 64"),
        llama.compiled.session(adapters=router(32)),
    ):
        llama.compiled(ids(2, 6))
    with pytest.raises(skipc.AdapterError, match="larger than those that this bank takes"):
        llama.compiled.session(adapters=router(100_000)).__enter__()
    assert not any(loaded.users for loaded in llama.bank._in_slots.values())

    base = copy.deepcopy(llama.base)
    bank = skipc.AdapterBank(base, targets=["lm_head", "q_proj"])
    bank.load("head", made(0, paths=("lm_head",)))
    bank.load("q", made(1))
    compiled = skipc.compile(base, adapters=bank)
    with compiled.session(adapters=router(64, ["q"], top_k=1)):
        compiled(ids(2, 6), logits_to_keep=1)
    with (
        pytest.raises(skipc.SessionError, match="lm_head, which adapter 'head' adds to, does not take the tokens"),
        compiled.session(adapters=router(64, ["head", "q"])),
    ):
        compiled(ids(2, 6), logits_to_keep=1)


class PerLayer(torch.nn.Module):
    """A linear layer with experts and a router of its own (MoLA, arXiv 2402.08562)."""

    def __init__(self, base: torch.nn.Linear, experts: int = 3, rank: int = 2):
        super().__init__()
        self.base, self.router = base, torch.nn.Linear(base.in_features, experts, bias=False)
        self.a = torch.nn.Parameter(torch.randn(experts, rank, base.in_features) * 0.3)
        self.b = torch.nn.Parameter(torch.randn(experts, base.out_features, rank) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.router(x).topk(2)
        amounts = torch.zeros_like(self.router(x)).scatter(-1, chosen, shares.softmax(-1))
        return self.base(x) + torch.einsum("bte,erk,eor,btk->bto", amounts, self.a, self.b, x)


def test_routers_of_layers_stay_as_they_are(llama: Case) -> None:
    model = copy.deepcopy(llama.base)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.down_proj = PerLayer(layer.mlp.down_proj)
    compiled, given = skipc.compile(model.eval(), fullgraph=True, on_error="raise"), ids(2, 6)
    torch.testing.assert_close(compiled(given).logits, model(given).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (300, 576)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_native_kernel(shape: tuple[int, int], whole: bool, dtype: torch.dtype) -> None:
    assert native.available() is None
    rows, width = shape
    torch.manual_seed(0)
    x, experts, most = torch.randn(shape).to(dtype), 5, 3
    given = torch.full((places(experts, width) + 9,), float("nan"))
    given[:14] = torch.tensor([experts, width, most, whole, 3, -1, 0, 1, 2, *[0.1, -0.2, 0.3, 0, 0]])
    given[14 : 14 + experts * width] = torch.randn(experts * width) * 0.1
    given[14 + width : 14 + 2 * width] = given[14 : 14 + width]  # equal but for the bias
    tables = []
    for run in (route_tokens, torch.ops.skipc.route_tokens):
        table, gates = torch.full((3000,), -9), torch.full((3000,), float("nan"))
        run(x, given, table, gates)
        assert (table[2 + rows * most :] == -9).all()
        tables.append((table, gates))
    assert torch.equal(tables[0][0], tables[1][0])
    torch.testing.assert_close(tables[0][1], tables[1][1], equal_nan=True, atol=1e-4, rtol=1e-4)
    assert bool(((tables[1][1][2 : 2 + rows * most].view(rows, most).sum(1) - 1).abs() < 1e-5).all()) is whole
    with pytest.raises(RuntimeError, match="tokens that want 3 adapters each are more than 2"):
        torch.ops.skipc.route_tokens(x, given, torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    given[0] = 0
    torch.ops.skipc.route_tokens(x, given, torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def test_tokens_that_decide_for_themselves(llama: Case) -> None:
    """A router and a policy by token, compiled so that attentions could run on some tokens."""
    given, found = ids(1, 7), []
    for compact in (False, True):
        compiled = skipc.compile(llama.base, adapters=llama.bank, compact_queries=compact, on_error="raise")
        torch.manual_seed(0)
        sites = {name: torch.nn.Linear(64, 1) for name in ("model.layers.1.self_attn", "model.layers.1.mlp")}
        with compiled.session(adapters=router(64), policy=skipc.Routed(sites)):
            found.append(compiled(given, use_cache=False).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, seldom(torch.float64)])
def test_the_first_site_is_skipped_and_replaced_as_ever(dtype: torch.dtype) -> None:
    base, given, site = ZOO["llama"].build().to(dtype), ids(2, 6), "model.layers.0.self_attn"
    bank = skipc.AdapterBank(base, slots=2)
    bank.load("q", made(1, paths=("model.layers.1.mlp.down_proj",)))
    compiled = skipc.compile(base, adapters=bank, fullgraph=True, on_error="raise")
    plain, ours = (
        next(s for s in skipc.explain(base, given, config=skipc.Config(**options)).sites if s.name == site)
        for options in ({}, {"adapters": bank})
    )
    assert ours.source == plain.source is not None
    assert ours.effects == plain.effects
    half = skipc.Affine(ours.source, torch.full((1,), 0.5), torch.zeros(1))
    for chosen in (None, router(64, ["q"], top_k=1)):
        for settings in ({"plan": skipc.Plan(replace={site: half})}, {"skip": {site}, "kv": "none"}):
            with compiled.session(**settings):
                expected = compiled(given, use_cache=False).logits
            if chosen is not None and "plan" not in settings:
                with compiled.session(adapters=chosen, **settings):
                    assert not torch.equal(compiled(given, use_cache=False).logits, expected)
            assert not torch.allclose(expected, compiled(given, use_cache=False).logits, atol=1e-3)


def test_sessions_in_inference_mode_leave_nothing_behind(llama: Case) -> None:
    given, chosen = ids(2, 6), router(64)
    base = ZOO["llama"].build()
    with torch.inference_mode():
        bank = skipc.AdapterBank(base, slots=2)
        bank.load("q", made(1))
        compiled = skipc.compile(base, adapters=bank, fullgraph=True, on_error="raise")
        for wanted, mode in (("q", "unmerged"), ("q", "merged"), (router(64, ["q"], top_k=1), "unmerged")):
            with compiled.session(adapters=wanted, adapter_mode=mode):
                skipc.generate(compiled, given, max_new_tokens=3)
    for wanted, mode in (("q", "unmerged"), ("q", "merged"), (router(64, ["q"], top_k=1), "unmerged")):
        with compiled.session(adapters=wanted, adapter_mode=mode):
            skipc.generate(compiled, given, max_new_tokens=3)
    bank.unload("q")
    with llama.compiled.session(adapters=chosen):
        llama.compiled(given)


def test_graph_breaks_and_other_streams_are_refused() -> None:
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.first(x)
            torch._dynamo.graph_break()
            return x + self.second(x)

    model = Broken().eval()
    bank = skipc.AdapterBank(model)
    bank.load("a", Adapter("a", {"second": LoRA(torch.ones(1, 64), torch.ones(64, 1), 1.0)}))
    compiled = skipc.compile(model, adapters=bank, on_error="raise")
    with (
        pytest.raises(skipc.SessionError, match="once for all layers, and this model has a graph break"),
        compiled.session(adapters=router(64, ["a"], top_k=1)),
    ):
        compiled(torch.randn(2, 3, 64))

    bart = ZOO["bart"].build()
    path = "model.decoder.layers.0.fc1"
    bank = skipc.AdapterBank(bart)
    bank.load(
        "a",
        Adapter(
            "a", {path: LoRA(torch.ones(1, 64), torch.ones(bart.get_parameter(f"{path}.weight").shape[0], 1), 1.0)}
        ),
    )
    compiled = skipc.compile(bart, adapters=bank, on_error="raise")
    with (
        pytest.raises(skipc.SessionError, match=f"{path}, which adapter 'a' adds to, does not take the tokens"),
        compiled.session(adapters=router(64, ["a"], top_k=1)),
    ):
        compiled(input_ids=ids(2, 6), decoder_input_ids=ids(2, 6), use_cache=False)
