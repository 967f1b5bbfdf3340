"""Sublayer kernels one after the other in one call: no host code between them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from skipc.kernels.library import library
from skipc.kernels.similarity import RULE_CODES, reached, stream_moments

from skipc.ir.gating import BATCH_RULES, GateTable

ATTENTION, MLP, COUNT, CACHE, LINEAR, WHEN, PASS, MEASURE, COPY = range(9)
ENTRY, NOTHING = -1, -2  # what a link reads or adds, where it is no other link's result

library.define(
    "chain(Tensor x, Tensor?[] tensors, int[] code, float[] numbers, Tensor(a!)[] gates, int rule) -> Tensor"
)
library.define("bind_chain(Tensor?[] tensors, int[] changing, int[] given, int[] code, float[] numbers) -> int")
library.define("call_chain(int handle, Tensor x, Tensor[] given, bool trusted, Tensor(a!)[] gates, int rule) -> Tensor")
library.define("free_chain(int handle) -> ()")


@dataclass
class Gates:
    """The gates of one call of a chain: a :class:`skipc.ir.gating.GateTable`, and what becomes of it.

    Attributes:
        table: what was asked for.
        skipped: bool ``[sites]``: the table's at first; the call adds what it skips.
        moments: fp32 ``[sites, rows, 3]``; the call writes those of sites that run.
        valid: bool ``[rows]``, False for padding; None if there is none.
    """

    table: GateTable
    skipped: torch.Tensor
    moments: torch.Tensor
    valid: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """As the kernel takes them."""
        t = self.table
        made = [self.skipped, t.threshold, t.closes, t.scale, t.since, self.moments]
        return made if self.valid is None else [*made, self.valid]

    @property
    def rule(self) -> int:
        """The batch rule, and 4 if sites that decide nothing are measured too, as the kernel takes it."""
        return RULE_CODES.get(self.table.rule, 0) + 4 * self.table.measures

    def note(self, site: int, found: torch.Tensor) -> None:
        """Site number ``site`` ran, with these moments, ``[rows, 3]``: close the gates that it decides about."""
        threshold = float(self.table.threshold[site])
        if math.isfinite(threshold) and reached(found, threshold, self.table.rule, self.valid):
            self.skipped |= self.table.closes[site]


@dataclass
class Links:
    """A chain, as the kernel takes it.

    Attributes:
        tensors: ``T`` of the caller's choice for each tensor operand, None for what is left out.
        code: for each link its kind, then, but for counters, whose result it reads and adds (:data:`ENTRY` for the
            chain's input), how many operands its adapters are, and its whole numbers.
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
         scale, softcap, out, out_bias, _, *lora) = arguments  # fmt: skip
        self.code += [ATTENTION, x, residual, len(_flat(lora)), len(weights), int(causal)]
        self.tensors += [norm, *weights, *biases, q_norm, k_norm, cos, sin, keys, values, position, mask, live]
        self.tensors += [out, out_bias, *_flat(lora)]
        self.numbers += [eps, head_eps, scale, softcap]
        return self._result()

    def mlp(self, x: int, residual: int, arguments: Sequence[Any]) -> int:
        """Append a ``gated_mlp``."""
        _, norm, eps, gate, up, down, activation, _, *lora = arguments
        self.code += [MLP, x, residual, len(_flat(lora)), activation]
        self.tensors += [norm, gate, up, down, *_flat(lora)]
        self.numbers += [eps]
        return self._result()

    def linear(self, x: int, residual: int, arguments: Sequence[Any]) -> int:
        """Append a ``skinny_linear``."""
        _, weights, biases, norm, eps, _, *lora = arguments
        self.code += [LINEAR, x, residual, len(_flat(lora)), len(weights)]
        self.tensors += [norm, *weights, *biases, *_flat(lora)]
        self.numbers += [eps]
        return self._result()

    def cache(self, x: int, arguments: Sequence[Any]) -> None:
        """Append a ``cache_block``."""
        _, norm, eps, weights, biases, k_norm, head_eps, cos, sin, keys, values, position, *lora = arguments
        self.code += [CACHE, x, len(_flat(lora)), len(weights)]
        self.tensors += [norm, *weights, *biases, k_norm, cos, sin, keys, values, position, *_flat(lora)]
        self.numbers += [eps, head_eps]

    def copy(self, arguments: Sequence[Any]) -> None:
        """Append a ``copy_rows``."""
        self.code += [COPY, arguments[5]]
        self.tensors += arguments[:5]

    def when(self, site: int, skipped: bool) -> None:
        """The next link runs only if site number ``site`` is skipped, or is not."""
        self.code += [WHEN, site, int(skipped)]

    def forward(self, site: int, source: int, result: int) -> None:
        """If the site is skipped, ``result`` is what ``source`` is, times the site's scale."""
        self.when(site, True)
        self.code += [PASS, source, result]

    def measure(self, site: int, before: int, after: int) -> None:
        """If the site ran, take the moments of the stream after it, and before it or an earlier one of the chain."""
        self.when(site, False)
        self.code += [MEASURE, before, after]

    def count(self, counter: Any, amount: int) -> None:
        """Append ``counter.add_(amount)``. No later link may read the counter."""
        self.code += [COUNT, amount]
        self.tensors += [counter]

    def _result(self) -> int:
        self.results += 1
        return self.results - 1


def _flat(lora: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The adapters among a kernel's arguments, which may be left out."""
    return lora[0] if lora else ()


def chain(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    code: Sequence[int],
    numbers: Sequence[float],
    gates: Sequence[torch.Tensor] = (),
    rule: int = 0,
) -> torch.Tensor:
    """Run :class:`Links` on ``x``, ``[..., width]`` (``[batch, tokens, width]`` for attention), and return the last
    result, in memory of its own. Bit for bit what its kernels give when called one by one. ``gates`` and ``rule`` are
    those of :class:`Gates`, if the chain has conditional links."""
    return _Interpreter(x, tensors, code, numbers, gates, rule).run()


class _Interpreter:
    """The chain as host code."""

    def __init__(self, x: torch.Tensor, tensors: Any, code: Any, numbers: Any, gates: Any, rule: int):
        self.x, self.code = x, list(code)
        self.tensor: Callable[[], Any] = iter(tensors).__next__
        self.real: Callable[[], float] = iter(numbers).__next__
        self.at = 0
        self.results: list[Any] = []
        self.before: dict[int, Any] = {}  # the stream before each site that is measured
        self.gates = _gates_of(gates, rule) if gates else None

    def run(self) -> torch.Tensor:
        links = {
            ATTENTION: self._attention, MLP: self._mlp, COUNT: self._count, CACHE: self._cache, LINEAR: self._linear,
            PASS: self._pass, MEASURE: self._measure, COPY: self._copy,
        }  # fmt: skip
        while self.at < len(self.code):
            kind, self.site, runs = self._whole(), -1, True
            if kind == WHEN:
                assert self.gates is not None
                self.site, skipped, kind = self._whole(), self._whole(), self._whole()
                runs = bool(self.gates.skipped[self.site]) == bool(skipped)
            links[kind](runs)
        last: torch.Tensor = self.results[-1]
        return last.clone() if any(last is r for r in (self.x, *self.results[:-1])) else last

    def _whole(self) -> int:
        self.at += 1
        return self.code[self.at - 1]

    def _stream(self) -> Any:
        index = self._whole()
        if index == NOTHING:
            return None
        return self.x if index == ENTRY else self.results[index]

    def _several(self, count: int) -> list[Any]:
        return [self.tensor() for _ in range(count)]

    def _count(self, runs: bool) -> None:
        counter, amount = self.tensor(), self._whole()
        if runs:
            counter.add_(amount)

    def _cache(self, runs: bool) -> None:
        source, adapters, parts, eps, head_eps = self._stream(), self._whole(), self._whole(), self.real(), self.real()
        norm, weights, biases, rest = self.tensor(), self._several(parts), self._several(parts), self._several(6)
        lora = self._several(adapters)
        if runs:
            torch.ops.skipc.cache_block(source, norm, eps, weights, biases, rest[0], head_eps, *rest[1:], lora)

    def _copy(self, runs: bool) -> None:
        tokens, operands = self._whole(), self._several(5)
        if runs:
            torch.ops.skipc.copy_rows(*operands, tokens)

    def _attention(self, runs: bool) -> None:
        source, residual, adapters = self._stream(), self._stream(), self._whole()
        parts, causal = self._whole(), bool(self._whole())
        eps, head_eps, *scales = (self.real() for _ in range(4))
        norm, weights, biases, rest = self.tensor(), self._several(parts), self._several(parts), self._several(11)
        lora = self._several(adapters)
        self._result(
            runs,
            lambda: torch.ops.skipc.attention_block(
                source,
                norm,
                eps,
                weights,
                biases,
                *rest[:2],
                head_eps,
                *rest[2:9],
                causal,
                *scales,
                *rest[9:],
                residual,
                lora,
            ),
        )

    def _linear(self, runs: bool) -> None:
        source, residual, adapters, parts = self._stream(), self._stream(), self._whole(), self._whole()
        norm, weights, biases, eps = self.tensor(), self._several(parts), self._several(parts), self.real()
        lora = self._several(adapters)
        self._result(runs, lambda: torch.ops.skipc.skinny_linear(source, weights, biases, norm, eps, residual, lora))

    def _mlp(self, runs: bool) -> None:
        source, residual, adapters = self._stream(), self._stream(), self._whole()
        activation, eps, (norm, gate, up, down) = self._whole(), self.real(), self._several(4)
        rest = activation, residual, self._several(adapters)
        self._result(runs, lambda: torch.ops.skipc.gated_mlp(source, norm, eps, gate, up, down, *rest))

    def _result(self, runs: bool, make: Callable[[], torch.Tensor]) -> None:
        self.results.append(make() if runs else None)

    def _pass(self, runs: bool) -> None:
        source, result = self._stream(), self._whole()
        if runs:
            assert self.gates is not None
            scale = float(self.gates.table.scale[self.site])
            self.results[result] = source if scale == 1 else (source.float() * scale).to(source.dtype)

    def _measure(self, runs: bool) -> None:
        self.before[self.site], after = self._stream(), self._stream()
        assert self.gates is not None
        if runs and (self.gates.table.measures or self.gates.table.threshold[self.site].isfinite()):
            before = self.before[int(self.gates.table.since[self.site])]
            found = self.gates.moments[self.site] = stream_moments(before, after).flatten(0, -2)
            self.gates.note(self.site, found)


def _gates_of(tensors: Sequence[torch.Tensor], rule: int) -> Gates:
    skipped, threshold, closes, scale, since, moments, *valid = tensors
    table = GateTable(("",) * len(skipped), skipped, threshold, closes, scale, since, BATCH_RULES[rule % 4], rule >= 4)
    return Gates(table, skipped, moments, *valid)


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

    def __call__(
        self, x: torch.Tensor, given: Sequence[torch.Tensor], trusted: bool = False, gates: Gates | None = None
    ) -> torch.Tensor:
        """:func:`chain` on ``x``. ``trusted``: nobody can have moved or resized the fixed operands since the last call.
        (Looking at them takes longer than a small layer.)"""
        if gates is None:
            return self._call(self._handle, x, given, trusted, (), 0)  # type: ignore[no-any-return]
        return self._call(self._handle, x, given, trusted, gates.tensors, gates.rule)  # type: ignore[no-any-return]
