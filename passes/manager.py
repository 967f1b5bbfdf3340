"""Runs passes: owns copying, timing, checks, dumps, provenance and logging, so that a pass holds only its rewrite."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from skipc.passes.base import Pass, PassContext
from skipc.passes.fx_edit import copy_graph
from skipc.passes.ops import same_sizes, tensors, written_arguments
from skipc.passes.pipeline import PIPELINE
from torch import fx

from skipc.ir.errors import ConfigError, PassError, nearest

log = logging.getLogger("skipc.passes")


@dataclass(frozen=True)
class PassRecord:
    """One line of a compilation's history."""

    name: str
    milliseconds: float
    matched: int
    changed: bool
    nodes: int
    notes: tuple[str, ...] = ()


class PassManager:
    """Runs ``passes`` in order over a copy of a Dynamo graph.

    Set ``SKIPC_DUMP=directory`` to get each stage as readable code.

    Raises:
        ConfigError: if ``config.disable_passes`` names no pass, or one that cannot be left out.
        PassError: if a pass breaks an invariant (see :mod:`skipc.passes`).
    """

    def __init__(self, ctx: PassContext, passes: tuple[type[Pass], ...] = PIPELINE, dump: str | None = None):
        self.ctx = ctx
        self.passes = _enabled(passes, ctx.config.disable_passes)
        self.records: list[PassRecord] = []
        directory = dump if dump is not None else os.environ.get("SKIPC_DUMP")
        self.dump = Dump(Path(directory)) if directory else None

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A transformed copy of ``gm``; ``gm`` itself stays as it was."""
        gm = copy_graph(gm)
        if self.dump:
            self.dump.graph(gm, "input", "as handed over by Dynamo")
        before, effects = signature(gm.graph), _count_effects(gm.graph)
        for kind in self.passes:
            start = time.perf_counter()
            result = kind().run(gm, self.ctx)
            elapsed = (time.perf_counter() - start) * 1e3
            if result.changed:
                self._check(gm, kind.name, before, effects)
            record = PassRecord(kind.name, elapsed, result.matched, result.changed, len(gm.graph.nodes), result.notes)
            self.records.append(record)
            log.debug("%s: %d matched, %.1f ms", kind.name, result.matched, elapsed)
            for note in result.notes:
                log.debug("%s: %s", kind.name, note)
            if self.dump:
                self.dump.graph(gm, kind.name, f"after {kind.name}: {result.matched} matched, {elapsed:.1f} ms")
        if any(r.changed for r in self.records):
            gm.recompile()
        if self.dump:
            self.dump.write("passes.json", json.dumps([asdict(r) for r in self.records], indent=1))
            self.dump.write("config.json", self.ctx.config.model_dump_json(indent=1))
        return gm

    def _check(self, gm: fx.GraphModule, name: str, before: list[Any], effects: int) -> None:
        try:
            gm.graph.lint()
        except Exception as error:
            raise PassError(f"{name} left a malformed graph: {error}") from error
        if not same_signature(signature(gm.graph), before):
            raise PassError(f"{name} changed the inputs or outputs of the graph")
        if _count_effects(gm.graph) < effects:
            raise PassError(f"{name} dropped a write to an input")
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_method") and "example_value" not in node.meta and node.users:
                raise PassError(f"{name} made {node.name} without an example value")


def signature(graph: fx.Graph) -> list[Any]:
    """What the caller of a graph can see: names of placeholders, and dtypes and shapes of outputs."""
    seen: list[Any] = [n.name for n in graph.nodes if n.op == "placeholder"]
    output = next(iter(reversed(graph.nodes)))
    flat, _ = torch.utils._pytree.tree_flatten(output.args)
    for value in flat:
        made = tensors(value) if isinstance(value, fx.Node) else [value]
        seen += [(t.dtype, t.shape) if isinstance(t, torch.Tensor) else t for t in made]
    return seen


def same_signature(a: list[Any], b: list[Any]) -> bool:
    """True if two signatures agree; sizes may be written differently (``s0`` and ``2 * (s0 // 2)``) if known equal."""
    return len(a) == len(b) and all(
        x[0] == y[0] and same_sizes(x[1], y[1])
        if isinstance(x, tuple) and isinstance(y, tuple)
        else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True)
    )


def _count_effects(graph: fx.Graph) -> int:
    return sum(any(arg.op == "placeholder" for arg in written_arguments(n)) for n in graph.nodes)


def _enabled(passes: tuple[type[Pass], ...], disabled: tuple[str, ...]) -> tuple[type[Pass], ...]:
    known = {p.name: p for p in passes}
    for name in disabled:
        if name not in known:
            close = nearest(name, known)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"disable_passes: no pass is called {name!r}{hint}; known: {', '.join(known)}")
        if not known[name].optional:
            raise ConfigError(f"disable_passes: {name!r} cannot be left out; use preset='off' for plain Inductor")
    kept = tuple(p for p in passes if p.name not in disabled)
    for i, p in enumerate(kept):
        missing = set(p.requires) - {q.name for q in kept[:i]}
        if missing:
            raise ConfigError(f"pass {p.name!r} needs {', '.join(sorted(missing))} before it")
    return kept


class Dump:
    """Writes the stages of one compilation under ``SKIPC_DUMP``, one folder a compilation, in the order of stages."""

    def __init__(self, root: Path):
        count = len(list(root.glob("graph_*"))) if root.is_dir() else 0
        self.folder = root / f"graph_{count:03d}"
        self.folder.mkdir(parents=True)
        self.stage = 0

    def graph(self, gm: fx.GraphModule, stage: str, provenance: str) -> None:
        """Write ``gm`` as code, with shapes, under a sortable name."""
        text = gm.print_readable(print_output=False)
        self.write(f"{self.stage:02d}.{stage}.py", f"# {provenance}\n{text}\n")
        self.stage += 1

    def write(self, name: str, text: str) -> None:
        """Write one file."""
        (self.folder / name).write_text(text)
