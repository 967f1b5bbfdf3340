"""Weights of a bank's layers with adapters merged into them, in memory of their own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from skipc.adapters.adapter import layer_of
from skipc.ir.adapters import AdaptedLayer
from skipc.ir.errors import AdapterError
from skipc.ir.plan import Plan
from skipc.kernels.device import on_gpu, wait_for
from skipc.kernels.library import NATIVE, TRITON
from skipc.kernels.memory import aligned, zeros
from skipc.kernels.merging import merge_lora

_SAMPLED = 8  # of so many layers one is timed, for a guess


class MergedWeights:
    """One copy of the weights that a bank's adapters may change, rewritten from the model's own by one call. Sessions
    run with it by one plan, which stays the same whatever was merged, so that nothing is compiled or bound anew.

    Args:
        model: whose weights they are.
        layers: of the bank.

    Raises:
        AdapterError: for a weight that the model uses in several places.
    """

    def __init__(self, model: torch.nn.Module, layers: Mapping[str, AdaptedLayer]):
        self._layers = list(layers.values())
        if (why := unmergeable(model, self._layers)) is not None:
            raise AdapterError(f"adapters cannot be merged: {why}")
        own = _own(model, self._layers)
        sizes = {d: sum(aligned(w.numel()) for w in own if w.dtype == d) for d in {w.dtype for w in own}}
        memory = {dtype: zeros(size, dtype, own[0].device) for dtype, size in sizes.items()}
        ends, made = dict.fromkeys(sizes, 0), {}
        for layer, weight in zip(self._layers, own, strict=True):
            at = ends[weight.dtype]
            made[layer.weights[0]] = memory[weight.dtype][at : at + weight.numel()].view(weight.shape)
            ends[weight.dtype] += aligned(weight.numel())
        self.plan = Plan(weights=made)
        self.content: Mapping[Any, float] = {}  # what is merged, and how much of it
        self.users = 0  # sessions that run with it
        self.seconds: float | None = None  # of the last call that rewrote it
        self._from: tuple[tuple[int, int], ...] = ()  # the model's own weights as they were then

    def holds(self, model: torch.nn.Module, content: Mapping[Any, float]) -> bool:
        """Whether it is what the model's weights with ``content`` merged into them are now."""
        return bool(content) and content == self.content and _state(_own(model, self._layers)) == self._from

    def write(self, model: torch.nn.Module, content: Mapping[Any, float], slots: Mapping[Any, int]) -> None:
        """Merge ``content``, which lies in these slots."""
        assert not self.users
        own = _own(model, self._layers)
        for weight, made in zip(own, self.plan.weights.values(), strict=True):
            if (weight.shape, weight.dtype) != (made.shape, made.dtype) or not weight.is_contiguous():
                raise AdapterError("the model's weights have another form than those that the bank was made for")
        self.content = {}
        self.seconds = _merge(
            own, list(self.plan.weights.values()), self._layers, {slots[k]: f for k, f in content.items()}
        )
        self.content, self._from = dict(content), _state(own)


def unmergeable(model: torch.nn.Module, layers: Iterable[AdaptedLayer]) -> str | None:
    """Why the weights of layers cannot be replaced by others of their form, if so."""
    for layer in layers:
        if len(layer.weights) > 1:
            return f"the weight of {layer.path} is tied to another"
        if not layer_of(model, layer.path, "bank")[0].is_contiguous():
            return f"the weight of {layer.path} is not contiguous"
    return None


def seconds_to_merge(model: torch.nn.Module, layers: Mapping[str, AdaptedLayer], slot: int) -> float:
    """About how long :meth:`MergedWeights.write` takes, from some of the layers."""
    some = list(layers.values())[::_SAMPLED]
    own = _own(model, some)
    made = [torch.empty_like(w) for w in own]
    took = min(_merge(own, made, some, {slot: 1.0}) for _ in range(3))
    return took * sum(w.numel() for w in _own(model, list(layers.values()))) / sum(w.numel() for w in own)


def _merge(
    own: list[torch.Tensor], made: list[torch.Tensor], layers: list[AdaptedLayer], chosen: Mapping[int, float]
) -> float:
    """Seconds that it took."""
    device = own[0].device
    slots = torch.tensor(sorted(chosen), device=device)
    factors = torch.tensor([chosen[s] for s in sorted(chosen)], dtype=torch.float32, device=device)
    start = time.perf_counter()
    for dtype in {w.dtype for w in own}:
        merge = torch.ops.skipc.merge_lora if dtype in (TRITON if on_gpu(slots) else NATIVE) else merge_lora
        some = [(o, m, layer) for o, m, layer in zip(own, made, layers, strict=True) if o.dtype == dtype]
        weights, merged, of = map(list, zip(*some, strict=True))
        merge(weights, merged, [t for x in of for t in x.operands], [x.transposed for x in of], slots, factors)
    wait_for(device)()
    return time.perf_counter() - start


def _own(model: torch.nn.Module, layers: list[AdaptedLayer]) -> list[torch.Tensor]:
    return [layer_of(model, layer.path, "bank")[0].detach() for layer in layers]


def _state(weights: list[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Changes when a weight is replaced or written, but not through ``.data`` or in inference mode."""
    return tuple((w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights)
