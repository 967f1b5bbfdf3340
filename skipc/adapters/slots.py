"""Memory for the adapters of a model, and what lies in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from skipc.adapters.adapter import Adapter, layer_of
from skipc.ir.adapters import AdaptedLayer
from skipc.ir.errors import AdapterError, nearest
from skipc.kernels.lora import PACK, pack
from skipc.kernels.memory import aligned, zeros


@dataclass(eq=False)
class Loaded:
    """An adapter that can be asked for. ``slot``: where it lies, if it does; ``users``: leases that want it there."""

    adapter: Adapter
    slot: int | None = None
    users: int = 0
    enabled: bool = True

    @property
    def place(self) -> int:
        """The slot of one that lies in one."""
        assert self.slot is not None
        return self.slot


Wishes = Sequence[Mapping[Loaded, float]]  # of each row: what it wants, and how much of it


def text_of(content: Mapping[Loaded, float]) -> str:
    """A sum of adapters."""
    return " + ".join(k.adapter.name if f == 1 else f"{f:g} {k.adapter.name}" for k, f in content.items())


def targets_of(model: torch.nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Paths of the layers that adapters may change; see :class:`skipc.AdapterBank`."""
    modules = dict(model.named_modules())
    linear = [p for p, m in modules.items() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [p for p in linear if modules[p] is not head]
    found: dict[str, None] = {}
    for target in targets:
        ends = re.compile(rf"(.*\.)?{re.escape(target)}$")
        matched = [p for p in modules if ends.match(p)]
        if not matched:
            close = nearest(target, {part for p in linear for part in (p, p.rsplit(".", 1)[-1])})
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise AdapterError(f"the model has no module {target!r}{hint}")
        for path in matched:
            if path not in linear:
                raise AdapterError(f"{path} is a {type(modules[path]).__name__}: rows choose adapters of linear layers")
            found[path] = None
    return [p for p in linear if p in found]


@torch.inference_mode(False)
def allocated(model: torch.nn.Module, paths: Sequence[str], slots: int, max_rank: int) -> dict[str, AdaptedLayer]:
    """Room for ``slots`` adapters of these layers."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    weights, device = {}, None
    for path in paths:
        weight, transposed = layer_of(model, path, "bank")
        if weight.device.type not in ("cpu", "cuda"):
            raise AdapterError(f"{path} is on {weight.device}: adapters are chosen by row on CPUs and GPUs")
        if weight.device != (device or weight.device):
            raise AdapterError(f"{path} is on {weight.device}, another layer on {device}: a bank is on one device")
        device = weight.device
        n, k = reversed(weight.shape) if transposed else weight.shape
        weights[path] = weight, (int(n), int(k)), transposed
    sizes: dict[torch.dtype, int] = {}  # of a slot
    for weight, (n, k), _ in weights.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + aligned(max_rank * k) + aligned(max_rank * (n + PACK - 1))
    memory = {dtype: zeros(slots * size, dtype, device) for dtype, size in sizes.items()}
    layers = {}
    for path, (weight, shape, transposed) in weights.items():
        where = torch.tensor([[0, 0, 0, max_rank]]).repeat(slots, 1).to(weight.device)
        own = tuple(names[id(weight)])
        layers[path] = AdaptedLayer(path, own, shape, transposed, memory[weight.dtype], where,
                                    torch.zeros(slots, device=weight.device))  # fmt: skip
    return layers


def write(layers: Iterable[AdaptedLayer], slot: int, slots: int, adapter: Adapter) -> None:
    """Put an adapter into a slot, one layer behind the other, as they are read: of layers side by side in one module,
    all first matrices and then all second ones."""
    ends: dict[int, int] = {}
    siblings: dict[str, list[AdaptedLayer]] = {}
    for layer in layers:
        layer.where[slot, 0] = 0
        if layer.path in adapter.layers:
            siblings.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    for group in siblings.values():
        for which in (0, 1):
            for layer in group:
                lora, memory = adapter.layers[layer.path], layer.memory
                at = ends.setdefault(id(memory), slot * (len(memory) // slots))
                matrix = pack(lora.b.to(memory.dtype)) if which else lora.a.to(memory.dtype).flatten()
                memory[at : at + len(matrix)] = matrix
                ends[id(memory)] = at + aligned(len(matrix))
                layer.where[slot, 1 + which] = at
                layer.where[slot, 0] = lora.rank
                layer.scales[slot] = lora.scale
