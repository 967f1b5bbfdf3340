"""What ``skipc autotune`` can tune on a GPU: Triton kernels, at the sizes that they have in models."""

from __future__ import annotations

import functools
import math
import timeit
from collections.abc import Callable, Iterator

import torch

from skipc.autotune import Problem, Sample
from skipc.kernels.gpu import lora
from skipc.kernels.gpu.catalog import MODULES
from skipc.kernels.gpu.kernel import Kernel, Launch, forced, launched_with, recorded
from skipc.kernels.gpu.model import choices, floor, predicted
from skipc.kernels.gpu.offline import ARCHS, Arch
from skipc.kernels.tables import Choice
from skipc.tunable import Work

TRIED = 24  # choices of a kernel, at most: those that it may be fastest with
_FLUSHED = 256 << 20  # bytes, more than any second-level cache has

Prepare = Callable[[str], Callable[[], object]]


def gpu_problems(work: Work, arch: str, device: str = "cuda") -> list[Problem]:
    """The problems of Triton kernels: adapters on the layers of ``work``, and the other kernels as in the models of
    :mod:`skipc.kernels.gpu.catalog`; each form once.

    Args:
        arch: of the device.
        device: that samples run on. (Tests take ``"cpu"``, simulated.)
    """
    found: dict[tuple[str, tuple[tuple[str, int], ...]], Problem] = {}
    for dtype in work.dtypes:
        for name, prepare in _examples(work, dtype):
            with recorded(arch) as launches:
                prepare("meta")()
            for launch in launches:
                problem = _problem(f"{launch.kernel.name}: {name}, {dtype}", prepare, launch, arch, device)
                found.setdefault((problem.kernel, tuple(problem.sizes.items())), problem)
    return list(found.values())


def _examples(work: Work, dtype: torch.dtype) -> Iterator[tuple[str, Prepare]]:
    for layer in work.layers:
        for rows in (*work.rows, 512):
            yield f"{layer.name} {layer.k}, {rows} rows", lora.example(rows, layer.k, layer.parts, dtype)
    for module in MODULES:
        if module is not lora:
            yield from module.examples(dtype)


def _problem(label: str, prepare: Prepare, launch: Launch, arch: str, device: str) -> Problem:
    kernel = launch.kernel
    known = ARCHS.get(arch)
    return Problem(
        kernel=kernel.name,
        source=kernel.source,
        sizes=launch.sizes,
        default=launch.choice,
        candidates=tuple(_likely(kernel, prepare, launch, known)),
        start=functools.partial(_start, kernel, prepare, device),
        floor=lambda choice: 0.0 if known is None else floor(launch, known),
        moved=launch.moved,
        label=label,
        cuts={"bits": (15, 16, 31, 32), "rows": (1, lora.FEW)},
    )


def _likely(kernel: Kernel, prepare: Prepare, launch: Launch, arch: Arch | None) -> list[Choice]:
    """Choices by what they are guessed to take, the best first."""
    seconds: dict[Choice, float] = {}
    run = prepare("meta")
    for choice in choices(kernel):
        guess = predicted(launched_with(run, kernel, choice, arch.name), arch) if arch is not None else None
        seconds[choice] = kernel.steps(launch.sizes, choice) if guess is None else guess
    return sorted((c for c in seconds if c != launch.choice), key=seconds.__getitem__)[:TRIED]


def cold_clock(device: str) -> Callable[[Callable[[], object]], float]:
    """What takes the seconds of a run on ``device`` that finds nothing of its operands in a cache. (On the CPU, where
    kernels are interpreted, simply those of a run.)"""
    if device == "cpu":
        return lambda run: timeit.timeit(run, number=1)
    other = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def seconds(run: Callable[[], object]) -> float:
        other.zero_()  # longer than the host takes to launch what is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3  # type: ignore[no-any-return]

    return seconds


def _start(kernel: Kernel, prepare: Prepare, device: str) -> Callable[[Choice], Sample]:
    """Samples run a launch as a step of a model does, which finds nothing of it in a cache."""
    run, cold = prepare(device), cold_clock(device)

    def sampler(choice: Choice) -> Sample:
        def launched() -> None:
            with forced({kernel.name: choice}):
                run()

        try:
            launched()  # compiles
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "triton":
                raise
            return lambda: math.inf  # more shared memory or registers than there are

        return lambda: cold(launched)

    return sampler
