"""Low-rank adapters (Hu et al., arXiv 2106.09685) on linear layers, with rows that choose among several.

The adapters of a layer lie in slots, and four tensors hold them:

* ``a`` and ``b``, the first and second matrices, ``[rank, k]`` and, as :func:`pack` makes them, ``[n, rank]``: at
  places of one flat tensor that both are; or, of one slot, as they are;
* ``where``, int64 ``[slots, 4]``: for each slot its rank (0 where it has nothing for the layer), the places in ``a``
  and ``b`` where its matrices begin, and the largest rank that there can be;
* ``scales``, fp32 ``[slots]``; of one slot, one number.

Two more say what rows want, in tensors whose form never changes:

* ``table``, int64: how many groups of rows there are (each of as many neighbours), how many slots each group names, and
  then these, group by group, -1 for none. No groups: nobody wants any. A negative number: a router decided for each of
  so many tokens, and layers that take other rows must have nothing for them.
* ``gates``, fp32: how much of each, at the same places.

Kernels take adapters as one list: for each of their weights four tensors or four times None, then table and gates; or
nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from skipc.kernels.device import on_gpu
from skipc.kernels.library import NATIVE, TRITON, library

PACK = 16  # outputs that lie together in packed matrices
MOST = 8  # adapters of a row
OPERANDS = 4  # of a weight

Lora = Sequence[torch.Tensor | None]

library.define("lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor?[] lora) -> Tensor")
library.define("add_lora(Tensor(a!) out, Tensor x, Tensor?[] lora) -> ()")
library.define("add_adapters(Tensor(a!)[] outs, Tensor x, Tensor?[] lora) -> ()")
library.define("pack_lora(Tensor[] a, Tensor[] b, Tensor(a!) memory, int[] places) -> ()")


def pack(b: torch.Tensor) -> torch.Tensor:
    """A second matrix ``[n, rank]`` as kernels read it, ``[n / PACK, rank, PACK]``, flat and filled up with zeros."""
    return F.pad(b, (0, 0, 0, -len(b) % PACK)).unflatten(0, (-1, PACK)).transpose(1, 2).flatten()


def unpack(packed: torch.Tensor, n: int, rank: int) -> torch.Tensor:
    """What :func:`pack` made of it, transposed: ``[rank, n]``."""
    blocks = -(-n // PACK)
    return packed[: blocks * rank * PACK].view(blocks, rank, PACK).transpose(0, 1).flatten(1)[:, :n]


def pack_lora(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], memory: torch.Tensor, places: Sequence[int]
) -> None:
    """Copy adapters to where kernels read them.

    Args:
        a, b: ``[rank, k]`` and ``[n, rank]`` each, floating. (The CPU kernel: contiguous, fp32 or bf16.)
        memory: flat, floating.
        places: of each ``a`` in it, and behind that of its ``b``.
    """
    for i, matrices in enumerate(zip(a, b, strict=True)):
        for at, matrix in zip(places[2 * i : 2 * i + 2], (matrices[0].flatten(), pack(matrices[1])), strict=True):
            memory[at : at + len(matrix)] = matrix


library.impl("pack_lora", pack_lora, "CompositeExplicitAutograd")


@dataclass(frozen=True)
class Share:
    """These rows want ``slot``, each as much as ``gates`` says, fp32."""

    rows: slice | torch.Tensor
    slot: int
    gates: torch.Tensor


def stretches(table: torch.Tensor, gates: torch.Tensor, rows: int) -> Iterator[Share]:
    """What ``rows`` rows want, with neighbours that want the same together.

    Raises:
        RuntimeError: if there are adapters for another number of rows.
    """
    groups, per = table[:2].tolist()
    if groups == -rows:
        groups = rows
    if groups <= 0:
        return
    if rows % groups:
        raise RuntimeError(f"adapters for {groups} rows in a call of {rows}")
    size, count = rows // groups, groups * per
    wanted, amounts = table[2 : 2 + count].view(groups, per).tolist(), gates[2 : 2 + count].view(groups, per)
    for i in range(per):
        first = 0
        for g in range(1, groups + 1):
            if g < groups and wanted[g][i] == wanted[first][i]:
                continue
            if wanted[first][i] >= 0:
                yield Share(
                    slice(first * size, g * size), wanted[first][i], amounts[first:g, i].repeat_interleave(size)
                )
            first = g


def scattered(table: torch.Tensor, gates: torch.Tensor, rows: int) -> Iterator[Share]:
    """The same for rows each of which is a group, with all that want the same together."""
    count = rows * int(table[1])
    wanted, amounts = (t[2 : 2 + count].view(rows, -1) for t in (table, gates))
    for slot in wanted.unique().tolist():
        if slot >= 0:
            at, i = (wanted == slot).nonzero(as_tuple=True)
            yield Share(at, slot, amounts[at, i])


def _scatter(table: torch.Tensor, rows: int) -> bool:
    """Whether there are many rows, and neighbours seldom want the same."""
    return rows > 16 and int(table[0]) == -rows


def matrices(lora: Lora, at: int, slot: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """Of the ``at``-th weight, ``[n, k]``, what a slot holds: ``[rank, k]``, ``[rank, n]`` and the scale; None if
    nothing."""
    a, b, where, scales = lora[OPERANDS * at : OPERANDS * (at + 1)]
    if a is None or b is None or where is None or scales is None:
        return None
    rank, first, second, _ = where[slot].tolist()
    if not rank:
        return None
    if a.dim() == 2:
        return a, b.T, float(scales)
    return a[first : first + rank * k].view(rank, k), unpack(b[second:], n, rank), float(scales[slot])


def _check_tokens(table: torch.Tensor, lora: Lora, at: int, rows: int) -> None:
    """Refuse tokens that a router decided for, where a layer takes other rows and has something for them."""
    groups, per = table[:2].tolist()
    where = lora[OPERANDS * at + 2]
    if groups >= 0 or groups == -rows or where is None:
        return
    wanted = table[2 : 2 - groups * per].unique()
    if where[wanted[wanted >= 0], 0].any():
        raise RuntimeError(f"a router decided for {-groups} tokens, and adapters of a layer met {rows}")


def add_lora(out: torch.Tensor, x: torch.Tensor, lora: Lora, at: int = 0) -> torch.Tensor:
    """Add to ``out``, ``[rows, n]``, in place, what rows of ``x``, ``[rows, k]``, want of the ``at``-th weight's."""
    if not lora:
        return out
    table, gates = lora[-2:]
    assert table is not None
    assert gates is not None
    _check_tokens(table, lora, at, len(x))
    for part in (scattered if _scatter(table, len(x)) else stretches)(table, gates, len(x)):
        found = matrices(lora, at, part.slot, x.shape[1], out.shape[1])
        if found is None:
            continue
        a, b, scale = found
        between = F.linear(x[part.rows], a.to(x.dtype)) * (part.gates * scale).to(x.dtype).unsqueeze(1)
        if isinstance(part.rows, slice):
            out[part.rows].addmm_(between, b.to(x.dtype))
        else:
            out.index_add_(0, part.rows, between @ b.to(x.dtype))
    return out


@torch.library.impl(library, "add_lora", "CompositeExplicitAutograd")
def _(out: torch.Tensor, x: torch.Tensor, lora: Lora) -> None:
    add_lora(out.view(-1, out.shape[-1]), x, lora)


_nobody: ContextVar[bool] = ContextVar("nobody", default=False)


@contextmanager
def nobody_wants_adapters() -> Iterator[None]:
    """Tables need not be read: they say so. Steps that are captured in here have no launch for adapters."""
    token = _nobody.set(True)
    try:
        yield
    finally:
        _nobody.reset(token)


def adapters_wanted() -> bool:
    """Whether anybody may want some."""
    return not _nobody.get()


def add_adapters(outs: Sequence[torch.Tensor], x: torch.Tensor, lora: Lora) -> None:
    """Add to each of ``outs``, in place, what rows of ``x`` want of the layer that made it: on a GPU, one launch for
    three layers.

    Args:
        outs: ``[..., n_i]`` each, the results of layers that share their input; contiguous.
        x: ``[..., k]``, contiguous.
        lora: adapters of these layers.
    """
    for i, out in enumerate(outs):
        add_lora(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), lora, i)


library.impl("add_adapters", add_adapters, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::add_adapters")
def _(*_: object) -> None:
    return None


def _native(x: torch.Tensor, lora: Lora) -> bool:
    """Whether the CPU kernel takes this: adapters that lie in one memory."""
    memory = lora[0]
    assert memory is not None
    return x.is_cpu and x.dtype in NATIVE and memory.dtype == x.dtype and memory.dim() == 1


def lora_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora: Lora) -> torch.Tensor:
    """``x @ weight.T + bias``, and what each row's adapters add: ``gate * scale * ((x @ a.T) @ b.T)``.

    Args:
        x: ``[..., k]``, floating.
        weight, bias: ``[n, k]`` and ``[n]`` or None.
        lora: adapters of ``weight``, of its dtype, with table and gates; see above.

    Returns:
        ``[..., n]``. Rows that want nothing are, bit for bit, what ``linear`` gives.

    Raises:
        RuntimeError: if the table is for another number of rows.
    """
    out, rows = F.linear(x, weight, bias), x.reshape(-1, x.shape[-1])
    if on_gpu(x) and x.dtype in TRITON:
        torch.ops.skipc.add_adapters([out], rows.contiguous(), lora)
    elif _native(rows, lora):
        torch.ops.skipc.add_lora(out, rows.contiguous(), lora)
    else:
        add_lora(out.view(-1, out.shape[-1]), rows, lora)
    return out


library.impl("lora_linear", lora_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::lora_linear")
def _(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
