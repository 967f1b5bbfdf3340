"""Models that PEFT wrapped, compiled as they are."""

from __future__ import annotations

import peft
import torch

import skipc
from tests.adapters.test_adapter import ids, trained
from tests.harness import STRICT

MLP = "base_model.model.model.layers.1.mlp"


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
