"""Chooses constants of kernels by measuring them: the engine of ``skipc autotune``, whatever the device.

A :class:`Problem` is a kernel at given sizes of its operands, with the constants that it has by default and those that
may be better. :func:`tune` measures in turns (A B A B ...), so that the machine's drift hits all alike, and first looks
for a finalist. Being the best of many is partly luck, so what it gained then does not count: finalist and default are
measured again, and the default goes only if the whole 95 % interval of the ratio of their medians lies below 1.
:func:`autotune` does so for many problems and keeps what was chosen in a table (:mod:`skipc.kernels.tables`) after
each.

Nothing here runs unless it is asked for: kernels read tables and never measure.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from skipc.calibration.timing import ratio
from skipc.kernels.tables import Choice, Entry, Row, Table, folder, forget

Sizes = tuple[int, ...]
Sample = Callable[[], float]  # runs a kernel, and returns the seconds that one run took

RESOLUTION = 0.01  # smaller gains are not looked for
SCREENING = (4, 8)  # rounds of measuring candidates; after each, the better third goes on
ROUNDS = 40  # of the finalist against the default


@dataclass(frozen=True)
class Problem:
    """A kernel at some sizes, whose constants are to be chosen.

    Attributes:
        kernel: its name in tables; source: the hash of its code.
        sizes: what it is to be chosen for, by the names of the kernel's sizes.
        default: the constants without a table. candidates: others.
        start: allocates operands, and returns what makes a :data:`Sample` of a choice (compiling it, if need be).
            Operands live as long as that does.
        floor: seconds of a run that no choice can go below, such as those of reading the operands once.
        moved: bytes that a run must read and write, each once.
        label: says in words what it is.
        cuts: for sizes at which the kernel changes its nature, the largest values on this side: what was measured on
            one side says nothing of the other.
    """

    kernel: str
    source: str
    sizes: Mapping[str, int]
    default: Choice
    candidates: tuple[Choice, ...]
    start: Callable[[], Callable[[Choice], Sample]]
    floor: Callable[[Choice], float]
    moved: int
    label: str
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def at(self) -> Sizes:
        """The sizes as a tuple."""
        return tuple(self.sizes.values())


@dataclass(frozen=True)
class Result:
    """What became of a problem.

    Attributes:
        choice: the default's constants, or better ones.
        finalist: the best of the candidates; None if none could be better, or nothing was measured now.
        default_s, best_s: median seconds of a run with the default's constants, and with the chosen ones; None if a
            table had them already.
        ratio, low, high: median of the finalist over that of the default, and its 95 % interval.
        tried: how many candidates were measured.
    """

    problem: Problem
    choice: Choice
    finalist: Choice | None = None
    default_s: float | None = None
    best_s: float | None = None
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    tried: int = 0

    @property
    def known(self) -> bool:
        """Whether a table had it already."""
        return self.default_s is None


def measure(samples: dict[Choice, Sample], rounds: int) -> dict[Choice, list[float]]:
    """Seconds of each, taken in turn, every other round in reverse; one round before is not counted."""
    times: dict[Choice, list[float]] = {choice: [] for choice in samples}
    for i in range(rounds + 1):
        for choice in reversed(samples) if i % 2 else samples:
            taken = samples[choice]()
            if i:
                times[choice].append(taken)
    return times


def tune(problem: Problem) -> Result:
    """Choose constants for one problem."""
    sampler = problem.start()
    default = sampler(problem.default)
    now = statistics.median(measure({problem.default: default}, SCREENING[0])[problem.default])
    worth = [c for c in problem.candidates if c != problem.default and problem.floor(c) < now * (1 - RESOLUTION)]
    if not worth:
        return Result(problem, problem.default, None, now, now)
    samples = {choice: sampler(choice) for choice in worth}
    for rounds in SCREENING:
        medians = {choice: statistics.median(t) for choice, t in measure(samples, rounds).items()}
        best = sorted(medians, key=medians.__getitem__)[: math.ceil(len(medians) / 3)]
        samples = {choice: samples[choice] for choice in best}
    finalist = best[0]
    times = measure({problem.default: default, finalist: samples[finalist]}, ROUNDS)
    found, low, high = ratio(times[finalist], times[problem.default])
    choice = finalist if high < 1 else problem.default
    medians = {c: statistics.median(t) for c, t in times.items()}
    return Result(problem, choice, finalist, medians[problem.default], medians[choice], found, low, high, len(worth))


def autotune(
    problems: Sequence[Problem], arch: str, device: str, *, again: bool = False, seconds: float = math.inf
) -> Iterator[Result]:
    """Tune what the table of ``arch`` in :func:`~skipc.kernels.tables.folder` does not have yet, and keep each choice
    there at once: after an interruption, the same call goes on where it was.

    Args:
        device: said of the table, in words.
        again: measure what the table has, too.
        seconds: no problem is begun later than this.

    Yields:
        a result for each problem, in order, those that the table has included; fewer, if time is up.

    Raises:
        ConfigError: if there is a file that is no table, naming it.
    """
    end = time.monotonic() + seconds
    for problem in problems:
        known = None if again else measured(_entry(arch, problem), list(problem.sizes)).get(problem.at)
        if known is not None:
            yield Result(problem, known)
        elif time.monotonic() < end:
            result = tune(problem)
            _keep(arch, device, problem, result.choice)
            yield result


def path_of(arch: str) -> Path:
    """Where the table of a kind of device is kept."""
    return folder() / f"{arch}.json"


def _entry(arch: str, problem: Problem) -> Entry | None:
    path = path_of(arch)
    entry = Table.read(path).kernels.get(problem.kernel) if path.exists() else None
    return entry if entry is not None and entry.source == problem.source else None


def _keep(arch: str, device: str, problem: Problem, choice: Choice) -> None:
    path = path_of(arch)
    kernels = dict(Table.read(path).kernels) if path.exists() else {}
    points = {**measured(_entry(arch, problem), list(problem.sizes)), problem.at: choice}
    rows = rows_for(points, list(problem.sizes), problem.cuts)
    kernels[problem.kernel] = Entry(source=problem.source, rows=rows)
    Table(arch=arch, measured=device, kernels=kernels).write(path)
    forget()


def measured(entry: Entry | None, names: Sequence[str]) -> dict[Sizes, Choice]:
    """The sizes that rows of a table are for exactly: those that were measured."""
    points: dict[Sizes, Choice] = {}
    for row in entry.rows if entry is not None else ():
        if set(row.when) == set(names) and all(low == high for low, high in row.when.values()):
            points.setdefault(tuple(row.when[name][0] for name in names), row.choice)
    return points


def rows_for(
    points: Mapping[Sizes, Choice], names: Sequence[str], cuts: Mapping[str, tuple[int, ...]]
) -> tuple[Row, ...]:
    """Rows of a table: what was measured, exactly, and behind that ranges for what lies between.

    Ranges are found size by size: each value that was measured holds halfway to its neighbours (in the geometric mean),
    or to half and to twice itself where it has none, and no further than a cut. Of other sizes the table says nothing.
    """
    exact = [_row({n: (size, size) for n, size in zip(names, at, strict=True)}, points[at]) for at in sorted(points)]
    return (*exact, *(row for row in _between(list(points.items()), names, cuts) if row not in exact))


def _row(when: Mapping[str, tuple[int, int]], choice: Choice) -> Row:
    return Row(when=when, constants=choice.constants, warps=choice.warps, stages=choice.stages)


def _between(
    points: list[tuple[Sizes, Choice]],
    names: Sequence[str],
    cuts: Mapping[str, tuple[int, ...]],
    when: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[Row]:
    when = when or {}
    if len(when) == len(names):
        yield _row(when, points[0][1])
        return
    i = len(when)
    for value, ends in ranges({at[i] for at, _ in points}, cuts.get(names[i], ())).items():
        yield from _between([p for p in points if p[0][i] == value], names, cuts, {**when, names[i]: ends})


def ranges(values: Collection[int], cuts: Sequence[int] = ()) -> dict[int, tuple[int, int]]:
    """For each of some positive values the range that it stands for; see :func:`rows_for`."""
    made = {}
    for least, most in pairwise((0, *sorted(cuts), 1 << 62)):
        side = sorted(v for v in values if least < v <= most)
        for before, value, after in zip([0, *side], side, [*side[1:], 0], strict=False):
            low = math.isqrt(before * value) + 1 if before else max(-(-value // 2), least + 1)
            high = math.isqrt(value * after) if after else min(2 * value, most)
            made[value] = low, high
    return made
