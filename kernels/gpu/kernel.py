"""What a Triton kernel is to the rest of skipc, and the one place that launches them.

A launch goes one of three ways, by where its tensors are. On a GPU it runs. On the ``meta`` device nothing runs: what
would have been launched is noted, so that counting launches and compiling for machines that are not at hand need
neither a GPU nor memory, and a wrapper that waited for the device would fail. On the CPU, inside :func:`simulated`,
Triton's interpreter runs it, which tests compare with the reference."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from skipc.kernels.device import on_gpu, simulated, simulated_arch, simulating
from skipc.kernels.tables import Choice, choose

__all__ = [
    "Example",
    "Kernel",
    "Launch",
    "forced",
    "launch",
    "launched_with",
    "on_gpu",
    "pick",
    "random",
    "recorded",
    "simulated",
    "simulating",
]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel and what may be tuned about it.

    Attributes:
        function: of ``triton.jit``.
        sizes: names of the numbers by which rows of a table choose, such as ``rows``; see :mod:`skipc.kernels.tables`.
        space: the constants of the kernel that a table sets, ``warps`` and ``stages`` among them, each with the values
            that a tuner may try.
        default: what an unknown device gets: compiles everywhere.
        helpers: functions of ``triton.jit`` that it calls.
        steps: how many loads a program waits for, one after the other, with these constants for these sizes; by which a
            tuner guesses what is not worth trying.
    """

    name: str
    function: Any
    sizes: tuple[str, ...]
    space: Mapping[str, tuple[int, ...]]
    default: Choice
    helpers: tuple[Any, ...] = ()
    steps: Callable[[Mapping[str, int], Choice], float] = lambda sizes, choice: 8.0

    @functools.cached_property
    def source(self) -> str:
        """A hash of its code, by which a table knows whether it was made for this kernel."""
        text = "\0".join(f.src for f in (self.function, *self.helpers))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


Example = tuple[str, Callable[[str], Callable[[], object]]]
"""A name, and what makes operands as in a real model on a device and returns what launches a kernel on them."""


def random(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Operands of an example."""
    return torch.empty(size, dtype=dtype, device=device).normal_(0.0, 0.02)


@dataclass(frozen=True)
class Launch:
    """A launch that was made, or would have been.

    Attributes:
        kernel: what was launched.
        grid: how many programs.
        arguments: of the kernel, by name, constants included; none if they were not to be kept.
        sizes: what its constants were chosen by.
        choice: the constants.
        moved: bytes that it must read and write, each once.
        operations: floating-point operations.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    sizes: Mapping[str, int]
    choice: Choice
    moved: int
    operations: int


@dataclass
class _Mode:
    arch: str = "sm_90"  # of the `meta` device
    log: list[Launch] | None = None
    keeps: bool = True
    forced: Mapping[str, Choice] = field(default_factory=dict)


_mode: ContextVar[_Mode] = ContextVar("mode", default=_Mode())  # noqa: B039


@contextmanager
def _with(**changes: Any) -> Iterator[_Mode]:
    before = _mode.get()
    token = _mode.set(_Mode(**{**vars(before), **changes}))
    try:
        yield _mode.get()
    finally:
        _mode.reset(token)


@contextmanager
def recorded(arch: str = "sm_90", arguments: bool = True) -> Iterator[list[Launch]]:
    """Launches are in the list, in order.

    Args:
        arch: what tensors of the ``meta`` device are taken to be on.
        arguments: also keep what kernels are given, and with it the memory.
    """
    log: list[Launch] = []
    with _with(log=log, arch=arch, keeps=arguments):
        yield log


@contextmanager
def forced(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Kernels of these names are compiled so, whatever tables say."""
    with _with(forced={**_mode.get().forced, **choices}):
        yield


def launched_with(run: Callable[[], object], kernel: Kernel, choice: Choice, arch: str) -> Launch:
    """The launch of ``kernel`` that ``run``, on tensors of the ``meta`` device, makes with these constants."""
    with recorded(arch) as launches, forced({kernel.name: choice}):
        run()
    return next(launch for launch in launches if launch.kernel is kernel)


@functools.cache
def arch_of_device(index: int) -> str:
    """The architecture of a GPU, as in the name of a table."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_of(t: torch.Tensor) -> str:
    """The architecture that ``t`` is on, as in the name of a table."""
    return arch_of_device(t.device.index or 0) if t.is_cuda else simulated_arch() or _mode.get().arch


def pick(kernel: Kernel, t: torch.Tensor, **sizes: int) -> Choice:
    """The constants of ``kernel`` for these sizes on the device of ``t``."""
    given = _mode.get().forced.get(kernel.name)
    if given is not None:
        return given
    return choose(kernel.name, kernel.source, kernel.default, arch_of(t), tuple(sizes.items()))


def launch(
    kernel: Kernel,
    choice: Choice,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    moved: int,
    operations: int = 0,
) -> None:
    """Launch ``kernel`` with ``arguments`` and the constants of ``choice``.

    Raises:
        RuntimeError: for tensors on a device that no kernel runs on.
    """
    if 0 in grid:
        return
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    mode = _mode.get()
    given = {**arguments, **choice.constants}
    if mode.log is not None:
        mode.log.append(
            Launch(kernel, tuple(grid), given if mode.keeps else {}, dict(sizes), choice, moved, operations)
        )
    device = tensors[0].device
    if device.type == "meta":
        return
    if device.type == "cpu":
        if not simulating():
            raise RuntimeError(f"{kernel.name} is a GPU kernel, and its tensors are on the CPU")
        from skipc.kernels.gpu import interpreting

        interpreting.run(kernel.function, grid, given)
        return
    with torch.cuda.device(device):
        kernel.function[tuple(grid)](**given, num_warps=choice.warps, num_stages=choice.stages)
