"""What ``skipc autotune`` can tune: for each kind of device its kernels, as problems of :mod:`skipc.autotune`."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skipc.autotune import Problem, Sample
from skipc.ir.errors import ConfigError
from skipc.kernels import native, products
from skipc.kernels.chain import ENTRY, NOTHING, BoundChain, Links
from skipc.kernels.linear import max_rows
from skipc.kernels.tables import Choice, Row, cpu_name
from skipc.runtime.huge_pages import back_with_huge_pages

MOST_COPIES = 2048  # of a layer, to be run one after the other; tiny ones are little but calls, wherever weights are


@dataclass(frozen=True)
class Layer:
    """Linear layers that share their input, as kernels run them: ``parts`` are the rows of each weight, ``k`` their
    columns."""

    name: str
    k: int
    parts: tuple[int, ...]

    @property
    def n(self) -> int:
        """Rows of all weights."""
        return sum(self.parts)


# Of decoders with 135 M to 8 B parameters: query, key and value; output; gate and up; down.
COMMON = tuple(
    Layer(name, k, parts)
    for width, keys, inner in ((576, 192, 1536), (1024, 1024, 2816), (2048, 512, 8192), (4096, 1024, 14336))
    for name, k, parts in (
        ("qkv", width, (width, keys, keys)),
        ("o", width, (width,)),
        ("gate+up", width, (inner, inner)),
        ("down", inner, (width,)),
    )
)


@dataclass(frozen=True)
class Work:
    """What to tune for: layers, the dtypes of their weights, and how many rows their input has."""

    layers: tuple[Layer, ...]
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of device: the name of its table, its name in words, and the problems of its kernels."""

    arch: Callable[[], str]
    name: Callable[[], str]
    problems: Callable[[Work], list[Problem]]


def kind_of(device: str) -> Kind:
    """What can be tuned on devices of type ``device``.

    Raises:
        ConfigError: if nothing can.
    """
    if device not in KINDS:
        raise ConfigError(f"no kernels are tuned on {device!r}, but on {' and '.join(KINDS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU here")
    return KINDS[device]


def problems(device: str, work: Work) -> list[Problem]:
    """The problems of ``work`` on devices of type ``device``.

    Raises:
        ConfigError: if kernels cannot be tuned there.
    """
    return kind_of(device).problems(work)


def layers_of(model: torch.nn.Module, **inputs: Any) -> tuple[Layer, ...]:
    """The linear layers of a model, each form once, in the order in which they run. Those that read the same tensor,
    one after the other, are one layer, as passes join them.

    Args:
        inputs: for a call; they and the model may be on the ``meta`` device.
    """
    groups: list[tuple[torch.Tensor, list[tuple[str, torch.nn.Linear]]]] = []

    def note(name: str) -> Callable[[torch.nn.Module, Any], None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            if not groups or groups[-1][0] is not args[0]:
                groups.append((args[0], []))
            groups[-1][1].append((name, module))  # type: ignore[arg-type]

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(note(name.rpartition(".")[2])) for name, module in linears]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    found: dict[tuple[int, tuple[int, ...]], Layer] = {}
    for _, group in groups:
        form = group[0][1].in_features, tuple(module.out_features for _, module in group)
        found.setdefault(form, Layer("+".join(name for name, _ in group), *form))
    return tuple(found.values())


def cpu_problems(work: Work) -> list[Problem]:
    """The problem ``skinny_linear`` of each layer, dtype and number of rows that the native kernels take with vectors:
    in tile registers there is one way to read weights.

    Raises:
        ConfigError: without native kernels, naming the reason, or if there is nothing to tune.
    """
    reason = native.available()
    if reason is not None:
        raise ConfigError(f"there are no native kernels to tune: {reason}")
    tiled = [torch.bfloat16] if native.tiles() else []
    if set(work.dtypes) <= set(tiled):
        raise ConfigError("bf16 layers run in this CPU's tile registers, where there is nothing to tune")
    return [
        _skinny_linear(layer, dtype, rows)
        for dtype in work.dtypes
        if dtype not in tiled
        for layer in work.layers
        for rows in work.rows
        if rows <= max_rows(dtype)
    ]


def _skinny_linear(layer: Layer, dtype: torch.dtype, rows: int) -> Problem:
    moved = layer.n * layer.k * dtype.itemsize
    default = products.default_for(rows)
    shape, kind = f"{layer.k}x{'+'.join(map(str, layer.parts))}", str(dtype).removeprefix("torch.")
    return Problem(
        kernel=products.KERNEL,
        source=products.source(),
        sizes=dict(zip(products.SIZES, (8 * dtype.itemsize, rows, layer.k, layer.n), strict=True)),
        default=default,
        candidates=tuple(choice for choice in products.choices_for(rows) if choice != default),
        start=functools.partial(_start, layer, dtype, rows),
        floor=lambda choice: moved / max(bandwidth(), _Seen.rate),
        moved=moved,
        label=f"{layer.name} {shape} {kind}, {rows} {'row' if rows == 1 else 'rows'}",
        cuts={"dtype_bits": (15, 16, 31, 32), "rows": (1,)},  # one row has a loop of its own
    )


def _start(layer: Layer, dtype: torch.dtype, rows: int) -> Callable[[Choice], Sample]:
    """Samples run a layer as a step of a model does, which finds its weights in no cache: as a chain of copies of it
    that do not fit into any."""
    copies = -(-max(2 * last_cache(), 64 << 20) // (layer.n * layer.k * dtype.itemsize))
    copies = min(copies, MOST_COPIES)
    weights = [[torch.full((n, layer.k), 0.01, dtype=dtype) for n in layer.parts] for _ in range(copies)]
    back_with_huge_pages(w for copy in weights for w in copy)
    links, none = Links(), [None] * len(layer.parts)
    for copy in weights:
        links.linear(ENTRY, NOTHING, (None, copy, none, None, 0.0, None))
    x = torch.full((rows, layer.k), 0.01, dtype=dtype)

    def sampler(choice: Choice) -> Sample:
        chain = BoundChain(links, links.tensors, [])
        with products.using([Row(when={"rows": (rows, rows)}, constants=choice.constants)]):
            chain(x, (), trusted=True)  # asks for the constants, this once

        def sample() -> float:
            start = time.perf_counter()
            chain(x, (), trusted=True)
            taken = (time.perf_counter() - start) / copies
            _Seen.rate = max(_Seen.rate, layer.n * layer.k * dtype.itemsize / taken)
            return taken

        return sample

    return sampler


class _Seen:
    """Bytes per second of the fastest run so far. Plain reads may have been measured in a bad moment; nothing is left
    out for being at the memory's speed that a run has exceeded since."""

    rate = 0.0


@functools.cache
def bandwidth() -> float:
    """Bytes per second that reading memory reaches: the best of some plain reads of 400 MB in huge pages."""
    matrix, vector = torch.full((100_000, 1024), 0.01), torch.full((1024,), 0.01)
    back_with_huge_pages([matrix])
    best = float("inf")
    for read in (lambda: matrix.mv(vector), matrix.sum):
        for _ in range(7):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best


def last_cache() -> int:
    """Bytes of the CPU's largest cache; 32 MB if Linux does not say."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def cpu_words() -> str:
    """This CPU in words, and how many threads torch uses."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def gpu_arch() -> str:
    """The name of the table of the current GPU."""
    from skipc.kernels.gpu.kernel import arch_of_device

    return arch_of_device(torch.cuda.current_device())


def gpu_problems(work: Work) -> list[Problem]:
    """The problems of Triton kernels on the current GPU; see :mod:`skipc.tunable_gpu`."""
    from skipc import tunable_gpu  # imports Triton

    return tunable_gpu.gpu_problems(work, gpu_arch())


KINDS = {
    "cpu": Kind(cpu_name, cpu_words, cpu_problems),
    "cuda": Kind(gpu_arch, lambda: torch.cuda.get_device_name(), gpu_problems),
}
