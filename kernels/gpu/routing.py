"""Routing decided on the device, once for all layers. Semantics: :mod:`skipc.kernels.routing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from skipc.kernels.gpu.kernel import Example, Kernel, launch, pick, random
from skipc.kernels.lora import MOST, adapters_wanted
from skipc.kernels.routing import HEADER, MOST_EXPERTS, places
from skipc.kernels.tables import Choice


@triton.jit
def route(x, x_stride, rows, router, table, gates, HEADER: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):
    experts = tl.load(router).to(tl.int32)
    if experts > 0:
        width = tl.load(router + 1).to(tl.int32)
        most = tl.load(router + 2).to(tl.int32)
        whole = tl.load(router + 3)
        row = tl.program_id(0)
        e = tl.arange(0, BLOCK_E)
        known = e < experts
        total = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
        weights = router + HEADER + 2 * experts + (e * width)[:, None]
        for begin in range(0, width, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            values = tl.load(x + row.to(tl.int64) * x_stride + k, mask=k < width, other=0.0).to(tl.float32)
            inside = known[:, None] & (k < width)[None, :]
            total += tl.load(weights + k[None, :], mask=inside, other=0.0) * values[None, :]
        logits = tl.sum(total, 1) + tl.load(router + HEADER + experts + e, mask=known, other=0.0)
        logits = tl.where(known, logits, -float("inf"))
        top = tl.max(logits, 0)
        every = tl.sum(tl.exp(logits - top), 0)
        left = logits
        chosen = 0.0
        for _ in range(most):
            best = tl.max(left, 0)
            at = tl.min(tl.where(left == best, e, BLOCK_E), 0)
            chosen += tl.exp(best - top)
            left = tl.where(e == at, -float("inf"), left)
        left = logits
        for i in range(most):
            best = tl.max(left, 0)
            at = tl.min(tl.where(left == best, e, BLOCK_E), 0)
            place = 2 + row * most + i
            tl.store(table + place, tl.load(router + HEADER + at).to(tl.int64))
            tl.store(gates + place, tl.exp(best - top) / tl.where(whole != 0.0, chosen, every))
            left = tl.where(e == at, -float("inf"), left)
        if row == 0:
            tl.store(table, -rows.to(tl.int64))
            tl.store(table + 1, most.to(tl.int64))


ROUTE = Kernel(
    "route", route, ("rows", "width", "bits"),
    {"BLOCK_E": (MOST_EXPERTS,), "BLOCK_K": (64, 128), "warps": (4, 8), "stages": (1, 2)},
    Choice(constants={"BLOCK_E": MOST_EXPERTS, "BLOCK_K": 64}, warps=4, stages=1),
    steps=lambda sizes, c: 4 + -(-sizes["width"] // c.constants["BLOCK_K"]),
)  # fmt: skip


def route_tokens(x: torch.Tensor, router: torch.Tensor, table: torch.Tensor, gates: torch.Tensor) -> None:
    """The operation of that name. How many experts there are is read on the device: one launch whether or not there is
    a router. Without a word about it, tokens of another width than the router's get what its numbers make of them, so
    whoever hands it over checks.

    Raises:
        RuntimeError: if there is no room for what the tokens may want.
    """
    if not adapters_wanted():
        return
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) * MOST > len(table) - 2:
        raise RuntimeError(f"{len(rows)} tokens that may want {MOST} adapters each are more than {len(table) - 2}")
    sizes = {"rows": len(rows), "width": rows.shape[1], "bits": 8 * x.element_size()}
    given = {"x": rows, "x_stride": rows.stride(0), "rows": len(rows), "router": router, "table": table, "gates": gates,
             "HEADER": HEADER}  # fmt: skip
    moved = x.numel() * x.element_size() + 4 * router.numel() + 12 * len(rows) * MOST
    operations = 2 * x.numel() * MOST_EXPERTS
    launch(ROUTE, pick(ROUTE, x, **sizes), (len(rows),), given, sizes=sizes, moved=moved, operations=operations)


def examples(dtype: torch.dtype) -> Iterator[Example]:
    """A decode step and a prompt, of SmolLM2-135M and of Llama 3 8B."""
    for model, width in (("smollm2", 576), ("llama3", 4096)):
        for rows in (8, 512):
            yield f"{model}, {rows} tokens", partial(_example, rows, width, dtype)


def _example(rows: int, width: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    experts, most = 8, 2
    router = random(places(experts, width), dtype=torch.float32, device=device)
    router[: HEADER + experts] = torch.tensor([experts, width, most, 1, *range(experts)], device=device)
    table = torch.zeros(2 + rows * MOST, dtype=torch.int64, device=device)
    x, gates = random(rows, width, dtype=dtype, device=device), torch.zeros(len(table), device=device)
    return lambda: route_tokens(x, router, table, gates)
