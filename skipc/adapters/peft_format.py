"""Adapters in the form of PEFT (release 0.21), Hugging Face's library of them: folders, and models in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from skipc.adapters.adapter import Adapter, LoRA
from skipc.ir.errors import AdapterError

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Options that say how an adapter was trained, or where; what it computes is in its tensors, ranks and alphas.
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "megatron_core",
})  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA scales each row of the weight by its norm, which is no low-rank change",
    "use_qalora": "QA-LoRA pools its inputs in groups",
    "alora_invocation_tokens": "activated LoRA acts on the tokens behind an invocation only",
    "arrow_config": "Arrow routes each token by prototypes",
    "kasa_config": "KaSA changes the base weights by their singular values",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "target_parameters": "adapters of bare parameters (fused experts) are not supported yet",
    "trainable_token_indices": "tokens trained one by one are not supported yet",
    "layer_replication": "the adapter belongs to a model of repeated layers",
    "megatron_config": "Megatron's layers are split over devices",
    "loftq_config": "LoftQ's base is quantised",
    "velora_config": "the tensors that VeLoRA adds are not read",
}
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of training, which leave the base weights as they are


def read_folder(folder: Path, name: str) -> Adapter:
    """See :meth:`Adapter.load`."""
    from safetensors.torch import load_file

    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).exists():
            pickled = file == _WEIGHTS and (folder / "adapter_model.bin").exists()
            hint = ": its adapter_model.bin is a pickle, which is not read; save it again as safetensors"
            raise AdapterError(f"{folder} has no {file}{hint if pickled else ''}")
    try:
        config = json.loads((folder / _CONFIG).read_text())
        tensors = load_file(folder / _WEIGHTS)
    except Exception as error:  # of two libraries, each with errors of its own
        raise AdapterError(f"the adapter in {folder} is damaged: {error}") from error
    return _read(name, config, tensors)


def read_model(peft_model: Any, name: str) -> Adapter:
    """See :meth:`Adapter.of`."""
    configs = getattr(peft_model, "peft_config", None)
    if not isinstance(configs, Mapping):
        raise AdapterError(f"{type(peft_model).__name__} has no adapters: give a peft.PeftModel")
    if name not in configs:
        raise AdapterError(f"no adapter is called {name!r}; there are {', '.join(map(repr, configs))}")
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    adapter = _read(name, configs[name].to_dict(), {k: v.detach().clone() for k, v in tensors.items()})
    layers = {}
    for path, layer in adapter.layers.items():
        module = peft_model.get_submodule(_PREFIX + path)
        layers[path] = LoRA(layer.a, layer.b, float(module.scaling[name]), layer.bias)  # set_scale() changes it
    return Adapter(name, layers, adapter.weights)


def _read(name: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
    _check_config(name, config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        path = key.removeprefix(_PREFIX)
        found = re.fullmatch(r"(.+)\.(lora_[A-Za-z_]+?)(?:\.(weight|bias))?", path)
        if found is None:
            weights[path.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = value
            continue
        module, part, kind = found.groups()
        if part == "lora_magnitude_vector":
            raise AdapterError(f"adapter {name!r} is not supported: use_dora ({_REFUSED['use_dora']})")
        role = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}.get(part)
        if role is None or (kind == "bias" and role == "a"):
            raise AdapterError(f"adapter {name!r} has a tensor {key}, which LoRA has not")
        parts.setdefault(module, {})["bias" if kind == "bias" else role] = value
    layers = {}
    for module, own in parts.items():
        if "a" not in own or "b" not in own:
            raise AdapterError(f"the adapter {name!r} is damaged: of {module} it has {', '.join(sorted(own))} alone")
        rank, scale = _rank_and_scale(config, module)
        if own["a"].dim() > 2:
            raise AdapterError(f"adapter {name!r} adapts {module}, a convolution, which is not supported")
        if own["a"].shape[0] != rank:
            raise AdapterError(
                f"the adapter {name!r} is damaged: its configuration says rank {rank} for {module}, its tensors "
                f"{own['a'].shape[0]}"
            )
        layers[module] = LoRA(own["a"], own["b"], scale, own.get("bias"))
    return Adapter(name, layers, weights)


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise AdapterError(f"adapter {name!r} is not supported: it is of type {kind}, and LORA is what skipc runs")
    for option, value in config.items():
        if option in _HARMLESS or not value:
            continue
        reason = _REFUSED.get(option, "an option of PEFT that skipc does not know")
        raise AdapterError(f"adapter {name!r} is not supported: {option} ({reason})")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise AdapterError(
            f"adapter {name!r} is not supported: init_lora_weights={start!r} changed the base weights when training "
            "began; save it with path_initial_model_for_weight_conversion"
        )


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    rank = int(_for(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_for(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _for(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the module's path ends with, as PEFT finds it."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)
