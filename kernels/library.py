"""The ``torch.ops.skipc`` namespace. An op has its plain-torch reference as the default implementation, which the
native one overrides on the CPU once :mod:`skipc.kernels.native` has loaded it, and a Triton kernel on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from skipc.kernels.device import HAS_TRITON

NATIVE = (torch.float32, torch.bfloat16)  # dtypes that the native ones take
TRITON = (torch.float32, torch.bfloat16, torch.float16)  # that Triton kernels take

library = torch.library.Library("skipc", "DEF")

ON_GPU = (  # ops that have Triton kernels
    "add_adapters",
    "add_norm",
    "compact_rows",
    "decode_attention",
    "gather_rows",
    "merge_lora",
    "norm_rows",
    "route_tokens",
    "scatter_rows_",
)


def _on_gpu(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from skipc.kernels.gpu.ops import IMPLEMENTATIONS  # imports Triton

        return IMPLEMENTATIONS[name](*args)

    return call


for _name in ON_GPU if HAS_TRITON else ():
    library.impl(_name, _on_gpu(_name), "CUDA")
