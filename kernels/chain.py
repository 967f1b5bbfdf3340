"""Sublayer kernels one after the other in one call: no host code between them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from skipc.kernels.library import library

ATTENTION, MLP, COUNT, CACHE, LINEAR = range(5)
ENTRY, NOTHING = -1, -2  # what a link reads or adds, where it is no other link's result

library.define("chain(Tensor x, Tensor?[] tensors, int[] code, float[] numbers) -> Tensor")
library.define("bind_chain(Tensor?[] tensors, int[] changing, int[] given, int[] code, float[] numbers) -> int")
library.define("call_chain(int handle, Tensor x, Tensor[] given, bool trusted) -> Tensor")
library.define("free_chain(int handle) -> ()")


@dataclass
class Links:
    """A chain, as the kernel takes it.

    Attributes:
        tensors: ``T`` of the caller's choice for each tensor operand, None for what is left out.
        code: for each link its kind, then, but for counters, whose result it reads and adds (:data:`ENTRY` for the
            chain's input), and its whole numbers.
        numbers: for each link its real numbers.
        results: how many links have a result.
    """

    tensors: list[Any] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    results: int = 0

    def attention(self, x: int, residual: int, arguments: Sequence[Any]) -> int:
        """Append an ``attention_block`` with these arguments (its first and last are ``x`` and ``residual``)."""
        (_, norm, eps, weights, biases, q_norm, k_norm, head_eps, cos, sin, keys, values, position, mask, live, causal,
         scale, softcap, out, out_bias, _) = arguments  # fmt: skip
        self.code += [ATTENTION, x, residual, len(weights), int(causal)]
        self.tensors += [norm, *weights, *biases, q_norm, k_norm, cos, sin, keys, values, position, mask, live]
        self.tensors += [out, out_bias]
        self.numbers += [eps, head_eps, scale, softcap]
        return self._result()

    def mlp(self, x: int, residual: int, arguments: Sequence[Any]) -> int:
        """Append a ``gated_mlp``."""
        _, norm, eps, gate, up, down, activation, _ = arguments
        self.code += [MLP, x, residual, activation]
        self.tensors += [norm, gate, up, down]
        self.numbers += [eps]
        return self._result()

    def linear(self, x: int, residual: int, arguments: Sequence[Any]) -> int:
        """Append a ``skinny_linear``."""
        _, weights, biases, norm, eps, _ = arguments
        self.code += [LINEAR, x, residual, len(weights)]
        self.tensors += [norm, *weights, *biases]
        self.numbers += [eps]
        return self._result()

    def cache(self, x: int, arguments: Sequence[Any]) -> None:
        """Append a ``cache_block``."""
        _, norm, eps, weights, biases, k_norm, head_eps, cos, sin, keys, values, position = arguments
        self.code += [CACHE, x, len(weights)]
        self.tensors += [norm, *weights, *biases, k_norm, cos, sin, keys, values, position]
        self.numbers += [eps, head_eps]

    def count(self, counter: Any, amount: int) -> None:
        """Append ``counter.add_(amount)``. No later link may read the counter."""
        self.code += [COUNT, amount]
        self.tensors += [counter]

    def _result(self) -> int:
        self.results += 1
        return self.results - 1


def chain(
    x: torch.Tensor, tensors: Sequence[torch.Tensor | None], code: Sequence[int], numbers: Sequence[float]
) -> torch.Tensor:
    """Run :class:`Links` on ``x``, ``[..., width]`` (``[batch, tokens, width]`` for attention), and return the last
    result. Bit for bit what its kernels give when called one by one."""
    ops = torch.ops.skipc
    tensor: Callable[[], Any] = iter(tensors).__next__
    whole, real = iter(code).__next__, iter(numbers).__next__
    results: list[Any] = []
    left = len(code)

    def stream() -> Any:
        index = whole()
        return None if index == NOTHING else x if index == ENTRY else results[index]

    while left:
        kind = whole()
        if kind == COUNT:
            tensor().add_(whole())
            left -= 2
        elif kind == CACHE:
            source, parts, eps, head_eps = stream(), whole(), real(), real()
            norm, weights, biases = tensor(), [tensor() for _ in range(parts)], [tensor() for _ in range(parts)]
            ops.cache_block(source, norm, eps, weights, biases, tensor(), head_eps, *(tensor() for _ in range(5)))
            left -= 3
        elif kind == ATTENTION:
            source, residual, parts, causal = stream(), stream(), whole(), bool(whole())
            eps, head_eps, scale, softcap = real(), real(), real(), real()
            norm, weights, biases = tensor(), [tensor() for _ in range(parts)], [tensor() for _ in range(parts)]
            q_norm, k_norm, cos, sin, keys, values, position, mask, live = (tensor() for _ in range(9))
            results.append(
                ops.attention_block(
                    source, norm, eps, weights, biases, q_norm, k_norm, head_eps, cos, sin, keys, values, position,
                    mask, live, causal, scale, softcap, tensor(), tensor(), residual
                )
            )  # fmt: skip
            left -= 5
        elif kind == LINEAR:
            source, residual, parts, norm = stream(), stream(), whole(), tensor()
            weights, biases = [tensor() for _ in range(parts)], [tensor() for _ in range(parts)]
            results.append(ops.skinny_linear(source, weights, biases, norm, real(), residual))
            left -= 4
        else:
            source, residual, activation = stream(), stream(), whole()
            norm, gate, up, down = (tensor() for _ in range(4))
            results.append(ops.gated_mlp(source, norm, real(), gate, up, down, activation, residual))
            left -= 4
    return results[-1]  # type: ignore[no-any-return]


library.impl("chain", chain, "CompositeExplicitAutograd")


class BoundChain:
    """A chain with its weights in place: handing over hundreds of tensors at each call would take longer than a layer.

    Args:
        links: the chain.
        fixed: its operands, with None for those that are given at each call, and not kept; the others are kept alive.
        given: for each tensor of a call, the positions it takes.
    """

    def __init__(self, links: Links, fixed: Sequence[torch.Tensor | None], given: Sequence[Sequence[int]]):
        ops = torch.ops.skipc
        positions = [(at, i) for i, places in enumerate(given) for at in places]
        changing, sources = ([p[k] for p in positions] for k in (0, 1))
        self._handle: int = ops.bind_chain(fixed, changing, sources, links.code, links.numbers)
        self._call = ops.call_chain.default
        weakref.finalize(self, ops.free_chain, self._handle)

    def __call__(self, x: torch.Tensor, given: Sequence[torch.Tensor], trusted: bool = False) -> torch.Tensor:
        """:func:`chain` on ``x``. ``trusted``: nobody can have moved or resized the fixed operands since the last call.
        (Looking at them takes longer than a small layer.)"""
        return self._call(self._handle, x, given, trusted)  # type: ignore[no-any-return]
