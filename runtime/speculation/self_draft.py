"""The model itself as its draft, without some of its sublayers."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from skipc.runtime.sessions import Session, innermost, sites_of
from skipc.runtime.speculation.drafts import GoesOn, Proposal

from skipc.ir.errors import ConfigError, PlanError
from skipc.ir.plan import Plan
from skipc.ir.program import KVPolicy

if TYPE_CHECKING:
    from skipc.runtime.decoder import Decoder

log = logging.getLogger("skipc")

_KINDS = 10  # of tokens, by how likely the draft finds them


class SelfDraft:
    """Drafts with the model's own weights under a plan, on the model's own cache (Draft & Verify, arXiv 2309.08168).

    The plan's sublayers are left out or replaced while drafting; the call that judges the draft is one of the whole
    model, and writes over what drafting left in the cache. A session's own skips and adapters hold for drafts, too. A
    token's kind is how likely the draft found it, in tenths, so that drafts end where it grows unsure (Kangaroo's
    second exit, arXiv 2404.18911), once that has been seen to tell.

    Args:
        plan: what to draft with, or names of sites to leave out. One with ``replace`` may end in a trained adapter: see
            ``examples/train_layerskip.py``.
        depth: instead, leave out all layers from this one on: an early exit with the shared head (LayerSkip, arXiv
            2404.16710), for models that were trained for it.

    Raises:
        ConfigError: unless one of them is given.
        UnknownSiteError: at the first request, for a name that is no site.
        PlanError: at the first request, if a model has no layers from ``depth`` on, or under a session whose plan has
            weights of its own, where this one has them, too.
    """

    def __init__(self, plan: Plan | Iterable[str] | None = None, *, depth: int | None = None):
        if (plan is None) == (depth is None):
            raise ConfigError("a SelfDraft is given either a plan or a depth")
        if depth is not None and (not isinstance(depth, int) or depth < 1):
            raise ConfigError(f"depth is a number of layers, 1 or more, not {depth!r}")
        self.depth = depth
        self._given = plan if isinstance(plan, Plan) or plan is None else Plan(skip=plan)
        self.key: Hashable = self._given.key if self._given is not None else ("depth", depth)
        self._rows: list[int] = []  # the last token of each

    def plan_for(self, model: torch.nn.Module) -> Plan:
        """What it drafts with on a model that is compiled."""
        if self._given is not None:
            return self._given
        assert self.depth is not None
        deep = [site.name for site in sites_of(model) if site.layer >= self.depth]
        if not deep:
            raise PlanError(f"the model has no sublayers in layer {self.depth} or behind it that could be left out")
        return Plan(skip=deep)

    def attach(self, decoder: Decoder, goes_on: GoesOn, watched: bool) -> None:
        """See :class:`ModelDraft`."""
        self._decoder, self._goes_on, self._watched = decoder, goes_on, watched
        self._plan = self.plan_for(decoder.model)
        self._session = self._opened(self._plan)

    def _opened(self, plan: Plan) -> Session:
        return _session(self._decoder.model, plan, "none")  # what is written is written over anyway

    def start(self, rows: Sequence[Sequence[int]]) -> None:
        """A new request with these prompts."""
        self._rows = [row[-1] for row in rows]

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """``tokens`` came in a row."""
        if tokens:
            self._rows[row] = tokens[-1]

    def propose(self, most: Sequence[int]) -> list[Proposal]:
        """The likeliest tokens under the plan, as long as one more is worth its time."""
        if not any(most):
            return [Proposal() for _ in most]
        try:
            return self._propose(most)
        except PlanError as error:
            if self._session.kv != "none":
                raise
            log.info("drafts write all keys and values: %s", error)
            self._session = _session(self._decoder.model, self._plan, "project")
            return self._propose(most)

    def _propose(self, most: Sequence[int]) -> list[Proposal]:
        decoder, running = self._decoder, [i for i, n in enumerate(most) if n > 0]
        made: list[tuple[list[int], list[Hashable]]] = [([], []) for _ in most]
        token = torch.tensor(self._rows, device=decoder.position.device)
        watched = self._watched
        with self._session, decoder.ahead():
            for _ in range(max(most)):
                logits = decoder.decode(token, watched)
                watched = False  # no code but this runs in between
                token = logits.argmax(-1)
                for (tokens, kinds), t, kind in zip(made, token.tolist(), _kinds(logits), strict=True):
                    tokens.append(t)
                    kinds.append(kind)
                if not self._goes_on([made[i][1] for i in running]):
                    break
        return [Proposal(tokens[:n], kinds[:n]) for (tokens, kinds), n in zip(made, most, strict=True)]


def _kinds(logits: torch.Tensor) -> list[Hashable]:
    """Of the likeliest token of each row. (``logsumexp`` takes eight times as long as ``softmax``.)"""
    likely = logits.float().softmax(-1).amax(-1).nan_to_num(0.0)
    return [min(int(p * _KINDS), _KINDS - 1) for p in likely.tolist()]


def _session(model: torch.nn.Module, plan: Plan, kv: KVPolicy) -> Session:
    """One for drafting, inside the one in force."""
    outer = innermost(model)
    if outer is not None:
        return outer.drafting(plan, kv)
    # What was compiled with a preset's plan drafts with its weights, too.
    return Session(model, plan.skip, kv) if plan.whole else Session(model, kv=kv, plan=plan)
