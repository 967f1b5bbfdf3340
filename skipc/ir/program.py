"""What a compiled program is, as plain data: steps in order, each with one arm for every way to run it.

The outline lowering makes a :class:`ProgramSpec`; the runtime binds it to compiled regions. Both meet only here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from skipc.ir.adapters import Mirrored
from skipc.ir.errors import PlanError
from skipc.ir.site import Site

KVPolicy = Literal["project", "none", "copy", "backfill"]  # what a skipped attention keeps: see Config.kv
Size = int | tuple[int, int] | None  # a constant; or (input, dimension), where -1 is the input itself; or unknown
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


def arms_under(kv: KVPolicy) -> KVPolicy:
    """The policy whose arms a call under ``kv`` runs: what is filled in later is left out now."""
    return "none" if kv == "backfill" else kv


@dataclass(frozen=True)
class Arm:
    """One way to run a step: with the sites of ``skipped`` left out."""

    skipped: frozenset[str] = frozenset()
    kv: KVPolicy = "project"
    region: int | None = None  # region to call; None if there is nothing to run
    inputs: tuple[str, ...] = ()  # variables passed to the region
    layouts: tuple[Layout | None, ...] = ()  # of the inputs, for which the region is compiled; None where it varies
    outputs: tuple[str, ...] = ()  # variables that receive its results
    copies: tuple[tuple[str, str], ...] = ()  # (variable, the variable whose value it takes)
    refused: str | None = None  # why this arm would be wrong, if so
    late: bool = False  # nothing later sees what the region does (counters): run with its like, at the end


@dataclass(frozen=True)
class Gather:
    """How the first arm of a step can run on some of the tokens.

    Attributes:
        tokens: positions of the arm's inputs that have a row for each token, ``[batch, tokens, ...]``.
        sizes: positions of those that are a size, and which: 0 for the batch, 1 for the number of tokens.
        varies: which of the two may be another one; None if both may.
        symbols: what they are called in
        guards: expressions that must hold.
    """

    tokens: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    varies: int | None = None
    symbols: tuple[tuple[Any, int], ...] = ()
    guards: tuple[Any, ...] = ()

    def admits(self, sizes: tuple[int, int]) -> bool:
        """Whether the arm may be called on such a batch of so many tokens."""
        values = {symbol: sizes[which] for symbol, which in self.symbols}
        return all(bool(guard.subs(values)) for guard in self.guards)


@dataclass(frozen=True)
class Queries:
    """How an attention can run on some of the tokens of one row, when the keys and values of all are in its cache.

    Attributes:
        arm: that reads them.
        tokens: positions of its inputs that have a row for each token, and along which dimension.
        sizes: positions of those that are the number of tokens.
        symbol: what that number is called in
        guards: expressions that must hold.
    """

    arm: Arm
    tokens: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    symbol: Any
    guards: tuple[Any, ...] = ()

    def admits(self, tokens: int) -> bool:
        """Whether the arm may be called on so many."""
        return all(bool(guard.subs({self.symbol: tokens})) for guard in self.guards)


@dataclass(frozen=True)
class Step:
    """A stretch of the program between two points of the residual stream."""

    label: str
    sites: tuple[str, ...]
    arms: tuple[Arm, ...]  # the first runs everything
    releases: tuple[str, ...] = ()  # variables that nobody reads after this step
    stream: tuple[str, str] | None = None  # the residual stream before and after the sites
    scalable: bool = False  # skipping may scale the stream: nothing else that leaves the step is made of the sum
    moments: str | None = None  # variable of the first arm that receives the moments of the stream
    gather: Gather | None = None  # how to run on some tokens alone, if that is possible
    queries: Queries | None = None  # the same for an attention
    live: int | None = None  # of an attention kernel: which input says what keys the queries of each row may see

    def arm_for(self, skipped: frozenset[str], kv: KVPolicy) -> int:
        """Index of the arm that leaves out the sites of this step that are in ``skipped``.

        Raises:
            PlanError: if leaving them out under ``kv`` would give wrong answers.
        """
        here, arms_of = skipped.intersection(self.sites), arms_under(kv)
        fits = [i for i, arm in enumerate(self.arms) if arm.skipped == here]
        chosen = next((i for i in fits if self.arms[i].kv == arms_of), fits[0])
        if (why := self.arms[chosen].refused) is not None:
            raise PlanError(f"kv={kv!r} cannot skip {', '.join(sorted(here))}: {why}; use kv='project'")
        return chosen


@dataclass(frozen=True)
class Input:
    """A reference to an input of a region, by position."""

    index: int


@dataclass(frozen=True)
class Result:
    """A reference to the result of an earlier kernel call of the same region, by its number among those."""

    index: int


@dataclass(frozen=True)
class KernelCall:
    """A call of a sublayer kernel (an op of :mod:`skipc.kernels`), or ``count``: an input is incremented."""

    name: str
    arguments: tuple[Any, ...]  # constants; inputs of the region as Input; results of earlier calls as Result


@dataclass(frozen=True)
class RegionInfo:
    """A distinct region."""

    name: str
    nodes: int
    calls: int  # places that call it
    compiled: bool  # False: so little work that it runs as it is, without Inductor
    seconds: float = 0.0  # of code generation; C++ builds run beside it
    kernels: tuple[KernelCall, ...] = ()  # all that it does, if that is calling sublayer kernels
    predicated: KernelCall | None = None  # the same, as one that can be told on the device not to run


@dataclass(frozen=True)
class ProgramSpec:
    """Everything about a program but its compiled regions."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Any, ...]  # variable names (as Var) or constants
    sites: tuple[Site, ...]
    parameters: tuple[int, ...]  # positions of the model's parameters among the inputs
    weights: tuple[tuple[str, int], ...] = ()  # names of parameters in the model, and their positions
    exposed: tuple[int, ...] = ()  # outputs that are points of a stream: a skip may make them one tensor
    extent: tuple[Size, Size] = (None, None)  # of the stream: batch and tokens
    regions: tuple[RegionInfo, ...] = field(default=())
    batch: Size = None  # rows of a call, also where the stream has all tokens together
    given: int = -1  # how many of the inputs a call gives; behind them come those of adapters and replacements
    adapted: tuple[str, ...] = ()  # paths of the layers whose adapters are inputs, in order
    left: Mapping[str, str] = field(default_factory=dict)  # those that do not add what these say, and why
    mirrored: tuple[Mirrored, ...] = ()  # adapters among the parameters, which constants of the program follow
    routed: frozenset[str] = frozenset()  # those that take the tokens that a router decides for
    routed_width: int = 0  # of these tokens
    reads: bool = False  # whether the host reads numbers off the device while it runs, as no CUDA graph can


@dataclass(frozen=True)
class Var:
    """A reference to a variable of the program, as opposed to a constant."""

    name: str
