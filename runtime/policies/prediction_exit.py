"""Early exit by the prediction: PABEE's patience (arXiv 2006.04152), and the confidence of a shared head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from skipc.runtime.policies.base import Call, Policy, TableCache, layers_of

from skipc.ir.errors import ConfigError
from skipc.ir.gating import GateTable

Head = Callable[[torch.Tensor], torch.Tensor]


class PredictionExit(Policy):
    """Leave the stream once what it predicts is settled. Before each layer the head reads the stream; a token that has
    left skips all sites behind (attentions still write its keys and values).

    Args:
        head: from the stream, ``[batch, tokens, width]``, to logits, ``[batch, tokens, classes]``; or one for each
            layer, by its number (PABEE trains a classifier a layer). A language model's shared head is
            ``lambda x: model.lm_head(model.model.norm(x))``.
        criterion: ``confidence``: the largest probability reaches ``threshold``. ``patience``: so many layers in a row
            predict what the one before does.
        threshold, patience: see ``criterion``.
        minimum: layers that always run.
        rule: ``gather``: each token leaves by itself. ``all``: nobody leaves before everybody would (PABEE).

    It pays where a head costs less than the layers it saves: classifiers, and language models of many layers and a
    small vocabulary.
    """

    def __init__(
        self,
        head: Head | Mapping[int, Head],
        criterion: Literal["confidence", "patience"] = "confidence",
        threshold: float = 0.9,
        patience: int = 2,
        minimum: int = 1,
        rule: Literal["gather", "all"] = "gather",
    ):
        if criterion not in ("confidence", "patience") or rule not in ("gather", "all"):
            raise ConfigError(
                f"criterion is 'confidence' or 'patience', rule 'gather' or 'all': {criterion!r}, {rule!r}"
            )
        if patience < 1 or minimum < 1:
            raise ConfigError(f"patience and minimum are 1 or more, not {patience} and {minimum}")
        self.head, self.criterion, self.threshold, self.patience = head, criterion, threshold, patience
        self.minimum, self.rule = minimum, rule
        self._tables = TableCache()
        self.reset()

    def fresh(self) -> PredictionExit:
        """The same heads, which are not copied, without memory."""
        return type(self)(self.head, self.criterion, self.threshold, self.patience, self.minimum, self.rule)

    def reset(self) -> None:
        """Forget the last call."""
        self._left: torch.Tensor | None = None
        self._predicted: torch.Tensor | None = None
        self._agreed: torch.Tensor | None = None

    def decide(self, call: Call) -> GateTable:
        """Every site behind the first layers is asked about."""

        def make() -> GateTable:
            asked = [s.name for s in call.sites if s.layer >= self.minimum]
            return GateTable.of(call.names, routed=asked, measures=False)

        return self._tables.get(call.sites, make)

    @torch.no_grad()
    def route(self, call: Call, site: str, stream: torch.Tensor) -> torch.Tensor:
        """Tokens that have not left."""
        firsts = {sites[0].name: layer for (_, layer), sites in layers_of(call.sites).items()}
        if site in firsts:
            layer = firsts[site]
            if layer == self.minimum:
                self.reset()  # a call begins
            if self._left is None or not self._left.all():
                self._judge(stream, self.head[layer] if isinstance(self.head, Mapping) else self.head)
        assert self._left is not None
        left = self._left if self.rule == "gather" else self._left.all().expand(self._left.shape)
        return ~left

    def _judge(self, stream: torch.Tensor, head: Head) -> None:
        logits = head(stream).float()
        left = torch.zeros(stream.shape[:-1], dtype=torch.bool, device=stream.device)
        if self.criterion == "confidence":
            left = logits.softmax(-1).amax(-1) >= self.threshold
        else:
            predicted = logits.argmax(-1)
            agreed = torch.zeros_like(predicted) if self._agreed is None else self._agreed
            if self._predicted is not None:
                agreed = torch.where(predicted == self._predicted, agreed + 1, 0)
                left = agreed >= self.patience
            self._predicted, self._agreed = predicted, agreed
        self._left = left if self._left is None else self._left | left
