"""Adapters of PEFT, read and merged, beside PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import skipc
from skipc.adapters.adapter import Adapter, LoRA, merge_adapters
from tests.harness import STRICT
from tests.models.zoo import VOCAB, ZOO

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A model of the zoo with an adapter whose numbers all matter."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "lora_dropout": 0.1, **config}
    model = peft.get_peft_model(ZOO[name].build().to(dtype), peft.LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        if value.requires_grad:
            value.data = torch.randn(value.shape, generator=generator).to(value.dtype) * 0.2
        assert not key.endswith("original_module.weight") or not value.requires_grad
    return model


def ids(rows: int = 2, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def assert_runs_as(peft_model: Any, adapter: Adapter, base: Any) -> None:
    """In eager, the base model with the plan's weights gives PEFT's logits."""
    plan = merge_adapters(base, adapter)
    found = torch.func.functional_call(base, plan.weights, (ids(),), tie_weights=False).logits
    torch.testing.assert_close(found, peft_model(ids()).logits, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found, base(ids()).logits, atol=1e-2)


CASES: dict[str, dict[str, Any]] = {
    "all linears": {},
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"down_proj": 1, "^model.layers.0.self_attn.q_proj": 32},
    },
    "rank 1 of few": {"r": 1, "target_modules": ["v_proj"]},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", CASES)
def test_folders_and_models_give_what_peft_gives(case: str, tmp_path: Path) -> None:
    model = trained(**CASES[case])
    model.save_pretrained(tmp_path / "mine")
    base = ZOO["llama"].build()
    adapter = Adapter.load(tmp_path / "mine")
    assert adapter.name == "mine"
    assert_runs_as(model, adapter, base)
    again = Adapter.of(model)
    assert again.ranks == adapter.ranks
    for path, layer in adapter.layers.items():
        assert layer.scale == again.layers[path].scale
        assert torch.equal(layer.a, again.layers[path].a)
        assert torch.equal(layer.b, again.layers[path].b)


@pytest.mark.parametrize(("name", "config"), [
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only", "lora_bias": True}),
    ("llama", {"modules_to_save": ["input_layernorm", "lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("bert", {"target_modules": ["query", "value", "dense"], "bias": "all"}),
])  # fmt: skip
def test_biases_embeddings_whole_modules_and_transposed_weights(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(name, **config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter, base = Adapter.load(tmp_path), ZOO[name].build()
    plan = merge_adapters(base, adapter)
    assert len(plan.weights) > len(adapter.layers) or "bias" not in config
    for given in (adapter, Adapter.of(model)):
        found = torch.func.functional_call(base, merge_adapters(base, given).weights, (ids(),), tie_weights=False)
        torch.testing.assert_close(found[0], model(ids())[0], atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found[0], base(ids())[0], atol=1e-2)


def test_a_changed_scale_is_seen() -> None:
    model = trained()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    adapter = Adapter.of(model)
    assert {layer.scale for layer in adapter.layers.values()} == {0.5}
    assert_runs_as(model, adapter, ZOO["llama"].build())


def test_several_at_once() -> None:
    model = trained()
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    for key, value in model.named_parameters():
        if ".other." in key:
            value.data = torch.randn(value.shape) * 0.2
    base = ZOO["llama"].build()
    both = [Adapter.of(model, "default"), Adapter.of(model, "other")]
    model.base_model.set_adapter(["default", "other"])
    expected = model(ids()).logits
    found = torch.func.functional_call(base, merge_adapters(base, both).weights, (ids(),), tie_weights=False).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    weighted = merge_adapters(base, {both[0]: 1.0, both[1]: -1.0}).weights
    name = "model.layers.0.self_attn.q_proj"
    delta = both[0].layers[name].delta() - both[1].layers[name].delta()
    torch.testing.assert_close(weighted[f"{name}.weight"], base.get_parameter(f"{name}.weight") + delta)


@torch.no_grad()
def test_switching_compiles_nothing_and_comes_back_to_the_bit() -> None:
    torch._dynamo.reset()
    base = ZOO["llama"].build()
    models = [trained(seed=s, r=r) for s, r in ((1, 2), (2, 8))]
    plans = [merge_adapters(base, Adapter.of(m)) for m in models]
    compiled = skipc.compile(base, fullgraph=True, **STRICT)
    prompt = ids(1)
    alone = compiled(prompt, use_cache=False).logits
    torch.testing.assert_close(alone, base(prompt, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        first: dict[int, torch.Tensor] = {}
        for step in range(20):
            which = step * 7 % 3
            if which == 2:
                assert torch.equal(compiled(prompt, use_cache=False).logits, alone)
                continue
            with compiled.session(plan=plans[which]) as session:
                found = compiled(prompt, use_cache=False).logits
            assert session.stats().recompiles == 0
            if which not in first:
                expected = models[which](prompt, use_cache=False).logits
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
            assert torch.equal(first.setdefault(which, found), found)
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    greedy = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "disable_compile": True}
    for model, plan in zip(models, plans, strict=True):
        with compiled.session(plan=plan):
            found = skipc.generate(compiled, prompt, **options)
        assert torch.equal(found, model.generate(input_ids=prompt, **options, **greedy))
    assert torch.equal(skipc.generate(compiled, prompt, **options), base.generate(prompt, **options, **greedy))


def test_bf16_weights_are_rounded_once() -> None:
    model = trained(dtype=torch.bfloat16)
    base = ZOO["llama"].build().to(torch.bfloat16)
    adapter = Adapter.of(model)
    name = "model.layers.1.mlp.down_proj"
    exact = base.get_parameter(f"{name}.weight").double() + adapter.layers[name].scale * (
        adapter.layers[name].b.double() @ adapter.layers[name].a.double()
    )
    found = merge_adapters(base, adapter).weights[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "pissa": ({"init_lora_weights": "pissa"}, "changed the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "changed the base weights"),
    "alora": ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_are_refused_by_name(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    model = trained(**config)
    with pytest.raises(skipc.AdapterError, match=message):
        Adapter.of(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(skipc.AdapterError, match=message):
        Adapter.load(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    trained(target_modules=["q_proj"]).save_pretrained(tmp_path)
    config, tensors = (tmp_path / "adapter_config.json"), tmp_path / "adapter_model.safetensors"
    given, numbers = json.loads(config.read_text()), load_file(tensors)

    def refused(message: str, name: str | None = None) -> None:
        with pytest.raises(skipc.AdapterError, match=message):
            Adapter.load(tmp_path, name)

    config.write_text(json.dumps({**given, "r": 5}))
    refused("configuration says rank 5 for model.layers.0.self_attn.q_proj, its tensors 4")
    config.write_text(json.dumps({**given, "made_up_by_a_later_release": 3}))
    refused("made_up_by_a_later_release")
    config.write_text(json.dumps({**given, "peft_type": "IA3"}))
    refused("it is of type IA3")
    config.write_text(json.dumps(given)[:-9])
    refused("is damaged")
    config.write_text(json.dumps(given))
    key = next(k for k in numbers if "lora_A" in k)
    save_file({k: v for k, v in numbers.items() if k != key}, tensors)
    refused("it has b alone")
    save_file({**numbers, key.replace("lora_A", "lora_C"): numbers[key].clone()}, tensors)
    refused("lora_C.weight, which LoRA has not")
    save_file({**numbers, key.replace("lora_A.weight", "lora_magnitude_vector"): numbers[key].clone()}, tensors)
    refused("use_dora")
    tensors.write_bytes(tensors.read_bytes()[:-7])
    refused("is damaged")
    tensors.rename(tmp_path / "adapter_model.bin")
    refused("is a pickle")
    config.unlink()
    refused("has no adapter_config.json")


def lora(inputs: int, outputs: int, bias: torch.Tensor | None = None) -> LoRA:
    return LoRA(torch.ones(2, inputs), torch.ones(outputs, 2), 1.0, bias)


def test_models_that_do_not_fit_are_refused() -> None:
    model = trained(target_modules=["q_proj"])
    adapter = Adapter.of(model)
    with pytest.raises(skipc.AdapterError, match="give the base model, not PEFT's"):
        merge_adapters(model, adapter)
    with pytest.raises(skipc.AdapterError, match="which the model does not have"):
        merge_adapters(ZOO["gpt2"].build(), adapter)
    with pytest.raises(skipc.AdapterError, match="there is no adapter"):
        merge_adapters(ZOO["llama"].build(), [])
    path = "model.layers.0.self_attn.q_proj"
    with pytest.raises(skipc.AdapterError, match=rf"maps 9 to 64 numbers at {path}, which is a layer of 64 and 64"):
        merge_adapters(ZOO["llama"].build(), Adapter("odd", {path: lora(9, 64)}))
    with pytest.raises(skipc.AdapterError, match=r"has a bias for .*, which has none"):
        merge_adapters(ZOO["llama"].build(), Adapter("b", {path: lora(64, 64, torch.ones(64))}))
    with pytest.raises(skipc.AdapterError, match="which is a LlamaRMSNorm"):
        merge_adapters(ZOO["llama"].build(), Adapter("n", {"model.norm": lora(64, 64)}))
    with pytest.raises(skipc.AdapterError, match="no adapter is called 'mine'; there are 'default'"):
        Adapter.of(model, "mine")
    with pytest.raises(skipc.AdapterError, match=r"give a peft\.PeftModel"):
        Adapter.of(ZOO["gpt2"].build())
    with pytest.raises(skipc.AdapterError, match="make no low-rank map"):
        Adapter("odd", {"x": LoRA(torch.ones(2, 9), torch.ones(64, 3), 1.0)})
    with pytest.raises(skipc.AdapterError, match="is empty"):
        Adapter("none", {})
    scaled = ZOO["llama"].build()
    scaled.get_submodule(path).to(torch.float8_e4m3fn)  # as bases are whose scales lie elsewhere
    with pytest.raises(skipc.AdapterError, match=r"which is quantised \(torch\.float8_e4m3fn\)"):
        merge_adapters(scaled, adapter)
    whole = [Adapter(n, {}, {"model.norm.weight": torch.ones(64)}) for n in "ab"]
    with pytest.raises(skipc.AdapterError, match="which cannot be mixed"):
        merge_adapters(ZOO["llama"].build(), whole)
