"""All Triton kernels, and launches of them as in real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from skipc.kernels.gpu import attention, linear, lora, merging, mlp, norms, routing, rows
from skipc.kernels.gpu.kernel import Kernel, Launch, recorded

MODULES: tuple[ModuleType, ...] = (attention, linear, lora, merging, mlp, norms, routing, rows)
KERNELS: dict[str, Kernel] = {v.name: v for m in MODULES for v in vars(m).values() if isinstance(v, Kernel)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Case:
    """A launch of a kernel in a model.

    Attributes:
        prepare: makes operands on a device, and returns what launches the kernel on them.
        launch: as it would be with the constants that it would have.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable[[str], Callable[[], object]]
    launch: Launch


def cases(arch: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Case]:
    """Launches as they would be on a device of ``arch``."""
    for dtype in dtypes:
        for module in MODULES:
            for name, prepare in module.examples(dtype):
                with recorded(arch) as launches:
                    prepare("meta")()
                yield from (Case(name, dtype, prepare, launch) for launch in launches)
