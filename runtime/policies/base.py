"""What a policy is.

A policy is asked before each compiled call of a session which gates to set, and told afterwards what the call skipped
and how similar the stream was around each site that ran. What must be decided in the middle of a call is part of the
:class:`~skipc.ir.gating.GateTable` that it returns, and decided by the program. Only routers, which look at the stream
itself, are asked there, site by site (:meth:`Policy.route`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import torch
from skipc.runtime.gating import Observation

from skipc.ir.gating import GateTable
from skipc.ir.site import Site, SiteKind

Phase = Literal["prefill", "decode"]


class Call(NamedTuple):
    """One compiled call of a session.

    Attributes:
        sites: of the program that is called, in order of execution.
        batch: rows; 0 if the program cannot tell.
        tokens: new tokens of each row; 0 if the program cannot tell.
        position: tokens of each row in earlier calls of the session.
        phase: ``decode`` for one token behind others, unless the session says otherwise.
    """

    sites: tuple[Site, ...]
    batch: int
    tokens: int
    position: int
    phase: Phase

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(site.name for site in self.sites)


class Policy(ABC):
    """Base of all policies. The constructor takes the settings; all else belongs to one session.

    Attributes:
        only_grows: True if an attention that was skipped once stays skipped for the rest of the session. Only then may
            a session use ``kv="none"``.
    """

    only_grows: bool = False

    def fresh(self) -> Self:
        """The same policy without any memory, for a new session."""
        made = copy.deepcopy(self)
        made.reset()
        return made

    def reset(self) -> None:
        """Forget everything that was observed. Policies that remember nothing need not define it."""
        return

    @abstractmethod
    def decide(self, call: Call) -> GateTable:
        """The gates of a call. Must not change the policy: the call may fail. Return one object for equal answers,
        which the program then need not look at again."""

    def route(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor:
        """Which tokens a site runs on, asked when the stream has come to a site that the gates name as ``routed``.

        Args:
            stream: ``[batch, tokens, width]``, before the site.

        Returns:
            bool ``[batch, tokens]``.
        """
        raise NotImplementedError(f"{type(self).__name__} routes {site}, but does not say how")

    def instead(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor | None:
        """What is added to the stream of tokens that skip a routed site, ``[tokens, width]``; None for nothing."""
        return None

    def observe(self, call: Call, seen: Observation) -> None:
        """The call has run. Not called for a call that failed. Policies that learn nothing need not define it."""
        return


class TableCache:
    """The last table that a policy made, for as long as what it was made of stays equal."""

    def __init__(self) -> None:
        self._key: object = None
        self._table: GateTable | None = None

    def get(self, key: object, make: Callable[[], GateTable]) -> GateTable:
        """The table for ``key``."""
        if self._table is None or self._key != key:
            self._key, self._table = key, make()
        return self._table


def layers_of(sites: Sequence[Site]) -> dict[tuple[int, int], list[Site]]:
    """Sites by stream and layer, both in order."""
    found: dict[tuple[int, int], list[Site]] = {}
    for site in sites:
        found.setdefault((site.stream, site.layer), []).append(site)
    return found


def is_feed_forward(site: Site) -> bool:
    """True for an MLP, of one expert or several."""
    return site.kind in (SiteKind.MLP, SiteKind.MOE)
