"""The canonical gated graph: every site behind a conditional branch, in one ordinary FX graph.

It is what the ``cond`` lowering hands to Inductor and AOTInductor, and what the ``outline`` lowering does in host code.
It runs in eager as it is, prints, and exports.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from skipc.kernels.similarity import cosine, stream_moments
from skipc.passes.dataflow import Dataflow
from skipc.passes.fx_edit import fake_mode_of
from skipc.passes.lowering.arms import ArmBuilder, ArmGraph
from skipc.passes.ops import same_sizes, tensor, written_arguments
from skipc.passes.partition import Partition, Slot
from skipc.passes.residual import Streams, Term
from torch import fx

from skipc.ir.errors import PassError
from skipc.ir.program import KVPolicy

GATE_INPUTS = ("skip", "threshold", "closes", "scale", "since", "rule", "valid")
_COND = torch.ops.higher_order.cond


@dataclass(frozen=True)
class GatedGraph:
    """A graph with gates.

    Attributes:
        gm: takes the inputs of the graph it was made of and then :data:`GATE_INPUTS` (see
            :class:`skipc.ir.gating.GateTable`; ``rule`` is an int64 scalar, the index of the batch rule; ``valid`` is
            bool ``[batch, tokens]``). Returns the outputs of that graph, then ``skipped``, bool ``[sites]``, then for
            each of ``measured`` its moments, fp32 ``[..., 3]``, NaN if it was skipped.
        sites: names, in order of execution.
        outputs: how many outputs the graph had.
        measured: numbers of the sites whose similarity is taken.
        layers: for each site that ends a layer, the layer's first: similarities may span a layer, and nothing else.
    """

    gm: fx.GraphModule
    sites: tuple[str, ...]
    outputs: int
    measured: tuple[int, ...]
    layers: dict[int, int]


def insert_gates(gm: fx.GraphModule, streams: Streams, kv: KVPolicy = "project") -> GatedGraph:
    """Put every site of ``gm`` behind a ``torch.ops.higher_order.cond``.

    Before::

        %y : f32[2, 7, 64] = add(%x, %branch)

    After::

        %pred : bool[] = getitem(%skipped, 0)
        %out = cond(%pred, @skip, @run, (%x, %w, %scale))
        %y : f32[2, 7, 64] = getitem(%out, 0)
        %moments : f32[2, 7, 3] = getitem(%out, 1)
        %skipped_1 : bool[60] = ...  # and what reaches its threshold here closes

    A branch holds the addition, since it must not return what it was given. Writes to caches stay in the branches;
    results that are views of an input are made again behind them.

    Raises:
        PassError: if a result cannot be moved out of a branch.
        PlanError: if ``kv`` would leave keys out that somebody reads.
    """
    return _Inserter(gm, streams, kv).build()


@dataclass
class _Cut:
    """One slot on its way into branches.

    Attributes:
        arms: by the names of the terms that they leave out.
        operands: what the branches read.
        values: what they return.
        after: the stream behind the slot, if it can be compared with the one before.
        layer: the stream before the layer, if the slot ends one of several.
    """

    slot: Slot
    terms: list[Term]
    arms: dict[frozenset[str], ArmGraph]
    operands: list[fx.Node]
    values: list[fx.Node]
    after: fx.Node | None
    layer: fx.Node | None

    @property
    def results(self) -> int:
        """How many tensors a branch returns."""
        return len(self.values) + (self.after is not None) + (self.layer is not None)


class _Inserter:
    def __init__(self, gm: fx.GraphModule, streams: Streams, kv: KVPolicy):
        self.gm, self.kv = gm, kv
        self.flow = Dataflow(gm.graph)
        self.partition = Partition(gm.graph, self.flow, streams.junctions)
        self.arms = ArmBuilder(self.partition)
        self.junctions = streams.junctions
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.root = torch.nn.Module()
        terms = [t for slot in self.partition.slots if slot.junction for t in slot.junction.terms]
        self.sites = tuple(t.name for t in terms)
        self.place = {t.name: i for i, t in enumerate(terms)}
        self.entries: dict[tuple[int, int], tuple[int, fx.Node]] = {}  # first site of each layer, and its stream
        self.layers: dict[int, int] = {}
        self.moments: dict[int, fx.Node] = {}
        self.branches = 0

    def build(self) -> GatedGraph:
        for node in self.flow.nodes:
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node.name, node.meta.get("example_value"))
        self._gate_inputs()
        ends = self._layer_ends()
        for slot in self.partition.slots:
            if slot.junction is None:
                for node in slot.nodes:
                    self.env[node] = self._copy(node)
            else:
                self._gated(slot, ends)
        output = self.flow.nodes[-1]
        results = fx.map_arg(output.args[0], self._lift)
        self.graph.output((*results, self.skipped, *self.moments.values()))  # type: ignore[misc]
        made = self._module(self.root, self.graph)
        made.graph.lint()
        self._check_writes(made)
        return GatedGraph(made, self.sites, len(output.args[0]), tuple(self.moments), dict(self.layers))  # type: ignore[arg-type]

    # -- inputs -------------------------------------------------------------------------------------------------------

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"example_value": value}
        node._dynamo_source = None  # type: ignore[attr-defined]
        return node

    def _gate_inputs(self) -> None:
        n = len(self.sites)
        mode = fake_mode_of(self.gm.graph)
        stream = tensor(self.junctions[-1].add)
        assert mode is not None
        assert stream is not None
        with mode:
            values = (
                torch.zeros(n, dtype=torch.bool), torch.zeros(n), torch.zeros(n, n, dtype=torch.bool), torch.ones(n),
                torch.zeros(n, dtype=torch.long), torch.zeros((), dtype=torch.long),
                stream.new_ones(stream.shape[:-1], dtype=torch.bool, device="cpu"),
            )  # fmt: skip
        made = [self._placeholder(f"gate_{name}", v) for name, v in zip(GATE_INPUTS, values, strict=True)]
        self.skipped, self.threshold, self.closes, self.scale, self.since, self.rule, self.valid = made

    def _layer_ends(self) -> dict[tuple[int, int], str]:
        return {(slot.junction.stream, t.layer): t.name for slot in self.partition.slots if slot.junction
                for t in slot.junction.terms}  # fmt: skip

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _lift(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in self.env:
            self.env[node] = self._copy(node)
        return self.env[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        made = self.graph.node_copy(node, self._lift)
        made.meta = dict(node.meta)
        return made

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    # -- one slot -----------------------------------------------------------------------------------------------------

    def _gated(self, slot: Slot, ends: dict[tuple[int, int], str]) -> None:
        assert slot.junction is not None
        assert slot.entry is not None
        terms = slot.junction.terms
        escapes = self.arms.escapes(slot)
        views = [e for e in escapes if self.flow.storages[e] & self.flow.input_storages]
        values = [e for e in escapes if e not in views]
        chosen = {frozenset(t.name for t in gone): self.arms.allowed(slot, list(gone), self.kv)
                  for count in range(len(terms) + 1) for gone in combinations(terms, count)}  # fmt: skip
        read = dict.fromkeys([slot.entry, *(i for arm in chosen.values() for i in arm.inputs)])
        read.update((b, None) for arm in chosen.values() for _, b in arm.copies if b not in values)
        operands = [n for n in read if n.op != "get_attr"]
        numbers = [self.place[t.name] for t in terms]
        after = self._after(slot, values)
        first = [
            self.entries.setdefault((slot.junction.stream, t.layer), (self.place[t.name], slot.entry)) for t in terms
        ]
        spans = [f for f, t in zip(first, terms, strict=True) if ends[slot.junction.stream, t.layer] == t.name]
        span = spans[-1] if spans and spans[-1][0] not in numbers else None
        layer = span[1] if span is not None and after is not None else None
        if layer is not None and layer not in operands:
            operands.append(layer)
        cut = _Cut(slot, terms, chosen, operands, values, after, layer)
        arguments = [*map(self._lift, operands), self.scale, self.skipped]
        result = self._conditional(cut, frozenset(), 0, self.graph, self.root, arguments)
        for i, value in enumerate(values):
            self.env[value] = self._call(operator.getitem, result, i)
            self.env[value].meta = {"example_value": value.meta.get("example_value")}
        for view in views:
            self.env[view] = self._outside(view)
        if after is not None:
            found = self._call(operator.getitem, result, len(values))
            of_layer = self._call(operator.getitem, result, len(values) + 1) if layer is not None else None
            for number in numbers:
                if span is not None and layer is not None:
                    self.layers[number] = span[0]
                self._measured(slot, number, found, of_layer)

    def _after(self, slot: Slot, values: Sequence[fx.Node]) -> fx.Node | None:
        """The stream behind the slot, if it can be compared with the one before: their sum, or what is made of it."""
        assert slot.junction is not None
        assert slot.entry is not None
        following = [s.entry for s in self.partition.slots[slot.index + 1 :]]
        after = next((n for n in (slot.junction.add, *following) if n in values), None)
        before, behind = tensor(slot.entry), None if after is None else tensor(after)
        if before is None or behind is None or slot.entry.op == "get_attr":
            return None
        comparable = before.is_floating_point() and before.dim() >= 2 and same_sizes(before.shape, behind.shape)
        return after if comparable else None

    def _conditional(
        self,
        cut: _Cut,
        gone: frozenset[str],
        depth: int,
        graph: fx.Graph,
        root: torch.nn.Module,
        given: list[fx.Node],
    ) -> fx.Node:
        """A conditional in ``graph`` on term number ``depth``; its branches hold those on the terms behind it.
        ``given`` is what stands there for the operands, then scales and gates of all sites. (Elements of them would be
        views of one tensor, which operands must not be.)"""
        made = []
        gate = graph.call_function(operator.getitem, (given[-1], self.place[cut.terms[depth].name]))
        for skips in (True, False):
            now = gone | {cut.terms[depth].name} if skips else gone
            sub, inner = fx.Graph(), torch.nn.Module()
            inputs = [sub.placeholder(f"in_{node.name}") for node in given]
            for made_input, node in zip(inputs, given, strict=True):
                made_input.meta = {"example_value": node.meta.get("example_value")}
            if depth + 1 < len(cut.terms):
                result = self._conditional(cut, now, depth + 1, sub, inner, inputs)
                sub.output(tuple(sub.call_function(operator.getitem, (result, i)) for i in range(cut.results)))
            else:
                sub.output(self._body(cut, now, sub, inputs))
            made.append(graph.get_attr(f"{'skip' if skips else 'run'}_{self.branches}"))
            root.add_module(str(made[-1].target), self._module(inner, sub))
        self.branches += 1
        return graph.call_function(_COND, (gate, *made, tuple(given)))

    def _body(self, cut: _Cut, gone: frozenset[str], graph: fx.Graph, inputs: list[fx.Node]) -> tuple[fx.Node, ...]:
        """One arm: its results, each a tensor of its own, and its moments."""
        assert cut.slot.entry is not None
        assert cut.slot.junction is not None
        arm, given = cut.arms[gone], dict(zip(cut.operands, inputs, strict=False))
        made = arm.copy_into(graph, given.__getitem__)
        for escape, twin in arm.copies:
            source, value = made[twin] if twin in made else given[twin], tensor(escape)
            if gone and len(cut.terms) == 1 and escape is cut.slot.junction.add and value is not None:
                factor = graph.call_function(operator.getitem, (inputs[-2], self.place[cut.terms[0].name]))
                scaled = graph.call_function(torch.mul, (graph.call_method("float", (source,)), factor))
                made[escape] = graph.call_method("to", (scaled, value.dtype), {"copy": True})
            else:
                made[escape] = graph.call_method("clone", (source,))
        results = [made[v] for v in cut.values]
        for since in (cut.slot.entry, cut.layer)[: cut.results - len(cut.values)]:
            assert since is not None
            if len(gone) < len(cut.terms):
                results.append(graph.call_function(stream_moments, (given[since], made[cut.after])))  # type: ignore[index]
            else:
                results.append(graph.call_function(no_moments, (given[since],)))
        return tuple(results)

    def _outside(self, node: fx.Node) -> fx.Node:
        """A view of an input that a branch would return, made again from the input, which the branch has written."""
        if node in self.env or node.op == "get_attr":
            return self._lift(node)
        if written := written_arguments(node):
            return self._outside(written[0])
        if not all(self.flow.storages[n] & self.flow.input_storages or n in self.env for n in node.all_input_nodes):
            raise PassError(f"{node.name} is a view of an input that cannot be made outside its branch")
        made = self.graph.node_copy(node, self._outside)
        made.meta = dict(node.meta)
        return made

    # -- similarities -------------------------------------------------------------------------------------------------

    def _measured(self, slot: Slot, number: int, found: fx.Node, of_layer: fx.Node | None) -> None:
        """Close what the site decides about, if it reached its threshold."""
        if of_layer is not None:
            own = self._call(operator.eq, self._call(operator.getitem, self.since, number), number)
            found = self._call(torch.where, own, found, of_layer)
        here = self._call(operator.getitem, self.skipped, number)
        if len(slot.junction.terms) > 1:  # type: ignore[union-attr]
            found = self._call(torch.where, here, torch.nan, found)  # it may be that of the site beside this one
        self.moments[number] = found
        stream, other = tensor(slot.junction.add), tensor(self.junctions[-1].add)  # type: ignore[union-attr]
        assert stream is not None
        assert other is not None
        masked = same_sizes(stream.shape[:-1], other.shape[:-1])
        threshold = self._call(operator.getitem, self.threshold, number)
        closes = self._call(operator.getitem, self.closes, number)
        arguments = (found, threshold, here, closes, self.skipped, self.rule, self.valid if masked else None)
        self.skipped = self._call(close_gates, *arguments)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _module(self, root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
        """``graph`` with what it reads: branches from ``root``, constants from the graph it was made of."""
        for node in graph.nodes:
            if node.op == "get_attr" and node.target not in root._modules:
                value = operator.attrgetter(str(node.target))(self.gm)
                *path, last = str(node.target).split(".")
                owner = root
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, torch.nn.Module())
                    owner = owner._modules[part]  # type: ignore[assignment]
                setattr(owner, last, value)
        return fx.GraphModule(root, graph)

    def _check_writes(self, made: fx.GraphModule) -> None:
        """No write to an input may be lost where every site runs."""
        before = sum(bool(self.flow.writes.get(n, frozenset()) & self.flow.input_storages) for n in self.flow.nodes)
        runs = [m.graph for name, m in made.named_modules() if isinstance(m, fx.GraphModule) and "skip_" not in name]
        after = sum(bool(written_arguments(n)) for graph in runs for n in graph.nodes if n.op.startswith("call"))
        if after < before:
            raise PassError(f"inserting gates lost {before - after} writes to inputs")


def no_moments(stream: torch.Tensor) -> torch.Tensor:
    """What stands for the moments of a site that did not run: NaN, fp32 ``[..., 3]``."""
    return torch.full((*stream.shape[:-1], 3), torch.nan, dtype=torch.float32, device=stream.device)


def close_gates(
    found: torch.Tensor, threshold: torch.Tensor, here: torch.Tensor, closes: torch.Tensor, skipped: torch.Tensor,
    rule: torch.Tensor, valid: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """``skipped`` after a site with moments ``found``, as tensors alone (see :func:`skipc.kernels.similarity.reached`).

    Args:
        found: fp32 ``[..., 3]``; NaN if the site did not run.
        threshold, here: scalars: the site's threshold, and whether it was skipped.
        closes, skipped: bool ``[sites]``.
        rule: int64 scalar, index in :data:`skipc.ir.gating.BATCH_RULES`.
        valid: bool ``[...]``.
    """
    cosines = cosine(found.double())
    there = torch.ones_like(cosines, dtype=torch.bool) if valid is None else valid.to(cosines.device)
    count = there.sum()
    above = ((cosines.float() >= threshold) & there).sum()
    mean = (torch.where(there, cosines, 0).sum() / count.clamp(min=1)).float() >= threshold
    rules = torch.stack([above == count, 2 * above > count, mean])  # in the order of BATCH_RULES
    reached = (rules & (torch.arange(3, device=rule.device) == rule)).any()  # (indexing would ask for its value)
    return skipped | (closes & reached & (count > 0) & ~here)
