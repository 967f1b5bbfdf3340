"""Models that PEFT wrapped, compiled as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import skipc
from tests.adapters.test_adapter import ids, trained
from tests.harness import STRICT, assert_no_further, in_threads, seldom
from tests.models.zoo import ZOO

MLP = "base_model.model.model.layers.1.mlp"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()  # scales that differed from model to model would become inputs


@torch.no_grad()
def test_sites_have_the_names_of_their_modules_and_are_skipped() -> None:
    model, given = trained(), ids()
    names = [site.name for site in skipc.find_sites(model, given).sites]
    layer = "base_model.model.model.layers.{}.{}"
    assert names == [layer.format(i, name) for i in range(2) for name in ("self_attn", "mlp")]
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    torch.testing.assert_close(compiled(given).logits, model(given).logits, atol=1e-5, rtol=1e-5)
    with compiled.session(skip={MLP}):
        found = compiled(given).logits
    hook = model.get_submodule(MLP).register_forward_hook(lambda _, __, out: out * 0)
    expected = model(given).logits
    hook.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_peft_switches_is_seen() -> None:
    model, given = trained(), ids()
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    for key, value in model.named_parameters():
        if ".other." in key:
            value.data = torch.randn(value.shape) * 0.2
    model.eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    found = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found.append(compiled(given).logits)
        torch.testing.assert_close(found[-1], model(given).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(given).logits, model(given).logits, atol=1e-5, rtol=1e-5)


def fused(model: torch.nn.Module, given: torch.Tensor) -> int:
    """Layers that became one operation with their adapters."""
    passes = skipc.explain(model, given).to_dict()["graphs"][0]["passes"]
    return next(p["matched"] for p in passes if p["name"] == "fuse_lora")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_fused(dtype: torch.dtype) -> None:
    model, given = trained().base_model.model.to(dtype), ids(2, 6)  # Hugging Face's, with PEFT's layers inside
    assert fused(model, given) == 14
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    found, eager = compiled(given).logits, model(given).logits
    if dtype == torch.float32:
        text = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False)
        assert torch.equal(skipc.generate(compiled, given, max_new_tokens=6), text)
    with compiled.session(skip={"model.layers.1.mlp"}):
        assert not torch.equal(compiled(given).logits, found)
    assert_no_further(model.double()(given).logits, eager, found)


@torch.no_grad()
def test_hot_swaps_compile_nothing(tmp_path: Path) -> None:
    given = ids(2, 6)
    for name, rank in (("a", 4), ("b", 7)):
        trained(seed=rank, r=rank, lora_alpha=3 * rank).save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "a").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert fused(model, given) == 14
    compiled, found = skipc.compile(model, fullgraph=True, **STRICT), []
    for i, name in enumerate(("a", "b", "a")):
        if i:
            hotswap_adapter(model, tmp_path / name, adapter_name="default")
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            found.append(compiled(given).logits)
        expected = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / name).eval()(given).logits
        torch.testing.assert_close(found[-1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def two_active(dtype: torch.dtype = torch.float32, wide: bool = False) -> torch.nn.Module:
    """A model with two adapters at work, one of which has few layers; wide ones, as PEFT makes them of bf16 models."""
    model = trained(dtype=dtype)
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        if ".other." in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.2
        if "lora_" in name:
            value.data = value.data.to(torch.float32 if wide else dtype)
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("wide", "dtype"),
    [
        (False, torch.bfloat16),
        (True, torch.float32),
        seldom(False, torch.float32),
        seldom(True, torch.bfloat16),
    ],
)
def test_several_active_and_wide_adapters_are_fused(dtype: torch.dtype, wide: bool) -> None:
    model, given = two_active(dtype, wide).base_model.model, ids(2, 6)
    assert fused(model, given) == 14
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    truth = copy.deepcopy(model).double()
    for tokens in (given, given[:, :1]):
        found = compiled(tokens).logits
        assert_no_further(truth(tokens).logits, model(tokens).logits, found, factor=4)
    if dtype == torch.float32:
        text = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False)
        assert torch.equal(skipc.generate(compiled, given, max_new_tokens=6), text)


@torch.no_grad()
def test_adapters_that_are_written_or_replaced_are_seen() -> None:
    """In calls and in a decode loop, whose inputs are bound; and of two models that share a program, each has its
    own."""
    given = ids(2, 6)
    models = [two_active().base_model.model, two_active().base_model.model]
    for name, value in models[1].named_parameters():
        if "lora_" in name:
            value.mul_(-1)
    compiled = [skipc.compile(model, fullgraph=True, **STRICT) for model in models]

    def check() -> None:
        for model, ours in zip(models, compiled, strict=True):
            torch.testing.assert_close(ours(given).logits, model(given).logits, atol=1e-4, rtol=1e-4)
            mask = torch.ones_like(given)
            text = model.generate(input_ids=given, attention_mask=mask, max_new_tokens=6, do_sample=False)
            assert torch.equal(skipc.generate(ours, given, max_new_tokens=6), text)

    check()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        check()
        layer = models[0].model.layers[0].self_attn.q_proj
        layer.lora_B["other"].weight.mul_(3)
        check()
        layer.lora_A["default"].weight.data = torch.randn(4, 64)
        check()

    wrong: list[int] = []

    def calls(i: int) -> None:
        with torch.no_grad():
            expected = models[i](given).logits
            for _ in range(20):
                if not torch.allclose(compiled[i](given).logits, expected, atol=1e-3):
                    wrong.append(i)

    in_threads(calls, (0, 1, 0))
    assert not wrong


@torch.no_grad()
def test_plans_with_weights_of_adapters() -> None:
    name, given = "model.layers.0.self_attn.q_proj.lora_A.default.weight", ids(2, 6)
    for model, options in ((trained(), {}), (two_active(), {"disable_passes": ["fuse_lora"]})):
        model = model.base_model.model
        plan = skipc.Plan(weights={name: model.get_parameter(name) * 2})
        compiled = skipc.compile(model, **options, **STRICT)
        with compiled.session(plan=plan):
            found = compiled(given).logits
        model.get_parameter(name).mul_(2)
        torch.testing.assert_close(found, model(given).logits, atol=1e-5, rtol=1e-5)
    compiled = skipc.compile(model, **STRICT)
    with pytest.raises(skipc.PlanError, match=f"{name} is an adapter that was fused"), compiled.session(plan=plan):
        compiled(given)


@torch.no_grad()
@pytest.mark.parametrize("case", ["biases", "no low rank", "narrow adapters", "nine active"])
def test_what_is_not_fused_is_right(case: str) -> None:
    given = ids(2, 6)
    model = (
        trained(lora_bias=True, bias="lora_only") if case == "biases" else trained(r=70 if case == "no low rank" else 4)
    )
    if case == "nine active":
        for i in range(8):
            model.add_adapter(f"a{i}", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", *(f"a{i}" for i in range(8))])
        model.eval()
    if case == "narrow adapters":
        for name, value in model.named_parameters():
            value.data = value.data.to(torch.bfloat16 if "lora_" in name else torch.float32)
    assert fused(model, given) == (12 if case == "nine active" else 0)
    found = skipc.compile(model, fullgraph=True, **STRICT)(given).logits
    near = 0.1 if case == "narrow adapters" else 1e-4
    torch.testing.assert_close(found, model(given).logits, atol=near, rtol=near)
