"""The outline lowering: a graph becomes distinct regions and a host program that calls them.

The host program branches in Python, so a plan changes nothing that was compiled, and skipping a site costs nothing at
all: its variable takes the value that went in.
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import sympy
import torch
from skipc.passes.branch_spans import Spans
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import constants_of, copy_graph, fake_mode_of
from skipc.passes.hidden_layers import hidden_layer
from skipc.passes.lowering.arms import ArmBuilder, ArmGraph
from skipc.passes.lowering.compaction import gather_of, live_of, queries_of, with_guards
from skipc.passes.lowering.inductor import Compiled, compile_region, overlapped_builds
from skipc.passes.lowering.measuring import measure, points_of
from skipc.passes.lowering.predicated import predicated
from skipc.passes.lowering.regions import Region, as_it_is
from skipc.passes.lowering.structure import structure_of, translate
from skipc.passes.manager import PassManager
from skipc.passes.ops import in_model, is_parameter_like, path_of, tensor, tensors
from skipc.passes.partition import Partition, Slot
from skipc.passes.residual import Streams
from skipc.passes.substitute_weights import weight_name
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from skipc.ir.config import Config
from skipc.ir.program import Arm, Gather, Layout, ProgramSpec, Queries, Size, Step, Var
from skipc.ir.site import Site, SiteKind

_SKIPPED = {"project": "skipped", "none": "dropped", "copy": "copied"}


class Outline:
    """Lowers one graph. After construction, :attr:`spec` and :attr:`regions` describe the program; :meth:`compile`
    makes the regions callable."""

    def __init__(self, gm: fx.GraphModule, streams: Streams, manager: PassManager):
        self.gm, self.manager = gm, manager
        self.flow = Dataflow(gm.graph)
        self.mode: FakeTensorMode | None = fake_mode_of(gm.graph)
        self.partition = Partition(gm.graph, self.flow, streams.junctions)
        self.builder = ArmBuilder(self.partition)
        self.names = _variable_names(gm.graph, self.partition)
        self.constants = constants_of(gm.graph)
        self.regions: list[Region] = []
        self._by_structure: dict[str, int] = {}
        self._symbols_of_call: list[tuple[int, list[sympy.Symbol]]] = []
        self._symbols_of_queries: dict[str, list[sympy.Symbol]] = {}
        self._moments: set[str] = set()  # names of variables
        sites = self._sites()  # before regions are made of the arms' graphs, and rewritten
        steps = self._steps()
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        output = next(iter(reversed(gm.graph.nodes)))
        self.spec = ProgramSpec(
            inputs=tuple(self.names[n] for n in placeholders),
            steps=_with_releases(
                steps, {self.names[n] for n in output.all_input_nodes}, {self.names[n] for n in placeholders}
            ),
            outputs=tuple(self._output(v) for v in output.args[0]),  # type: ignore[union-attr]
            sites=sites,
            parameters=tuple(i for i, n in enumerate(placeholders) if is_parameter_like(n)),
            weights=tuple((name, i) for i, n in enumerate(placeholders) if (name := weight_name(n)) is not None),
            exposed=self._exposed(streams, output),
            extent=_extent(tensor(streams.junctions[-1].add), placeholders),
            batch=_extent(_with_rows(streams), placeholders)[0],
            reads=any(free_unbacked_symbols(n.meta.get("example_value")) for n in self.flow.nodes),
        )

    def _exposed(self, streams: Streams, output: fx.Node) -> tuple[int, ...]:
        """Positions of outputs that are points of a stream, or views of one."""
        points = [n for j in streams.junctions for n in (j.add, j.point, j.shortcut)]
        storages = frozenset().union(*(self.flow.storages[p] for p in points)) - self.flow.input_storages
        return tuple(
            i
            for i, v in enumerate(output.args[0])  # type: ignore[arg-type,union-attr]
            if isinstance(v, fx.Node) and self.flow.storages[v] & storages
        )

    def _output(self, value: Any) -> Any:
        return Var(self.names[value]) if isinstance(value, fx.Node) else value

    def _steps(self) -> list[Step]:
        steps = []
        for slot in self.partition.slots:
            points = self._stream(slot)
            stream = (self.names[points[0]], self.names[points[1]]) if points else None
            run, *skip = self.builder.arms(slot)
            arms = (self._arm(slot, run, measured=points), *(self._arm(slot, arm) for arm in skip))
            if arms[0].region is None and not arms[0].copies:
                continue
            sites = tuple(t.name for t in slot.junction.terms) if slot.junction else ()
            scalable = self._scalable(slot)
            queries = self._queries(slot) if self.manager.ctx.config.compact_queries and scalable else None
            moments = next((n for n in arms[0].outputs if n in self._moments), None)
            steps.append(Step(slot.label, sites, arms, (), stream, scalable, moments, queries=queries))
        return steps

    def _queries(self, slot: Slot) -> Queries | None:
        arm = self.builder.queries(slot)
        found = queries_of(arm, tensor(slot.entry)) if arm is not None else None
        if arm is None or arm.graph is None or found is None:
            return None
        self._symbols_of_queries[slot.label] = structure_of(arm.graph, self.gm)[1]
        return Queries(self._arm(slot, arm, "attention_queries"), *found)

    def _gather(self, step: Step) -> Gather | None:
        region = step.arms[0].region
        if region is None or step.stream is None:
            return None
        nodes = {name: node for node, name in self.names.items()}
        parameters = {self.spec.inputs[i] for i in self.spec.parameters}
        values = {n: nodes[n].meta.get("example_value") for n in step.arms[0].inputs if n not in parameters}
        kinds = [site.kind for site in self.spec.sites if site.name in step.sites]
        return gather_of(step, kinds, values, tensor(nodes[step.stream[0]]), self.regions[region])

    def _scalable(self, slot: Slot) -> bool:
        if slot.junction is None or len(slot.junction.terms) != 1 or self._stream(slot) is None:
            return False
        add, escapes = slot.junction.add, self.builder.escapes(slot)
        return add in escapes and not any(e is not add and self.flow.depends(e, add) for e in escapes)

    def _stream(self, slot: Slot) -> tuple[fx.Node, fx.Node] | None:
        """The stream before and after the sites of ``slot``: their sum, or what a norm makes of it if only that is seen
        outside."""
        if slot.junction is None or slot.entry is None or slot.entry.op == "get_attr":
            return None
        escapes = self.builder.escapes(slot)
        following = [s.entry for s in self.partition.slots[slot.index + 1 :]]
        after = next((n for n in (slot.junction.add, *following) if n in escapes), None)
        return (slot.entry, after) if after is not None else None

    def _arm(self, slot: Slot, arm: ArmGraph, name: str = "", measured: tuple[fx.Node, fx.Node] | None = None) -> Arm:
        """``arm`` by names. ``measured``: points of the stream whose moments it may return."""
        points = points_of(arm, *measured, self.flow) if measured is not None and slot.junction else None
        region = None if arm.graph is None else self._region(slot, arm, name, points)
        named: Callable[[fx.Node], str] = self.names.__getitem__
        moments = []
        if region is not None and points is not None and self.regions[region].measures:
            moments.append(_unused(f"{named(arm.outputs[points[1]])}_moments", self._taken(), "_"))
            self._moments.update(moments)
        return Arm(
            skipped=arm.skipped,
            kv=arm.kv,
            region=region,
            inputs=tuple(map(named, arm.inputs)),
            layouts=tuple(map(_layout, arm.inputs)),
            outputs=(*map(named, arm.outputs), *moments),
            copies=tuple((named(a), named(b)) for a, b in arm.copies),
            refused=arm.refused,
            late=region is not None and self.regions[region].interpreted and self._unseen(slot, arm),
        )

    def _unseen(self, slot: Slot, arm: ArmGraph) -> bool:
        """True if no later slot, and no caller through the outputs, sees what ``arm`` does: it writes to inputs of the
        graph that nothing touches again. Such an arm is a few cheap calls, each of which costs ten times more with the
        processor's caches full of weights than one after the other at the end of the program."""
        if arm.outputs or any(n.op != "placeholder" for n in arm.inputs):
            return False
        terms = [t for t in slot.junction.terms if t.name in arm.skipped] if slot.junction else []
        if arm.kv != "none" and self.builder.droppable(slot, terms):
            return False  # a later arm may copy the keys that it writes
        mine = frozenset().union(*(self.flow.storages[n] for n in arm.inputs))
        place = self.partition.place
        return not any(
            mine & frozenset().union(*(self.flow.storages[m] for m in (n, *n.all_input_nodes)))
            for n in self.flow.nodes
            if place.get(n, -1) > slot.index or n.op == "output"
        )

    def _taken(self) -> set[str]:
        return {*self.names.values(), *self._moments, *(r.name for r in self.regions)}

    def _region(self, slot: Slot, arm: ArmGraph, name: str, points: tuple[int, int] | None) -> int:
        """Index of the region for ``arm``: an equal one that exists, or a new one. ``points``: see :func:`measure`."""
        assert arm.graph is not None
        key, symbols = structure_of(arm.graph, self.gm)
        key += f"\nmoments of {points}"
        if (index := self._by_structure.get(key)) is not None:
            self.regions[index].calls += 1
            self._symbols_of_call.append((index, symbols))
            return index
        kinds = (
            "_".join(t.kind.value for t in slot.junction.terms if t.name not in arm.skipped) if slot.junction else ""
        )
        if arm.skipped:
            assert slot.junction is not None
            gone = "_".join(t.kind.value for t in slot.junction.terms if t.name in arm.skipped)
            kinds = f"{kinds}_without_{gone}" if kinds else f"{gone}_{_SKIPPED[arm.kv]}"
        base = name or kinds or slot.label
        region = Region(
            _unused(base, self._taken(), "_"),
            fx.GraphModule(self.gm, arm.graph),
            symbols,
            calls=1,
            rare=arm.kv == "copy",
        )
        if not arm.skipped and points is not None:
            region.predicated = predicated(region.gm)  # before passes take adapters apart
        self.manager.run_region(region.gm, region.name)
        if points is not None:
            measure(region, points)
        self.regions.append(region)
        self._by_structure[key] = len(self.regions) - 1
        return len(self.regions) - 1

    def _sites(self) -> tuple[Site, ...]:
        sites, spans = [], Spans(self.flow, [s.junction for s in self.partition.slots if s.junction is not None])
        for slot in self.partition.slots:
            for term in slot.junction.terms if slot.junction else ():
                private = self._private(slot, term.name)
                writes = self.builder.droppable(slot, [term])
                returned = self.builder.kept(slot, [term])
                slice_size = len(self.builder.slice_of(slot, [*writes, *returned]))
                span = spans.of(term, slot.junction)  # type: ignore[arg-type]
                stream = tensor(slot.junction.point)  # type: ignore[union-attr]
                sites.append(
                    Site(
                        name=term.name,
                        kind=term.kind,
                        layer=term.layer,
                        stream=slot.junction.stream,  # type: ignore[union-attr]
                        nodes=private,
                        effect_nodes=slice_size,
                        effects=tuple(map(_written_name, writes)),
                        returned=len(returned),
                        hidden=hidden_layer(term),
                        source=span.source if span is not None else None,
                        dtype=str(stream.dtype).removeprefix("torch.") if stream is not None else "",
                    )
                )
        return tuple(sites)

    def _private(self, slot: Slot, name: str) -> int:
        """How many operations an arm without the site saves."""
        assert slot.junction is not None
        run = self.builder.build(slot, [], "project")
        skip = self.builder.build(slot, [t for t in slot.junction.terms if t.name == name], "project")
        sizes = [0 if a.graph is None else sum(n.op.startswith("call") for n in a.graph.nodes) for a in (run, skip)]
        return sizes[0] - sizes[1]

    # -- compilation --------------------------------------------------------------------------------------------------

    def compile(self, config: Config) -> list[Compiled]:
        """Compile every distinct region once; evaluate its guards for each place that shares it."""
        on_cpu = all(t.device.type == "cpu" for n in self.flow.nodes for t in tensors(n))
        with overlapped_builds() if on_cpu else nullcontext():
            for region in self.regions:
                self._compile(region, config)
        self._check_shared_guards()
        steps = tuple(
            replace(s, gather=self._gather(s), queries=self._guarded(s), live=self._live(s)) for s in self.spec.steps
        )
        self.spec = replace(self.spec, steps=steps, regions=tuple(r.info() for r in self.regions))
        return [r.function for r in self.regions if r.function is not None]

    def _live(self, step: Step) -> int | None:
        region = step.arms[0].region
        return live_of(self.regions[region]) if region is not None and step.scalable else None

    def _guarded(self, step: Step) -> Queries | None:
        queries = step.queries
        if queries is None or queries.arm.region is None:
            return None
        region = self.regions[queries.arm.region]
        return with_guards(queries, translate(region.guards, self._symbols_of_queries[step.label], region.symbols))

    def _compile(self, region: Region, config: Config) -> None:
        if region.interpreted:
            region.function = as_it_is(region.gm)
            return
        shape_env = self.mode.shape_env if self.mode is not None else None
        before = len(shape_env.guards) if shape_env is not None else 0
        start = time.perf_counter()
        # Inductor takes the graph over and rewrites it; explain still wants to print it.
        # Regions of fixed sizes are checked by the program, once, instead of by themselves, at every call.
        region.function = compile_region(copy_graph(region.gm), config, checked=bool(region.symbols))
        region.seconds = time.perf_counter() - start
        if shape_env is not None:
            region.guards = [g.expr for g in shape_env.guards[before:]]

    def _check_shared_guards(self) -> None:
        """Guards that compiling a region put on its own symbols must hold for every other place that calls it; asking
        adds them to Dynamo's guards. (A place where one fails would be a place with other sizes: none is known.)"""
        if self.mode is None or self.mode.shape_env is None:
            return
        for index, symbols in self._symbols_of_call:
            region = self.regions[index]
            if symbols == region.symbols:
                continue
            for guard in translate(region.guards, symbols, region.symbols):
                if not self.mode.shape_env.evaluate_expr(guard):
                    raise RuntimeError(f"region {region.name} is shared by places of different sizes: {guard}")


def _with_rows(streams: Streams) -> torch.Tensor | None:
    """The last point of a stream that is of batch and tokens. (Some models take all tokens together in between.)"""
    values = (tensor(j.add) for j in reversed(streams.junctions))
    return next((v for v in values if v is not None and v.dim() == 3), None)


def _extent(stream: torch.Tensor | None, placeholders: list[fx.Node]) -> tuple[Size, Size]:
    """Where to read off batch and tokens of a stream (of an encoder and a decoder, the last is the decoder's)."""
    if stream is None or stream.dim() != 3:
        return None, None

    def find(size: Any) -> Size:
        if isinstance(size, int):
            return size
        for i, node in enumerate(placeholders):
            given = node.meta.get("example_value")
            sizes = given.shape if isinstance(given, torch.Tensor) else ()
            for dim, other in enumerate(sizes):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return i, dim
            if isinstance(given, torch.SymInt) and given.node.expr == size.node.expr:
                return i, -1
        return None

    return find(stream.shape[0]), find(stream.shape[1])


def _layout(node: fx.Node) -> Layout | None:
    """Sizes and strides of ``node``, if they are the same at every call."""
    value = tensor(node)
    if value is None or not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return None
    return tuple(value.shape), value.stride()


def _written_name(write: fx.Node) -> str:
    target = write.args[0]
    source = str(getattr(getattr(target, "_dynamo_source", None), "name", None) or getattr(target, "name", target))
    return re.sub(r"^\['([^']*)'\]", r"\1", re.sub(r"^L\['(?:kwargs|args|self)'\]\.?", "", source))


def _unused(wish: str, taken: set[str], joint: str) -> str:
    """``wish``, numbered if it is taken."""
    return wish if wish not in taken else next(n for i in itertools.count(2) if (n := f"{wish}{joint}{i}") not in taken)


def _variable_names(graph: fx.Graph, partition: Partition) -> dict[fx.Node, str]:
    """Readable, unique Python names: module paths for weights, ``x0, x1, ...`` for the points of the stream."""
    names: dict[fx.Node, str] = {}
    used = {
        "program",
        "inputs",
        "arms",
        "arm",
        "late",
        "region",
        "arguments",
        "constants",
        "prologue",
        "tail",
        *SiteKind,
        *dir(builtins),
        *keyword.kwlist,
    }

    def claim(node: fx.Node, wish: str) -> None:
        wish = re.sub(r"\W+", "_", wish).strip("_") or "value"
        wish = f"v_{wish}" if wish[0].isdigit() else wish
        names[node] = _unused(wish, used, "__")
        used.add(names[node])

    points = dict.fromkeys(s.entry for s in partition.slots if s.entry is not None)
    for i, point in enumerate(points):
        if point.op != "placeholder":
            claim(point, f"x{i}")
    for node in graph.nodes:
        if node in names or node.op in ("output", "get_attr"):
            continue
        if node.op == "placeholder":
            claim(node, in_model(path_of(node)) or node.name)
        else:
            claim(node, node.name)
    return names


def _with_releases(steps: list[Step], kept: set[str], inputs: set[str]) -> tuple[Step, ...]:
    """Note after which step each intermediate value is dead, so that the program lets go of it."""
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        for arm in step.arms:
            for name in (*arm.inputs, *arm.outputs, *(n for pair in arm.copies for n in pair)):
                last[name] = i
    return tuple(
        replace(
            step,
            releases=tuple(sorted(n for n, at in last.items() if at == i and n not in kept and n not in inputs)),
        )
        for i, step in enumerate(steps)
    )
