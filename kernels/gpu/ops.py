"""The operations of ``torch.ops.skipc`` that have Triton kernels. :mod:`skipc.kernels.library` looks here for what runs
where tensors are on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from skipc.kernels.gpu import attention, lora, merging, norms, routing, rows
from skipc.kernels.library import ON_GPU


def _norm_rows(x: torch.Tensor, *norm: Any) -> torch.Tensor:
    return norms.add_norm(x, None, *norm)[1]


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "add_adapters": lora.add_adapters,
    "add_norm": norms.add_norm,
    "compact_rows": rows.compact,
    "decode_attention": attention.decode_attention,
    "gather_rows": rows.gather_rows,
    "merge_lora": merging.merge_lora,
    "norm_rows": _norm_rows,
    "route_tokens": routing.route_tokens,
    "scatter_rows_": rows.scatter_rows,
}

assert set(IMPLEMENTATIONS) == set(ON_GPU)


@contextmanager
def on_cpu_too() -> Iterator[None]:
    """Tensors on the CPU get these implementations, too, while this is open; for simulation."""
    instead = torch.library.Library("skipc", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that something is overridden
            for name, function in IMPLEMENTATIONS.items():
                instead.impl(name, function, allow_override=True)
        yield
    finally:
        instead._destroy()
