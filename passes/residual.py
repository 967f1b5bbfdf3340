"""The residual streams of a graph, by dataflow alone.

An addition ``n = p' + f(p)`` closes a sublayer if its shortcut ``p'`` is the stream point ``p`` itself, up to casts,
views and scales, and if ``n`` *post-dominates* ``p``: everything that flows from ``p`` to the output flows through
``n``. Sublayers form chains, one for each stream; of nested ones the outermost counts, unless it is a long skip over
several. Branches that share one addition (``p + attention(p) + mlp(p)``) are one :class:`Junction` with several terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
import torch
from skipc.passes.classify import is_heavy, kind_of, module_paths
from skipc.passes.dataflow import Dataflow
from skipc.passes.ops import CASTS, SCALES, VIEWS, is_add, is_parameter_like, op_name, same_sizes, tensor
from torch import fx
from torch._prims_common import is_contiguous_or_false

from skipc.ir.site import Reason, Rejection, SiteKind

_MOST_TERMS = 3  # a junction of n terms has 2^n arms


@dataclass
class Term:
    """One branch of a junction."""

    value: fx.Node  # what is added
    branch: list[fx.Node]  # nodes on the paths from the stream point to ``value``, in order
    kind: SiteKind = SiteKind.OTHER
    name: str = ""
    layer: int = 0


@dataclass
class Junction:
    """An addition, or a tree of them, where branches rejoin the residual stream."""

    point: fx.Node  # stream point that the branches read
    add: fx.Node  # outermost addition: the next point of the stream
    shortcut: fx.Node  # operand that stays when all branches are skipped
    adds: list[fx.Node]  # all additions of the tree, ``add`` last
    terms: list[Term]
    previous: Junction | None = None
    stream: int = 0


@dataclass
class Streams:
    """All junctions of a graph in order of execution, and what was rejected."""

    junctions: list[Junction] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class StreamFinder:
    """Finds the residual streams of one graph; :meth:`find` is the only entry."""

    def __init__(self, graph: fx.Graph, flow: Dataflow):
        self.graph, self.flow = graph, flow
        self.rejections: dict[fx.Node, Reason] = {}

    def find(self) -> Streams:
        """All streams of the graph."""
        found: dict[fx.Node, Junction] = {}
        successors: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
        for output in self._outputs():
            post = self._post_dominators(output)
            for add in self._roots(post):
                junction = self._junction(add, post)
                if junction is not None and add not in found:
                    found[add] = junction
                    successors[add] = post
        junctions = self._outermost(sorted(found.values(), key=lambda j: self.flow.order[j.add]))
        self._link(junctions, successors)
        junctions = self._drop_pooled(junctions)
        for j in junctions:
            opens = [k.point for k in junctions if k.stream == j.stream and k.previous is None]
            for term in j.terms:
                term.kind = kind_of(term.branch, self.flow, opens)
        return Streams(junctions, self._rejected(junctions))

    # -- candidates ---------------------------------------------------------------------------------------------------

    def _outputs(self) -> list[fx.Node]:
        """Floating outputs, those with most ancestors first, leaving out any whose whole past is covered already."""
        output = next(iter(reversed(self.graph.nodes)))
        values = {n for n in output.all_input_nodes if (t := tensor(n)) is not None and t.is_floating_point()}
        chosen, covered = [], 0
        for value in sorted(values, key=lambda n: (-self.flow.ancestors(n).bit_count(), -self.flow.order[n])):
            past = self.flow.ancestors(value) | 1 << self.flow.order[value]
            heavy = any(is_heavy(n) and not covered >> self.flow.order[n] & 1 for n in self._members(past & ~covered))
            if heavy:
                chosen.append(value)
            covered |= past
        return chosen

    def _members(self, bits: int) -> list[fx.Node]:
        return [n for i, n in enumerate(self.flow.nodes) if bits >> i & 1]

    def _post_dominators(self, output: fx.Node) -> dict[fx.Node, fx.Node]:
        """For each ancestor of ``output``, the next node that all its paths to ``output`` go through."""
        members = set(self._members(self.flow.ancestors(output))) | {output}
        edges = [(n, s) for n in members for s in self.flow.sources[n]]
        post = dict(nx.immediate_dominators(nx.DiGraph(edges), output)) if edges else {}
        return {**post, output: output}  # networkx releases differ in what they say of the root

    def _roots(self, post: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """Additions of floating values that are not themselves a term of a larger sum of the same shape."""
        adds = [n for n in self.flow.nodes if n in post and is_add(n) and self._floating(n)]
        return [n for n in adds if self._parent_add(n) is None]

    @staticmethod
    def _floating(node: fx.Node) -> bool:
        value = tensor(node)
        return value is not None and value.is_floating_point() and value.dim() >= 2

    def _parent_add(self, node: fx.Node) -> fx.Node | None:
        users = self.flow.users[node]
        parent = next(iter(users)) if len(users) == 1 else None
        return parent if parent is not None and is_add(parent) and _same_shape(parent, node) else None

    def _junction(self, add: fx.Node, post: dict[fx.Node, fx.Node]) -> Junction | None:
        """``add`` as a junction, or None with the reason noted."""
        operands = self._flatten(add)
        for shortcut in operands:
            others = [t for t in operands if t is not shortcut]
            for point in self._transparent_roots(shortcut):
                reading = [t for t in others if self.flow.depends(t, point)]
                if not reading:
                    continue
                if not self._post_dominates(add, point, post):
                    self._reject(add, Reason.NOT_POST_DOMINATING, reading, point)
                    continue
                terms = [Term(t, self.flow.between(point, t)) for t in reading]
                terms = [t for t in terms if any(map(is_heavy, t.branch))]
                if not terms:
                    self._reject(add, Reason.NO_HEAVY_OP)
                    return None
                reason = self._shape_reason(add, shortcut)
                if reason is not None:
                    self._reject(add, reason)
                    return None
                junction = self._merge(Junction(point, add, shortcut, self._adds(add, operands), terms))
                reason = self._branch_reason(junction, operands)
                if reason is not None:
                    self._reject(add, reason)
                    return None
                return junction
        if add not in self.rejections:
            self._reject_unrelated(add, operands, post)
        return None

    def _flatten(self, add: fx.Node) -> list[fx.Node]:
        operands: list[fx.Node] = []
        for arg in add.all_input_nodes:
            nested = is_add(arg) and self._parent_add(arg) is add and not _has_alpha(arg)
            operands += self._flatten(arg) if nested else [arg]
        return operands

    def _adds(self, add: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
        adds = [a for arg in add.all_input_nodes if arg not in operands for a in self._adds(arg, operands)]
        return [*adds, add]

    def _transparent_roots(self, node: fx.Node) -> list[fx.Node]:
        """``node`` and what it is a cast, view or scaled copy of, nearest first."""
        roots = [node]
        while True:
            name = op_name(node)
            inputs = [a for a in node.all_input_nodes if not is_parameter_like(a)]
            tensors_in = [a for a in inputs if tensor(a) is not None]
            transparent = name in CASTS or name in VIEWS or (name in SCALES and len(tensors_in) == 1)
            if not transparent or len(tensors_in) != 1:
                return roots
            node = tensors_in[0]
            roots.append(node)

    def _post_dominates(self, node: fx.Node, of: fx.Node, post: dict[fx.Node, fx.Node]) -> bool:
        order = self.flow.order
        while of in post and order[of] < order[node]:
            if post[of] is of:
                return False
            of = post[of]
        return of is node

    def _merge(self, junction: Junction) -> Junction:
        """Keep branches apart only if they are an attention beside other work; sums inside one sublayer (routed and
        shared experts, say) are one branch."""
        terms = junction.terms
        if len(terms) < 2:
            return junction
        kinds = [kind_of(t.branch, self.flow, [junction.point]) for t in terms]
        mixing = [k in (SiteKind.ATTENTION, SiteKind.CROSS_ATTENTION, SiteKind.MIXER) for k in kinds]
        if sum(mixing) == 1:
            return junction
        values = {t.value for t in terms}
        for add in junction.adds[:-1]:  # smallest sum that holds every branch and not the shortcut
            operands = set(self._flatten_all(add, junction.adds))
            if values <= operands and junction.shortcut not in operands:
                merged = Term(add, self.flow.between(junction.point, add))
                outer = [a for a in junction.adds if a is add or self.flow.depends(a, add)]
                return Junction(junction.point, junction.add, junction.shortcut, outer[1:], [merged])
        return junction

    def _flatten_all(self, add: fx.Node, adds: list[fx.Node]) -> list[fx.Node]:
        return [t for arg in add.all_input_nodes for t in (self._flatten_all(arg, adds) if arg in adds else [arg])]

    def _shape_reason(self, add: fx.Node, shortcut: fx.Node) -> Reason | None:
        if _has_alpha(add):
            return Reason.SCALED_ADD
        if not _same_shape(add, shortcut):  # a branch that broadcasts is fine: without it, the shape stays
            return Reason.SHAPE_CHANGES
        out, stays = tensor(add), tensor(shortcut)
        assert out is not None
        assert stays is not None
        if not same_sizes(out.stride(), stays.stride()) and not is_contiguous_or_false(out):
            return Reason.LAYOUT_CHANGES
        return None

    def _branch_reason(self, junction: Junction, operands: list[fx.Node]) -> Reason | None:
        """Leaving a branch out must equal adding zero: nobody but the sum may read its result."""
        if len(junction.terms) > _MOST_TERMS:
            return Reason.TOO_MANY_BRANCHES
        for term in junction.terms:
            readers = self.flow.users[term.value]
            if len(readers) != 1 or not readers.issubset(junction.adds) or operands.count(term.value) > 1:
                return Reason.BRANCH_USED_ELSEWHERE
        return None

    # -- from candidates to streams -----------------------------------------------------------------------------------

    def _outermost(self, candidates: list[Junction]) -> list[Junction]:
        """Drop junctions inside a term of another, or a long skip that holds several."""
        inner: dict[int, list[int]] = {i: [] for i in range(len(candidates))}
        for i, outer in enumerate(candidates):
            inside = {n for t in outer.terms for n in t.branch}
            inner[i] = [k for k, c in enumerate(candidates) if k != i and c.add in inside]
        dropped: set[int] = set()
        for i in sorted(inner, key=lambda i: -len(inner[i])):  # outermost first
            if i in dropped:
                continue
            direct = [k for k in inner[i] if k not in dropped]
            top = [k for k in direct if not any(k in inner[m] for m in direct)]
            if len(top) >= 2:
                dropped.add(i)
                self._reject(candidates[i].add, Reason.CONTAINS_SITES)
            else:
                for k in direct:
                    dropped.add(k)
                    self._reject(candidates[k].add, Reason.NESTED)
        return [c for i, c in enumerate(candidates) if i not in dropped]

    def _link(self, junctions: list[Junction], successors: dict[fx.Node, dict[fx.Node, fx.Node]]) -> None:
        """Chain junctions: each follows the one whose sum reaches its point in fewest post-dominators."""
        by_point = {j.point: j for j in junctions}
        best: dict[int, tuple[int, int, Junction]] = {}
        for i, junction in enumerate(junctions):
            post, node, steps = successors[junction.add], junction.add, 0
            while node not in by_point and node in post and post[node] is not node:
                node, steps = post[node], steps + 1
            follower = by_point.get(node)
            if follower is not None and follower is not junction:
                claim = (steps, -i, junction)
                best[id(follower)] = min(best.get(id(follower), claim), claim, key=lambda c: c[:2])
        streams = 0
        for junction in junctions:
            junction.previous = best[id(junction)][2] if id(junction) in best else None
            if junction.previous is None:
                junction.stream, streams = streams, streams + 1
            else:
                junction.stream = junction.previous.stream

    def _drop_pooled(self, junctions: list[Junction]) -> list[Junction]:
        """Drop what comes after the token axis is gone: a residual head behind the pooled stream."""
        kept = []
        for j in junctions:
            before, here = tensor(j.previous.add) if j.previous else None, tensor(j.add)
            assert here is not None
            pooled = before is not None and _tokens_gone(before.shape, here.shape)
            if pooled or (j.previous is not None and j.previous.add in self.rejections):
                self._reject(j.add, Reason.BEHIND_OUTPUT)
            else:
                kept.append(j)
        return kept

    # -- rejections ---------------------------------------------------------------------------------------------------

    def _reject(
        self, add: fx.Node, reason: Reason, terms: list[fx.Node] | None = None, point: fx.Node | None = None
    ) -> None:
        if point is not None and not any(is_heavy(n) for t in terms or () for n in self.flow.between(point, t)):
            return  # cheap arithmetic inside a sublayer, no near-miss
        self.rejections.setdefault(add, reason)

    def _reject_unrelated(self, add: fx.Node, operands: list[fx.Node], post: dict[fx.Node, fx.Node]) -> None:
        """No operand continues another: tell a position embedding from a projected shortcut."""
        pasts = [self.flow.ancestors(t) for t in operands]
        common = pasts[0]
        for past in pasts[1:]:
            common &= past
        candidates = (
            n for i in reversed(range(self.flow.order[add])) if common >> i & 1 for n in (self.flow.nodes[i],)
        )
        shared = next((n for n in candidates if self._floating(n) and not is_parameter_like(n)), None)
        if shared is None:
            self._reject(add, Reason.BRANCH_INDEPENDENT)
        elif self._post_dominates(add, shared, post) and all(
            any(map(is_heavy, self.flow.between(shared, t))) for t in operands
        ):
            self._reject(add, Reason.PROJECTED_SHORTCUT)

    def _rejected(self, junctions: list[Junction]) -> list[Rejection]:
        """Rejections worth telling: those that lie on a stream, not in the arithmetic inside a site."""
        inside = {n for j in junctions for t in j.terms for n in t.branch}
        return [
            Rejection(".".join([*module_paths(add)[-1:], add.name]), reason)
            for add, reason in sorted(self.rejections.items(), key=lambda r: self.flow.order[r[0]])
            if add not in inside and reason is not Reason.NO_HEAVY_OP
        ]


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = tensor(a), tensor(b)
    return x is not None and y is not None and same_sizes(x.shape, y.shape)


def _tokens_gone(before: torch.Size, here: torch.Size) -> bool:
    """True if a stream of shape [batch, tokens, width] became [batch, width] or [batch, 1, width]."""
    one_token = [isinstance(s[1], int) and s[1] == 1 for s in (before, here) if len(s) == 3]
    if len(before) == 3 and len(here) == 2:
        return same_sizes(here[:1], before[:1]) and not one_token[0]
    return len(before) == len(here) == 3 and one_token == [False, True]


def _has_alpha(add: fx.Node) -> bool:
    return bool(add.kwargs.get("alpha", 1) != 1) or len(add.args) != 2
