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
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.fx_edit import copy_graph
from skipc.passes.ops import same_sizes, tensors, written_arguments
from skipc.passes.pipeline import PIPELINE, REGION_PIPELINE
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
    """Runs ``passes`` in order over a copy of a Dynamo graph, and ``region_passes`` over each region cut from it.

    Set ``SKIPC_DUMP=directory`` to get each stage as readable code.

    Raises:
        ConfigError: if ``config.disable_passes`` names no pass, or one that cannot be left out.
        PassError: if a pass breaks an invariant (see :mod:`skipc.passes`).
    """

    def __init__(
        self,
        ctx: PassContext,
        passes: tuple[type[Pass], ...] = PIPELINE,
        region_passes: tuple[type[Pass], ...] = REGION_PIPELINE,
        dump: str | None = None,
    ):
        self.ctx = ctx
        self.passes, self.region_passes = _enabled(passes, region_passes, ctx.config.disable_passes)
        self._records: dict[str, PassRecord] = {}
        directory = dump if dump is not None else os.environ.get("SKIPC_DUMP")
        self.dump = Dump(Path(directory)) if directory else None

    @property
    def records(self) -> list[PassRecord]:
        """One record a pass; those of a region pass are summed over regions."""
        return list(self._records.values())

    def run(self, gm: fx.GraphModule) -> fx.GraphModule:
        """A transformed copy of ``gm``; ``gm`` itself stays as it was."""
        gm = copy_graph(gm)
        if self.dump:
            self.dump.graph(gm, "input", "as handed over by Dynamo")
        self._apply(gm, self.passes, "")
        if self.dump:
            self.dump.write("config.json", self.ctx.config.model_dump_json(indent=1))
        return gm

    def run_region(self, gm: fx.GraphModule, name: str) -> None:
        """Transform one region in place."""
        self._apply(gm, self.region_passes, f"{name}.")

    def _apply(self, gm: fx.GraphModule, passes: tuple[type[Pass], ...], prefix: str) -> None:
        before, effects = signature(gm.graph), _count_effects(gm.graph)
        changed = False
        for kind in passes:
            start = time.perf_counter()
            result = kind().run(gm, self.ctx)
            elapsed = (time.perf_counter() - start) * 1e3
            changed |= result.changed
            if result.changed:
                self._check(gm, kind.name, before, effects)
            self._note(kind.name, elapsed, result, len(gm.graph.nodes))
            log.debug("%s%s: %d matched, %.1f ms", prefix, kind.name, result.matched, elapsed)
            for note in result.notes:
                log.debug("%s%s: %s", prefix, kind.name, note)
            if self.dump and (result.changed or not prefix):
                stage = f"after {kind.name}: {result.matched} matched, {elapsed:.1f} ms"
                self.dump.graph(gm, prefix + kind.name, stage)
        if changed:
            gm.recompile()
        if self.dump:
            self.dump.write("passes.json", json.dumps([asdict(r) for r in self.records], indent=1))

    def _note(self, name: str, elapsed: float, result: PassResult, nodes: int) -> None:
        old = self._records.get(name, PassRecord(name, 0.0, 0, False, 0))
        self._records[name] = PassRecord(
            name,
            old.milliseconds + elapsed,
            old.matched + result.matched,
            old.changed or result.changed,
            old.nodes + nodes,
            tuple(dict.fromkeys((*old.notes, *result.notes))),
        )

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
    seen: list[Any] = [n.name for n in graph.nodes if n.op == "placeholder" and "constant" not in n.meta]
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
    return sum(arg.op == "placeholder" for n in graph.nodes for arg in written_arguments(n))


def _enabled(
    passes: tuple[type[Pass], ...], region_passes: tuple[type[Pass], ...], disabled: tuple[str, ...]
) -> tuple[tuple[type[Pass], ...], tuple[type[Pass], ...]]:
    known = {p.name: p for p in (*passes, *region_passes)}
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
    return kept, tuple(p for p in region_passes if p.name not in disabled)


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
