"""Text, or whatever else a model takes, for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call


@dataclass(frozen=True)
class Batch:
    """One call of a model, by keyword arguments."""

    inputs: Mapping[str, Any]

    @property
    def valid(self) -> torch.Tensor | None:
        """bool ``[batch, tokens]``, False for padding; None if there is none."""
        mask = self.inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @property
    def tokens(self) -> int:
        """How many there are, padding included."""
        first = next((v for v in self.inputs.values() if isinstance(v, torch.Tensor)), None)
        return 0 if first is None else first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)


def batches_of(model: torch.nn.Module, given: Iterable[Any]) -> list[Batch]:
    """What the user gave, each as a batch: int64 ``[batch, tokens]`` tensors, or dictionaries of keyword arguments.

    Raises:
        TypeError: for anything else, and for none at all.
    """
    parameters = inspect.signature(model.forward).parameters
    first = next(iter(parameters))
    made = []
    for item in given:
        if isinstance(item, torch.Tensor):
            inputs: dict[str, Any] = {first: item}
        elif isinstance(item, Mapping):
            inputs = dict(item)
        else:
            raise TypeError(f"a batch is a tensor or a dictionary of keyword arguments, not {type(item).__name__}")
        if "use_cache" in parameters:
            inputs.setdefault("use_cache", False)
        made.append(Batch(inputs))
    if not made:
        raise TypeError("there is no batch to calibrate on")
    return made


def call_on(model: torch.nn.Module, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    """What ``model`` gives for ``batch``, with some of its parameters replaced."""
    return functional_call(model, dict(weights or {}), (), dict(batch.inputs), tie_weights=False)


def result_of(output: Any) -> torch.Tensor:
    """The tensor that a model is for: logits ``[batch, tokens, vocabulary]``, or else its last hidden state."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, torch.Tensor):
        return output
    return result_of(next(v for v in (output.values() if isinstance(output, Mapping) else output) if v is not None))
