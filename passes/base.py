"""What a pass is. A pass holds only the rewrite; everything around it belongs to :mod:`skipc.passes.manager`."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from skipc.ir.adapters import Mirrored
from skipc.ir.config import Config

if TYPE_CHECKING:
    from skipc.passes.residual import Streams


@dataclass
class PassContext:
    """What passes share besides the graph."""

    config: Config = field(default_factory=Config)
    streams: Streams | None = None  # set by find_sites
    mirrored: Sequence[Mirrored] = ()  # set by fuse_lora


@dataclass(frozen=True)
class PassResult:
    """What a pass did. ``matched`` counts rewrites (or findings, for an analysis)."""

    matched: int = 0
    changed: bool = False
    notes: tuple[str, ...] = ()


class Pass(abc.ABC):
    """One rewrite or analysis of a Dynamo graph.

    Subclasses document themselves in the class docstring: one sentence, then ``Before:`` and ``After:`` in FX text
    with types, then ``Leaves alone:``. The text is shown by ``skipc passes`` and checked by the pass's test.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = True  # may be switched off by Config.disable_passes

    @abc.abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Edit ``gm`` in place."""
