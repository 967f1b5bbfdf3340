"""All Triton kernels, and launches of them as in real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from skipc.kernels.gpu import lora, merging, mlp, routing
from skipc.kernels.gpu.kernel import Kernel, Launch, recorded

MODULES: tuple[ModuleType, ...] = (lora, merging, mlp, routing)
KERNELS: tuple[Kernel, ...] = tuple(v for m in MODULES for v in vars(m).values() if isinstance(v, Kernel))


@dataclass(frozen=True)
class Example:
    """A launch of a kernel in a model."""

    name: str
    dtype: torch.dtype
    launch: Launch


def examples(arch: str, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)) -> Iterator[Example]:
    """Launches as they would be on a device of ``arch``."""
    for dtype in dtypes:
        for module in MODULES:
            for name, call in module.examples(dtype):
                with recorded(arch) as launches:
                    call()
                yield from (Example(name, dtype, launch) for launch in launches)
