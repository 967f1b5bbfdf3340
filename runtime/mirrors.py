"""Adapters among a model's parameters, in memory of the program's own, where they lie as kernels read them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from skipc.kernels.device import on_cpu
from skipc.kernels.library import NATIVE
from skipc.kernels.lora import pack_lora
from skipc.kernels.memory import zeros

from skipc.ir.adapters import Mirrored


class Mirror:
    """Those of one instance of a model.

    Args:
        mirrored: adapters, and constants of the program that follow them.
        constants: all of these.
    """

    def __init__(self, mirrored: Sequence[Mirrored], constants: Sequence[torch.Tensor]):
        own: dict[int, torch.Tensor] = {}
        for m in mirrored:
            for value in (m.memory, m.scales):
                if id(value) not in own:
                    own[id(value)] = zeros(len(value), value.dtype, value.device)
        self.constants = [own.get(id(value), value) for value in constants]
        self._by_memory: dict[int, tuple[torch.Tensor, list[Mirrored], list[int]]] = {}
        self._scales = []  # that are inputs
        for m in mirrored:
            _, adapters, places = self._by_memory.setdefault(id(m.memory), (own[id(m.memory)], [], []))
            adapters.append(m)
            places += m.where[m.slot, 1:3].tolist()
            own[id(m.scales)][m.slot] = m.scale.number
            if m.scale.input is not None:
                self._scales.append((own[id(m.scales)][m.slot], m.scale.input))

    def follow(self, inputs: Sequence[Any]) -> None:
        """Take over what the inputs of a call say. (That nobody wrote them since the last call cannot be known: writes
        through ``.data``, as in PEFT's hot swap, leave no trace.)"""
        for memory, adapters, places in self._by_memory.values():
            first, second = [inputs[m.a] for m in adapters], [inputs[m.b] for m in adapters]
            plain = (
                memory.dtype in NATIVE
                and on_cpu(memory)
                and all(v.dtype in NATIVE and v.is_contiguous() for v in (*first, *second))
            )
            (torch.ops.skipc.pack_lora if plain else pack_lora)(first, second, memory, places)
        for place, i in self._scales:
            place.copy_(inputs[i])


class Mirrors:
    """A mirror for each instance of the model that a program runs, as long as that lives. (Threads may run one program
    on several instances.)"""

    def __init__(self, mirrored: Sequence[Mirrored], constants: Sequence[torch.Tensor]):
        self._mirrored, self._constants = tuple(mirrored), list(constants)
        self._lock = threading.Lock()
        self._of: dict[int, tuple[weakref.ref[torch.Tensor], Mirror]] = {}

    def of(self, inputs: Sequence[Any]) -> Mirror:
        """That of the instance whose parameters are in a call, as they are now."""
        parameter = inputs[self._mirrored[0].a]
        key, of = id(parameter), self._of
        with self._lock:
            found = of.get(key)
            if found is None or found[0]() is not parameter:
                end = weakref.ref(parameter, lambda _: of.pop(key, None))
                found = of[key] = end, Mirror(self._mirrored, self._constants)
        found[1].follow(inputs)
        return found[1]
