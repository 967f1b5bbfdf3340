"""The arms of a slot: its graph with all, some or none of its sites, each as a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import get_args

import sympy
import torch
from skipc.passes.lowering.borrowing import Borrowed, Keeping, keeping
from skipc.passes.ops import ATTENTION, SOFTMAX, is_statement, op_name, same_sizes, tensor
from skipc.passes.partition import Partition, Slot
from skipc.passes.residual import Term
from torch import fx
from torch._prims_common import is_contiguous_or_false

from skipc.ir.errors import PlanError
from skipc.ir.program import KVPolicy, arms_under
from skipc.ir.site import SiteKind


@dataclass
class ArmGraph:
    """One arm, cut out. ``inputs`` and ``outputs`` are nodes of the whole graph."""

    skipped: frozenset[str]
    kv: KVPolicy
    graph: fx.Graph | None  # None if there is nothing to run
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    copies: list[tuple[fx.Node, fx.Node]]
    refused: str | None = None

    def copy_into(self, graph: fx.Graph, given: Callable[[fx.Node], fx.Node]) -> dict[fx.Node, fx.Node]:
        """Append the arm to ``graph``, where ``given`` stands for its inputs. Returns what its outputs are there."""
        inside: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes if self.graph is not None else ():
            if node.op == "placeholder":
                inside[node] = given(self.inputs[len(inside)])
            elif node.op == "output":
                return {e: inside[r] for e, r in zip(self.outputs, node.args[0], strict=True)}
            else:
                inside[node] = graph.node_copy(node, inside.__getitem__)
        return {}


@dataclass(frozen=True)
class _Cut:
    """What an arm has in the place of some nodes of its slot.

    Attributes:
        kept: for each sum that loses all operands but one, the one that stays.
        borrowed: for each write of keys or values, where they come from instead.
        done: writes that have happened when the arm runs.
        made: values that there are by then.
    """

    kept: dict[fx.Node, fx.Node] = field(default_factory=dict)
    borrowed: dict[fx.Node, Borrowed] = field(default_factory=dict)
    done: frozenset[fx.Node] = frozenset()
    made: frozenset[fx.Node] = frozenset()

    def read_by(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` reads."""
        if node in self.borrowed:
            return self.borrowed[node].arguments
        return [self.kept[node]] if node in self.kept else node.all_input_nodes


class ArmBuilder:
    """Cuts arms out of a partitioned graph."""

    def __init__(self, partition: Partition):
        self.partition, self.flow = partition, partition.flow
        self._built: dict[tuple[int, frozenset[str], KVPolicy], ArmGraph] = {}
        self._symbolic = [
            n
            for n in self.flow.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("example_value"), torch.SymInt)
        ]

    def arms(self, slot: Slot) -> Iterator[ArmGraph]:
        """All arms of ``slot``, first the one that runs everything."""
        yield self.build(slot, [], "project")
        terms = slot.junction.terms if slot.junction else []
        for count in range(1, len(terms) + 1):
            for skipped in combinations(terms, count):
                for kv in get_args(KVPolicy):
                    if kv == "project" or (kv == arms_under(kv) and self._differs(slot, list(skipped), kv)):
                        yield self.build(slot, list(skipped), kv)

    def allowed(self, slot: Slot, skipped: list[Term], kv: KVPolicy) -> ArmGraph:
        """The arm without ``skipped``, under ``kv`` where that makes a difference.

        Raises:
            PlanError: if it would give wrong answers.
        """
        under = arms_under(kv)
        arm = self.build(slot, skipped, under if skipped and self._differs(slot, skipped, under) else "project")
        if arm.refused:
            raise PlanError(f"kv={kv!r} cannot skip {', '.join(sorted(arm.skipped))}: {arm.refused}")
        return arm

    def _differs(self, slot: Slot, skipped: list[Term], kv: KVPolicy) -> bool:
        """Whether ``kv`` is not the same as "project" here."""
        there = self.droppable if kv == "none" else self.borrowed if kv == "copy" else None
        return there is not None and bool(there(slot, skipped) or self.refusal(slot, skipped, kv))

    # -- what a slot does to the outside ------------------------------------------------------------------------------

    def effects(self, slot: Slot) -> list[fx.Node]:
        """Writes of ``slot`` that outlive it, and statements such as assertions."""
        return [n for n in slot.nodes if self.flow.is_effect(n) or is_statement(n) or self._written_for_others(n)]

    def _written_for_others(self, node: fx.Node) -> bool:
        return node in self.flow.writes and any(self._outside(u, node) for u in self.flow.users[node])

    def _outside(self, user: fx.Node, node: fx.Node) -> bool:
        return self.partition.place.get(user, -1) != self.partition.place[node]

    def escapes(self, slot: Slot) -> list[fx.Node]:
        """Values of ``slot`` that other slots or the caller use."""
        return [n for n in slot.nodes if any(self._outside(u, n) for u in n.users)]

    def droppable(self, slot: Slot, skipped: list[Term]) -> list[fx.Node]:
        """Cache writes that only the skipped sites make and only they read: what kv="none" leaves out. Counters, which
        do not depend on the stream, are kept."""
        assert slot.entry is not None
        return [
            n
            for n in self.effects(slot)
            if n in self.flow.writes
            and self.flow.depends(n, slot.entry)
            and any(self.flow.depends(t.value, n) for t in skipped)
        ]

    def kept(self, slot: Slot, skipped: list[Term]) -> list[fx.Node]:
        """Values of the skipped sites themselves that others use: keys and values of a growing cache."""
        assert slot.entry is not None
        return [
            e
            for e in self.escapes(slot)
            if self.flow.depends(e, slot.entry) and any(e in t.branch or self.flow.depends(t.value, e) for t in skipped)
        ]

    def borrowed(self, slot: Slot, skipped: list[Term]) -> list[Borrowed]:
        """What the skipped sites keep under kv="copy"; nothing if they are the lowest of their form, which project."""
        assert slot.entry is not None
        mine = self._keepings(slot, skipped)
        for theirs in self._below(slot) if mine else ():
            pairs = list(zip(mine, theirs, strict=False))
            if len(mine) == len(theirs) and all(a and b and a.like(b) for a, b in pairs):
                return [Borrowed(a, b, slot.entry) for a, b in pairs if a and b]
        return []

    def _below(self, slot: Slot) -> Iterator[list[Keeping | None]]:
        """How the attentions below keep their keys and values, the nearest first."""
        assert slot.junction is not None
        for lower in reversed(self.partition.slots[: slot.index]):
            same = lower.junction is not None and lower.junction.stream == slot.junction.stream
            if same and (found := self._keepings(lower, lower.junction.terms)):  # type: ignore[union-attr]
                yield found

    def _keepings(self, slot: Slot, terms: list[Term]) -> list[Keeping | None]:
        """How the attentions among ``terms`` keep their keys and values; None for what is of no known form."""
        attentions = [t for t in terms if t.kind in (SiteKind.ATTENTION, SiteKind.CROSS_ATTENTION)]
        values = [n for n in self.kept(slot, attentions) if n not in self.flow.writes and not self._is_weights(slot, n)]
        return [keeping(self.flow, slot, n) for n in (*self.droppable(slot, attentions), *values)]

    def _is_weights(self, slot: Slot, node: fx.Node) -> bool:
        """True for what an attention returns beside its keys and values: its weights."""
        assert slot.entry is not None
        between = self.flow.between(slot.entry, node)
        return any(op_name(n) in SOFTMAX | ATTENTION for n in between)

    def slice_of(self, slot: Slot, roots: list[fx.Node]) -> set[fx.Node]:
        """What ``roots`` need, of the nodes of ``slot``."""
        return self._slice(roots, set(slot.nodes), lambda n: n.all_input_nodes)

    # -- one arm ------------------------------------------------------------------------------------------------------

    def build(self, slot: Slot, skipped: list[Term], kv: KVPolicy) -> ArmGraph:
        """The arm of ``slot`` without the terms of ``skipped``."""
        names = frozenset(t.name for t in skipped)
        if (slot.index, names, kv) not in self._built:
            self._built[slot.index, names, kv] = self._build(slot, skipped, names, kv)
        return self._built[slot.index, names, kv]

    def _build(self, slot: Slot, skipped: list[Term], names: frozenset[str], kv: KVPolicy) -> ArmGraph:
        alias = self._without(slot, skipped)
        roots = self.effects(slot)
        if skipped:
            roots = [n for n in roots if not (is_statement(n) and any(n in t.branch for t in skipped))]
        if kv == "none":
            roots = [n for n in roots if n not in self.droppable(slot, skipped)]
        borrowed = {b.kept.node: b for b in self.borrowed(slot, skipped)} if kv == "copy" else {}
        refused = self.refusal(slot, skipped, kv)
        return self._emit(slot, names, kv, _Cut(alias, borrowed), roots, self.escapes(slot), refused)

    def queries(self, slot: Slot) -> ArmGraph | None:
        """What is left of an attention when its keys and values are in the cache; None if they are not kept there by
        writes in place, or if more leaves the slot than the stream and caches that were made there."""
        if slot.junction is None or [t.kind for t in slot.junction.terms] != [SiteKind.ATTENTION]:
            return None
        add, terms = slot.junction.add, slot.junction.terms
        writes, made = frozenset(self.effects(slot)), frozenset(self.escapes(slot)) - {add}
        if not self.droppable(slot, terms) or any(n not in self.flow.writes or not n.args for n in writes):
            return None
        if add not in self.escapes(slot) or any(slot.entry is None or self.flow.depends(n, slot.entry) for n in made):
            return None
        arm = self._emit(slot, frozenset(), "project", _Cut(done=writes, made=made), [], [add])
        return arm if arm.refused is None else None

    def refusal(self, slot: Slot, skipped: list[Term], kv: KVPolicy) -> str | None:
        """Why ``kv`` would be wrong for ``skipped``, if it would."""
        if kv == "project":
            return None
        if kv == "copy":
            unknown = None in self._keepings(slot, skipped) and any(True for _ in self._below(slot))
            return "what it keeps is made of other tokens, too, or cannot be read back" if unknown else None
        output = self.flow.nodes[-1]
        for write in self.droppable(slot, skipped):
            if any(self._outside(u, write) and u is not output for u in self.flow.users[write]):
                return "other layers read the cache that it would leave unwritten"
        for escape in self.kept(slot, skipped):
            if escape not in self.flow.writes:
                return "the caller or another layer keeps its keys and values"
        return None

    @staticmethod
    def _without(slot: Slot, skipped: list[Term]) -> dict[fx.Node, fx.Node]:
        """For each sum that loses all operands but one, the one that stays."""
        gone = {t.value for t in skipped}
        alias: dict[fx.Node, fx.Node] = {}
        for add in slot.junction.adds if slot.junction else []:
            stays = [a for a in add.args if a not in gone]
            if not stays:
                gone.add(add)
            elif len(stays) == 1:
                assert isinstance(stays[0], fx.Node)
                alias[add] = stays[0]
        return alias

    def _emit(
        self,
        slot: Slot,
        names: frozenset[str],
        kv: KVPolicy,
        cut: _Cut,
        roots: list[fx.Node],
        escapes: list[fx.Node],
        refused: str | None = None,
    ) -> ArmGraph:
        inside, kept = set(slot.nodes) - cut.done - cut.made, cut.kept

        def resolve(node: fx.Node) -> fx.Node:
            while node in cut.done or (node in kept and self._may_share(node, kept[node])):
                node = node.args[0] if node in cut.done else kept[node]  # type: ignore[assignment]
            return node

        def read_by(node: fx.Node) -> list[fx.Node]:
            return list(map(resolve, cut.read_by(node)))

        needed = self._slice([*roots, *map(resolve, escapes)], inside, read_by)
        body = [n for n in slot.nodes if n in needed]
        if any(self._precedes(n, write) for n in body for write in cut.done):
            refused = "it reads what it overwrites"
        inputs = self._inputs(slot, body, read_by)
        graph = fx.Graph()
        copied = {node: _placeholder(graph, node) for node in inputs}

        def lift(node: fx.Node) -> fx.Node:
            node = resolve(node)
            if node.op == "get_attr" and node not in copied:
                copied[node] = graph.node_copy(node)
            return copied[node]

        for node in body:
            if node in cut.borrowed:
                copied[node] = cut.borrowed[node].emit(graph, lift)
            elif node in kept:
                copied[node] = _copy_of(graph, lift(kept[node]), node)
            else:
                copied[node] = graph.node_copy(node, lift)
            copied[node].meta = dict(node.meta)
        lent = self.kept(slot, slot.junction.terms) if slot.junction else []  # higher arms may copy of it
        outputs: list[fx.Node] = []
        results: list[fx.Node] = []
        copies: list[tuple[fx.Node, fx.Node]] = []
        for escape in escapes:
            value = resolve(escape)
            twin = next((o for o in outputs if resolve(o) is value), None)
            if twin is not None:
                copies.append((escape, twin))
            elif value not in inside:
                copies.append((escape, value))
            else:
                outputs.append(escape)
                results.append(self._kept_layout(graph, copied[value], escape, escape in lent))
        if not body:
            return ArmGraph(names, kv, None, [], [], copies, refused)
        graph.output(tuple(results))
        return ArmGraph(names, kv, graph, inputs, outputs, copies, refused)

    def _precedes(self, node: fx.Node, write: fx.Node) -> bool:
        """True if ``node`` reads what was there before ``write``."""
        touched = frozenset().union(*(self.flow.storages[n] for n in node.all_input_nodes), frozenset())
        return self.flow.order[node] < self.flow.order[write] and bool(touched & self.flow.writes[write])

    def _kept_layout(self, graph: fx.Graph, result: fx.Node, escape: fx.Node, lent: bool) -> fx.Node:
        """``result``, contiguous if Dynamo saw it so. AOTAutograd's decompositions may change strides (``cat`` with an
        empty tensor becomes a copy that keeps them), and the regions that read the value are compiled for Dynamo's. It
        costs nothing where they agree."""
        value = tensor(escape)
        read_by_slots = any(u in self.partition.place and self._outside(u, escape) for u in escape.users)
        shared = self.flow.storages[escape] & (self.flow.input_storages | self.flow.written)
        if value is None or not (read_by_slots or lent) or shared or not is_contiguous_or_false(value):
            return result
        made = graph.call_method("contiguous", (result,))
        made.meta = dict(escape.meta)
        return made

    def _inputs(self, slot: Slot, body: list[fx.Node], read_by: Callable[[fx.Node], list[fx.Node]]) -> list[fx.Node]:
        """What an arm reads from outside: the stream point, then values in order of use, then size symbols."""
        inside = set(body)
        read = [s for n in body for s in read_by(n)]
        outer = dict.fromkeys(v for v in read if v not in inside and v.op != "get_attr")
        if slot.entry in outer:
            outer = {slot.entry: None, **outer}
        symbols = _symbols((*body, *outer)) if self._symbolic else set()
        outer.update((n, None) for n in self._symbolic if n.meta["example_value"].node.expr in symbols)
        return list(outer)

    def _slice(
        self,
        roots: list[fx.Node],
        inside: set[fx.Node],
        read_by: Callable[[fx.Node], list[fx.Node]],
    ) -> set[fx.Node]:
        """What the roots need, of the nodes inside the slot."""
        needed: set[fx.Node] = set()
        stack = [r for r in roots if r in inside]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            writes = self.flow.sources[node].difference(node.all_input_nodes)  # that it must see, whatever it reads
            stack += [s for s in (*read_by(node), *writes) if s in inside]
        return needed

    def _may_share(self, total: fx.Node, kept: fx.Node) -> bool:
        """True if a sum without its branch may be the very tensor that stays: same dtype and strides, and nobody writes
        to either."""
        before, after = tensor(kept), tensor(total)
        if before is None or after is None or before.dtype != after.dtype:
            return False
        if (self.flow.storages[total] | self.flow.storages[kept]) & self.flow.written:
            return False
        return same_sizes(before.stride(), after.stride())


def _placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    name = node.name if node.op == "placeholder" else f"in_{node.name}"
    made = graph.placeholder(name)
    made.meta = {"example_value": node.meta.get("example_value")}
    made._dynamo_source = None  # type: ignore[attr-defined]
    return made


def _copy_of(graph: fx.Graph, kept: fx.Node, total: fx.Node) -> fx.Node:
    """What stays of a sum, as a tensor of its own with the sum's dtype and strides (find_sites refuses sums whose
    strides are neither the shortcut's nor contiguous)."""
    before, after = kept.meta["example_value"], tensor(total)
    assert after is not None
    layout = torch.preserve_format if same_sizes(before.stride(), after.stride()) else torch.contiguous_format
    if before.dtype == after.dtype:
        return graph.call_method("clone", (kept,), {"memory_format": layout})
    return graph.call_method("to", (kept, after.dtype), {"copy": True, "memory_format": layout})


def _symbols(nodes: Iterable[fx.Node]) -> set[sympy.Symbol]:
    """Every size symbol in the values of ``nodes``. Inductor must be able to read each off an input."""
    used: set[sympy.Symbol] = set()
    for node in nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
            is_tensor = isinstance(value, torch.Tensor)
            for size in (*value.shape, *value.stride(), value.storage_offset()) if is_tensor else (value,):
                if isinstance(size, torch.SymInt):
                    used |= size.node.expr.free_symbols
    return used
