"""What a launch may take: a guess by which tuners leave out what is not worth measuring, and by which constants are
chosen where nothing can be measured. Never stated as a speed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from skipc.kernels.gpu.kernel import Kernel, Launch
from skipc.kernels.gpu.offline import Arch, Binary
from skipc.kernels.tables import Choice

LATENCY = 0.7e-6  # seconds that a program waits for memory, about what is measured on A100 and H100


def floor(launch: Launch, arch: Arch) -> float:
    """Seconds that no launch can go below: its bytes at the memory's speed, or its operations at the tensor cores'."""
    return max(launch.moved / arch.bandwidth, launch.operations / arch.bf16)


def predicted(launch: Launch, arch: Arch, binary: Binary | None = None) -> float:
    """Seconds that it may take: programs wait for their loads, as many at a time as fit on the device. ``binary`` says
    how many that are; without it, four on a multiprocessor."""
    programs = 1
    for n in launch.grid:
        programs *= n
    together = arch.units * (binary.programs(arch) if binary is not None else 4)
    waves = -(-programs // max(together, 1)) if together else float("inf")
    return max(floor(launch, arch), waves * launch.kernel.steps(launch.sizes, launch.choice) * LATENCY)


def choices(kernel: Kernel) -> Iterator[Choice]:
    """All that a tuner may try."""
    names = [name for name in kernel.space if name not in ("warps", "stages")]
    for values in itertools.product(*(kernel.space[name] for name in (*names, "warps", "stages"))):
        *constants, warps, stages = values
        yield Choice(constants=dict(zip(names, constants, strict=True)), warps=warps, stages=stages)
