"""What a site is, and why something that looks like one is not.

A *site* is one skippable sublayer: a branch that reads the residual stream at one point and is added to it at a
later one. These records name sites; they hold no graph nodes, so they outlive the graph they were found in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch


class SiteKind(StrEnum):
    """What a sublayer computes, judged by its operations."""

    ATTENTION = "attention"  # softmax attention whose keys come from the stream that it is added to
    CROSS_ATTENTION = "cross_attention"  # the same, with keys from elsewhere
    MLP = "mlp"  # mixes channels of one token only
    MOE = "moe"  # an MLP whose weights are chosen per token
    MIXER = "mixer"  # mixes tokens without softmax attention: convolutions, scans, linear attention, FFTs
    OTHER = "other"


class Reason(StrEnum):
    """Why an addition that resembles a sublayer is not a site."""

    NO_HEAVY_OP = "no_heavy_op"  # the branch has no matrix product: nothing to save
    BRANCH_INDEPENDENT = "branch_independent"  # the branch does not read the stream (a position embedding)
    NOT_POST_DOMINATING = "not_post_dominating"  # the stream also flows around this addition
    PROJECTED_SHORTCUT = "projected_shortcut"  # the other operand is no identity, cast or scale of the stream
    CONTAINS_SITES = "contains_sites"  # a long skip over several sublayers, which are sites themselves
    NESTED = "nested"  # inside another site
    BEHIND_OUTPUT = "behind_output"  # after the stream was pooled
    BRANCH_USED_ELSEWHERE = "branch_used_elsewhere"  # the branch's result is read by more than its addition
    TOO_MANY_BRANCHES = "too_many_branches"  # more than three branches share one addition
    SCALED_ADD = "scaled_add"  # add(..., alpha=...) with alpha other than 1
    SHAPE_CHANGES = "shape_changes"  # broadcasting: without the branch, the sum would have another shape
    LAYOUT_CHANGES = "layout_changes"  # without the branch, the sum would have other strides

    @property
    def text(self) -> str:
        """The reason as a phrase."""
        return _REASON_TEXT[self]


_REASON_TEXT = {
    Reason.NO_HEAVY_OP: "the branch holds no matrix product, so skipping it saves nothing",
    Reason.BRANCH_INDEPENDENT: "the branch does not read the residual stream",
    Reason.NOT_POST_DOMINATING: "the residual stream also flows around this addition",
    Reason.PROJECTED_SHORTCUT: "the shortcut is itself a projection, so there is no stream to fall back to",
    Reason.CONTAINS_SITES: "a long skip over several sublayers, which are sites themselves",
    Reason.NESTED: "lies inside another site",
    Reason.BEHIND_OUTPUT: "comes after the stream was pooled",
    Reason.BRANCH_USED_ELSEWHERE: "the branch's result is read by more than this addition",
    Reason.TOO_MANY_BRANCHES: "more than three branches share this addition",
    Reason.SCALED_ADD: "adds with alpha other than 1",
    Reason.SHAPE_CHANGES: "the sum broadcasts, so its shape depends on the branch",
    Reason.LAYOUT_CHANGES: "the sum's memory layout depends on the branch",
}


@dataclass(frozen=True)
class HiddenLayer:
    """What a sublayer can have fewer of, and the parameters that hold something of each: the neurons of an MLP, or the
    groups of heads of an attention that share a head of keys and values.

    Attributes:
        width: how many there are.
        rows: names of parameters with a row (or a number) for each neuron, or as many for each group as its heads have
            channels, and how many such stretches follow one another in it: 2 where one layer makes both halves of a
            gated MLP.
        columns: name of the weight with ``size`` columns for each of them.
        size: 1 for a neuron; for a group, the channels of its heads.
    """

    width: int
    rows: tuple[tuple[str, int], ...]
    columns: str
    size: int = 1

    def channels(self, kept: torch.Tensor) -> torch.Tensor:
        """The columns of those that are ``kept``: int64 ``[kept * size]``."""
        return (kept[:, None] * self.size + torch.arange(self.size)).flatten()


@dataclass(frozen=True)
class Source:
    """Where the branch of a site begins, in eager.

    Attributes:
        module: path of the module whose output the branch reads.
        normed: True if that module is a norm inside the branch, whose input is the stream; False if its output is.
        width: of the stream.
    """

    module: str
    normed: bool
    width: int


@dataclass(frozen=True)
class Site:
    """One skippable sublayer.

    ``name`` is the path of the outermost module whose output is the branch that is added, before any scale or norm
    outside it: zeroing that module's output in eager equals skipping the site.
    """

    name: str
    kind: SiteKind
    layer: int  # index of the layer within its stream
    stream: int  # residual stream the site belongs to (encoder 0, decoder 1)
    nodes: int  # operations that only this site needs
    effect_nodes: int  # operations that a skipped site still runs under kv="project"
    effects: tuple[str, ...]  # cache inputs that the site writes in place
    returned: int  # values of the site that the caller keeps (growing caches)
    hidden: HiddenLayer | None = None  # of an MLP or an attention of plain linear layers
    source: Source | None = None  # of which a replacement can be made; None if it cannot
    dtype: str = ""  # of the stream: "float32"


@dataclass(frozen=True)
class Rejection:
    """An addition that is not a site, and why."""

    name: str  # module path and graph node
    reason: Reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason.text}"


@dataclass(frozen=True)
class SiteReport:
    """What :func:`skipc.find_sites` found in one or more graphs of a model."""

    sites: tuple[Site, ...]
    rejected: tuple[Rejection, ...]
    graph_breaks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def names(self) -> list[str]:
        """Site names, in order of execution."""
        return [site.name for site in self.sites]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max((len(s.name) for s in self.sites), default=4)
        lines = [f"{len(self.sites)} sites", f"  {'name':<{width}}  kind             layer  nodes  effects"]
        for s in self.sites:
            kept = [f"writes {len(s.effects)} caches"] * bool(s.effects) + [f"returns {s.returned}"] * bool(s.returned)
            lines.append(f"  {s.name:<{width}}  {s.kind:<15}  {s.layer:>5}  {s.nodes:>5}  {', '.join(kept) or '-'}")
        if self.rejected:
            lines += [f"{len(self.rejected)} rejected", *(f"  {r}" for r in self.rejected)]
        if self.graph_breaks:
            lines += [f"{len(self.graph_breaks)} graph breaks", *(f"  {r}" for r in self.graph_breaks)]
        return "\n".join(lines)
