"""Models that PEFT wrapped, compiled as they are."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import skipc
from tests.adapters.test_adapter import ids, trained
from tests.harness import STRICT, assert_no_further
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


@torch.no_grad()
@pytest.mark.parametrize("case", ["two active", "wide adapters", "biases", "no low rank"])
def test_what_is_not_fused_is_right(case: str) -> None:
    given = ids(2, 6)
    model = (
        trained(lora_bias=True, bias="lora_only") if case == "biases" else trained(r=70 if case == "no low rank" else 4)
    )
    if case == "two active":
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        model.base_model.set_adapter(["default", "other"])
        model.eval()
    if case == "wide adapters":
        for name, value in model.named_parameters():
            value.data = value.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    assert fused(model, given) == (14 if case == "two active" else 0)  # of several, one for each layer
    found = skipc.compile(model, fullgraph=True, **STRICT)(given).logits
    wide = case == "wide adapters"
    torch.testing.assert_close(found, model(given).logits, atol=0.1 if wide else 1e-5, rtol=0.1 if wide else 1e-5)
