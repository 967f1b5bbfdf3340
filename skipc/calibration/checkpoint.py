"""Which checkpoint a model is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch


def digest_of(weight: torch.Tensor) -> str:
    """16 hexadecimal digits for a parameter's shape and values. Values count as bfloat16 has them, so that a checkpoint
    is the same one in float32 and in bfloat16."""
    value = weight.detach()
    half = value.to(torch.bfloat16) if value.is_floating_point() else value
    made = hashlib.sha256(f"{tuple(value.shape)} ".encode())
    made.update(bytes_of(half))
    return made.hexdigest()[:16]


def bytes_of(value: torch.Tensor) -> memoryview:
    """The contents of a tensor."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def digests_of(model: torch.nn.Module) -> dict[str, str]:
    """Digests of all parameters, by name; tied ones once."""
    return {name: digest_of(value) for name, value in model.named_parameters()}


def checkpoint_digest(digests: Mapping[str, str]) -> str:
    """One digest for all."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(digests.items())).encode()).hexdigest()[:16]


def differing(known: Mapping[str, str], weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of parameters that are not those of the checkpoint, or not in it."""
    return [name for name, value in weights if known.get(name) != digest_of(value)]
