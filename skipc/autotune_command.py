"""``skipc autotune``: what is to be tuned, progress, and a table of what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from skipc import autotune as engine
from skipc.kernels.tables import Choice
from skipc.loading import load_model, load_outline
from skipc.tunable import Layer, Work, kind_of, layers_of

console = Console(width=140)


def layers_spelled(shapes: Sequence[str]) -> tuple[Layer, ...]:
    """Layers as the command line has them: ``K,N``, or ``K,N+N+N`` for several that share an input.

    Raises:
        ValueError: for anything else.
    """
    layers = []
    for text in shapes:
        k, _, n = text.partition(",")
        parts = n.split("+")
        if not all(number.strip().isdecimal() and int(number) > 0 for number in (k, *parts)):
            raise ValueError(f"{text!r} is no shape: write K,N or K,N+N+N")
        layers.append(Layer("linear", int(k), tuple(int(number) for number in parts)))
    return tuple(layers)


def layers_named(name: str) -> tuple[Layer, ...]:
    """The linear layers of a model, ``name`` being as of :func:`skipc.loading.load_model`.

    Raises:
        ValueError: if there is no such model, or it takes no token ids.
    """
    try:
        return _layers(load_outline(name))
    except (RuntimeError, NotImplementedError, AttributeError):  # not every model can do without numbers
        model, _ = load_model(name)
    try:
        return _layers(model)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} does not run on a token id: {error}; give --shape instead") from error


def _layers(model: torch.nn.Module) -> tuple[Layer, ...]:
    return layers_of(model, input_ids=torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device))


def autotune(device: str, work: Work, *, again: bool = False, seconds: float = float("inf")) -> dict[str, Any]:
    """Tune, say how it went, and return the figures.

    Raises:
        ConfigError: for a device that nothing is tuned on, and a file that is no table.
    """
    kind = kind_of(device)
    problems, arch = kind.problems(work), kind.arch()
    results: list[engine.Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(problems))
        for result in engine.autotune(problems, arch, kind.name(), again=again, seconds=seconds):
            results.append(result)
            progress.update(task, advance=1, description=result.problem.label)
    _print(results, kind.name())
    counts = Counter("known" if r.known else "better" if r.choice != r.problem.default else "kept" for r in results)
    left = len(problems) - len(results)
    console.print(
        f"{counts['better']} of {counts['better'] + counts['kept']} measured shapes have better constants than the "
        f"default; {counts['known']} were in the table already"
        + (f", and time was up before {left} others: run this again" if left else "")
    )
    path = engine.path_of(arch)
    console.print(f"table: {path}" if path.exists() else "no table was written", soft_wrap=True)
    return {
        "arch": arch,
        "device": kind.name(),
        "table": str(path),
        "left": left,
        "shapes": [_figures(result) for result in results],
    }


def _figures(result: engine.Result) -> dict[str, Any]:
    problem = result.problem
    return {
        "kernel": problem.kernel,
        "label": problem.label,
        "sizes": dict(problem.sizes),
        "known": result.known,
        "default": dict(problem.default.constants),
        "choice": dict(result.choice.constants),
        "finalist": dict(result.finalist.constants) if result.finalist is not None else None,
        "default_s": result.default_s,
        "best_s": result.best_s,
        "ratio": result.ratio,
        "low": result.low,
        "high": result.high,
        "tried": result.tried,
        "moved": problem.moved,
    }


def _print(results: Sequence[engine.Result], device: str) -> None:
    table = Table(title=f"{device}: time of the best candidate against the default's, with 95 % intervals")
    table.add_column("shape")
    for column in ("default, us", "chosen, us", "candidate / default", "GB/s"):
        table.add_column(column, justify="right")
    table.add_column("chosen")
    for r in results:
        chosen = "default" if r.choice == r.problem.default else shown(r.choice)
        if r.default_s is None or r.best_s is None:
            table.add_row(r.problem.label, "", "in the table", "", "", chosen)
            continue
        compared = f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]" if r.finalist is not None else "none can be better"
        times = f"{r.default_s * 1e6:.1f}", f"{r.best_s * 1e6:.1f}", compared, f"{r.problem.moved / r.best_s / 1e9:.1f}"
        table.add_row(r.problem.label, *times, chosen)
    console.print(table)


def shown(choice: Choice) -> str:
    """Constants in a line; warps and stages where they are not the usual ones."""
    plain = Choice(constants={})
    extra = [
        f"{name} {getattr(choice, name)}"
        for name in ("warps", "stages")
        if getattr(choice, name) != getattr(plain, name)
    ]
    return ", ".join([f"{name} {value}" for name, value in choice.constants.items()] + extra)
