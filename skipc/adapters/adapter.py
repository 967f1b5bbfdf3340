"""One adapter: what it adds to which linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipc.ir.errors import AdapterError, nearest
from skipc.ir.plan import Plan


@dataclass(frozen=True, eq=False)
class LoRA:
    """What one layer adds: ``scale * ((x @ a.T) @ b.T + bias)``; an embedding, column ``a[:, token]`` for ``x @ a.T``.

    Attributes:
        a: ``[rank, in]``, of an embedding ``[rank, vocabulary]``.
        b: ``[out, rank]``.
        scale: the adapter's alpha over its rank, or over the rank's root (rsLoRA, arXiv 2312.03732).
        bias: ``[out]``, or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the map."""
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        """What it adds to a weight ``[out, in]``, in fp32."""
        return self.scale * (self.b.float() @ self.a.float())


class Adapter:
    """A named set of LoRA layers, by the paths of the modules that they belong to.

    Args:
        name: what errors and reports call it.
        layers: by path in the model (``model.layers.3.mlp.down_proj``).
        weights: parameters that it has a value of its own for, by name (of modules that were trained as a whole, and
            biases).

    Raises:
        AdapterError: for tensors whose shapes do not go together.
    """

    def __init__(self, name: str, layers: Mapping[str, LoRA], weights: Mapping[str, torch.Tensor] | None = None):
        self.name, self.layers, self.weights = name, dict(layers), dict(weights or {})
        if not self.layers and not self.weights:
            raise AdapterError(f"adapter {name!r} is empty")
        for path, layer in self.layers.items():
            shapes = f"A {list(layer.a.shape)} and B {list(layer.b.shape)}"
            if layer.a.dim() != 2 or layer.b.dim() != 2 or layer.b.shape[1] != layer.rank or not layer.rank:
                raise AdapterError(f"adapter {name!r} has {shapes} for {path}, which make no low-rank map")
            if layer.bias is not None and layer.bias.shape != layer.b.shape[:1]:
                raise AdapterError(f"adapter {name!r} has {shapes} and a bias {list(layer.bias.shape)} for {path}")

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> Adapter:
        """The adapter that PEFT saved in ``folder``, called like it unless ``name`` is given.

        Raises:
            AdapterError: if it is damaged or of a kind that is not supported, which the message names.
        """
        from skipc.adapters.peft_format import read_folder

        return read_folder(Path(folder), name or Path(folder).name)

    @classmethod
    def of(cls, peft_model: Any, name: str = "default") -> Adapter:
        """The adapter of this name in a ``peft.PeftModel``, as it is now; its tensors are copied.

        Raises:
            AdapterError: if there is none, or it is of a kind that is not supported.
        """
        from skipc.adapters.peft_format import read_model

        return read_model(peft_model, name)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by path."""
        return {path: layer.rank for path, layer in self.layers.items()}

    def __repr__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        size = (
            "" if not ranks else f" of rank {ranks[0]}" if len(ranks) == 1 else f" of ranks {ranks[0]} to {ranks[-1]}"
        )
        whole = f", {len(self.weights)} whole parameters" if self.weights else ""
        return f"Adapter({self.name!r}, {len(self.layers)} layers{size}{whole})"

    def check(self, model: torch.nn.Module) -> None:
        """Refuse a model that has no such layers.

        Raises:
            AdapterError: naming the first that is missing or of another shape.
        """
        for path, layer in self.layers.items():
            weight, transposed = layer_of(model, path, self.name)
            shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
            if shape != (layer.b.shape[0], layer.a.shape[1]):
                raise AdapterError(
                    f"adapter {self.name!r} maps {layer.a.shape[1]} to {layer.b.shape[0]} numbers at {path}, which "
                    f"is a layer of {shape[1]} and {shape[0]}"
                )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, value in self.weights.items():
            if name not in parameters:
                raise AdapterError(f"adapter {self.name!r} has a value for {name}, {_no_such(name, parameters)}")
            if parameters[name].shape != value.shape:
                raise AdapterError(
                    f"adapter {self.name!r} has {list(value.shape)} for {name}, which is {list(parameters[name].shape)}"
                )


@torch.no_grad()
def merge_adapters(model: torch.nn.Module, adapters: Adapter | Mapping[Adapter, float] | Iterable[Adapter]) -> Plan:
    """A plan under which ``model`` runs with adapters folded into its weights: at the speed of the model alone, for
    memory of the size of the weights that they change. The model stays as it is, so that going from one adapter to
    another and back gives the same bits, and no plan but the first compiles anything.

    Args:
        model: the base model, not wrapped by PEFT.
        adapters: one, several, whose changes are added up, or a factor for each (as PEFT's ``set_adapter`` of several,
            and ``add_weighted_adapter(combination_type="linear")`` of LoRA layers' products).

    Raises:
        AdapterError: for an adapter of another model; and for several that have whole parameters or biases of their
            own for the same layers.
    """
    if isinstance(adapters, Adapter):
        adapters = [adapters]
    factors = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    if not factors:
        raise AdapterError("there is no adapter to merge")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}

    def add(name: str, change: torch.Tensor) -> None:
        changes[name] = changes[name] + change if name in changes else change

    for adapter, factor in factors.items():
        adapter.check(model)
        for path, layer in adapter.layers.items():
            weight, transposed = layer_of(model, path, adapter.name)
            delta = factor * layer.delta().to(weight.device)
            add(f"{path}.weight", delta.T if transposed else delta)
            if layer.bias is not None:
                if f"{path}.bias" not in parameters:
                    raise AdapterError(
                        f"adapter {adapter.name!r} has a bias for {path}, which has none to merge it into"
                    )
                add(f"{path}.bias", factor * layer.scale * layer.bias.float())
        for name, value in adapter.weights.items():
            if len(factors) > 1 and (factor != 1 or name in whole):
                raise AdapterError(f"adapter {adapter.name!r} has a value of its own for {name}, which cannot be mixed")
            whole[name] = value
    made = {n: v.to(parameters[n].device, parameters[n].dtype) for n, v in whole.items()}
    for name, change in changes.items():
        start = whole.get(name, parameters[name])
        made[name] = (start.detach().float() + change).to(parameters[name].dtype).contiguous()
    return Plan(weights=made)


def layer_of(model: torch.nn.Module, path: str, adapter: str) -> tuple[torch.Tensor, bool]:
    """The weight of a layer, and whether it is ``[in, out]``."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        hint = " (give the base model, not PEFT's)" if hasattr(model, "peft_config") else ""
        missing = _no_such(path, dict(model.named_modules()))
        raise AdapterError(f"adapter {adapter!r} has a layer for {path}, {missing}{hint}") from None
    weight: torch.Tensor | None = getattr(module, "weight", None)
    kind, plain = type(module).__name__, isinstance(module, torch.nn.Linear)
    if weight is None or not (plain or isinstance(module, torch.nn.Embedding) or kind == "Conv1D"):  # GPT-2's
        raise AdapterError(f"adapter {adapter!r} has a layer for {path}, which is a {kind}: linear layers, Conv1D and "
                           "embeddings are supported")  # fmt: skip
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise AdapterError(f"adapter {adapter!r} has a layer for {path}, which is quantised ({weight.dtype})")
    return weight, not plain


def _no_such(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"which the model does not have{f' (did you mean {close[0]}?)' if close else ''}"
