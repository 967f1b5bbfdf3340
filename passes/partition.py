"""Cut a graph into the steps of a program, along the points of its residual streams.

A *slot* is what will become one step: the prologue, one slot for each junction, and a tail behind the last junction of
each stream. Each node goes to one slot:

* a node that depends on a stream point can run no earlier than the slot which that point opens;
* a node whose value only one slot needs goes there (so that a skipped sublayer takes its private producers along: the
  cross-attention's keys, the expanded view of a cache);
* any other node runs as early as it can (masks and rotary tables: in the prologue, once);
* what decides about a stream for all that follows (a router of adapters) runs behind what makes that point of it;
* nobody crosses a write: all dependences of :class:`~skipc.passes.dataflow.Dataflow` hold between slots, which is
  verified, and inside a slot the original order stays.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import VIEWS, decides, op_name
from skipc.passes.residual import Junction
from torch import fx

from skipc.ir.errors import PassError

_SCOPE_ENTER = frozenset(
    {"_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting", "_enter_autocast"}
)
_SCOPE_EXIT = frozenset(
    {"_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting", "_exit_autocast"}
)


@dataclass
class Slot:
    """One stretch of the graph between two points of a stream."""

    index: int
    label: str
    junction: Junction | None = None
    entry: fx.Node | None = None  # the stream point that opens it
    nodes: list[fx.Node] = field(default_factory=list)


class Partition:
    """The slots of a graph, in order of execution.

    Raises:
        PassError: if no cut respects the dependences.
    """

    def __init__(self, graph: fx.Graph, flow: Dataflow, junctions: list[Junction]):
        self.flow = flow
        self.slots = [Slot(0, "prologue")]
        self.opens: dict[fx.Node, int] = {}
        self.pins: dict[fx.Node, int] = {}
        self._lay_out(junctions)
        self.place = self._assign()
        self._verify()
        for node, slot in self.place.items():
            self.slots[slot].nodes.append(node)
        for slot_ in self.slots:
            slot_.nodes.sort(key=flow.order.__getitem__)

    def _lay_out(self, junctions: list[Junction]) -> None:
        last = {j.stream: j for j in junctions}
        for junction in junctions:
            slot = Slot(len(self.slots), ", ".join(t.name for t in junction.terms), junction, _entry(junction))
            self.slots.append(slot)
            assert slot.entry is not None
            self.opens.setdefault(slot.entry, slot.index)
            self.pins[junction.add] = slot.index
            if last[junction.stream] is junction:
                tail = Slot(len(self.slots), "tail", entry=junction.add)
                self.slots.append(tail)
                self.opens.setdefault(junction.add, tail.index)

    def _earliest(self) -> dict[fx.Node, int]:
        earliest: dict[fx.Node, int] = {}
        for node in self.flow.nodes:
            opens = {} if decides(node) else self.opens
            bounds = [
                max(earliest[s], opens.get(s, 0)) for s in (*self.flow.sources[node], *self.flow.before.get(node, ()))
            ]
            earliest[node] = max(bounds, default=0)
        return earliest

    def _assign(self) -> dict[fx.Node, int]:
        flow, earliest = self.flow, self._earliest()
        after: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node, earlier in flow.before.items():
            for e in earlier:
                after[e].add(node)
        scopes = self._scopes(earliest)
        place: dict[fx.Node, int] = {}
        floating: list[fx.Node] = []
        output = flow.nodes[-1]
        for node in reversed(flow.nodes):
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            if node in self.pins:
                place[node] = self.pins[node]
            elif node in scopes:
                place[node] = scopes[node]
            elif node in self.opens or decides(node):
                place[node] = earliest[node]
            else:
                later = (flow.users[node] | after[node]) - set(floating)
                slots = {place[n] for n in later if n is not output}
                if not later and node in flow.writes:
                    floating.append(node)  # a counter: stays beside what read it
                else:
                    place[node] = slots.pop() if len(slots) == 1 and output not in later else earliest[node]
        for node in reversed(floating):
            near = [place[n] for n in (*flow.sources[node], *flow.before.get(node, ())) if n in place]
            place[node] = max([earliest[node], *near])
        return place

    def _scopes(self, earliest: dict[fx.Node, int]) -> dict[fx.Node, int]:
        """Slots for stretches between an enter and an exit call, which must stay together."""
        scopes: dict[fx.Node, int] = {}
        members: list[fx.Node] = []
        depth = 0
        for node in self.flow.nodes:
            name = op_name(node)
            depth += name in _SCOPE_ENTER
            if depth and node.op not in ("placeholder", "get_attr"):
                members.append(node)
            depth -= name in _SCOPE_EXIT
            if depth == 0 and members:
                slot = max(earliest[n] for n in members)
                scopes.update(dict.fromkeys(members, slot))
                members = []
        return scopes

    def _verify(self) -> None:
        for node, slot in self.place.items():
            for source in (*self.flow.sources[node], *self.flow.before.get(node, ())):
                if self.place.get(source, 0) > slot:
                    raise PassError(f"no cut of the graph keeps {source.name} before {node.name}")


def _entry(junction: Junction) -> fx.Node:
    """The value that opens the slot of ``junction``: the sum before it, if only views lie between, so that skipping
    leaves a value as it is; otherwise the point itself (a norm then belongs to the slot before)."""
    node = junction.point
    while junction.previous is not None and node is not junction.previous.add:
        if op_name(node) not in VIEWS or not isinstance(node.args[0], fx.Node):
            return junction.point
        node = node.args[0]
    return node
