"""What a caller of ``skipc.generate`` says about speculation, and is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from skipc.kernels import native
from skipc.kernels.device import on_cpu
from skipc.runtime.speculation.drafts import Draft, PromptLookup

from skipc.ir.errors import ConfigError

_WIDTHS = (2, 4, 8)
_ROWS = 12  # of a call, at most: more take their own time, however few weights they share (measured on CPUs)
_ROWS_OF_TILES = 16  # where products use tile registers


@dataclass
class SpeculationStats:
    """What drafting did in a request.

    Attributes:
        calls, seconds: of the full model, by tokens of each row; seconds with all that belongs to a call.
        drafted, accepted: tokens that were judged, and those among them that came.
        drafting: seconds in which drafts were made.
        steps: of models, to make drafts.
        plain: why nothing was drafted, if so.
    """

    calls: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, float] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    drafting: float = 0.0
    steps: int = 0
    plain: str | None = None

    def note(self, width: int, seconds: float, drafting: float) -> None:
        """One call."""
        self.calls[width] += 1
        self.seconds[width] = self.seconds.get(width, 0.0) + seconds
        self.drafting += drafting

    @property
    def acceptance(self) -> float:
        """Share of the judged tokens that came; NaN if none was judged."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class Speculation:
    """How ``skipc.generate`` speculates.

    Args:
        draft: what proposes tokens; :class:`PromptLookup` by default. Of several, those that only look up
            (:class:`NGramCache`, too) are asked each time, and models (:class:`SelfDraft`) where one promises more than
            look-ups do, and more than the other models.
        widths: how many tokens of each row calls of the full model may take that judge drafts; each is compiled when it
            is first used. None: those that suit the batch.

    Attributes:
        stats: of the last request.
    """

    def __init__(self, draft: Draft | Sequence[Draft] | None = None, widths: Sequence[int] | None = None):
        if widths is not None and (not widths or any(not isinstance(w, int) or w < 2 for w in widths)):
            raise ConfigError(f"widths of calls that judge drafts are 2 or more, got {widths!r}")
        self.drafts: tuple[Draft, ...] = tuple(draft) if isinstance(draft, Sequence) else (draft or PromptLookup(),)
        if not self.drafts:
            raise ConfigError("speculation needs a draft")
        self.widths = tuple(widths) if widths is not None else None
        self.stats = SpeculationStats()

    def widths_for(self, batch: int, model: torch.nn.Module) -> tuple[int, ...]:
        """Of all calls of a model, plain ones included."""
        if self.widths is not None:
            return (1, *self.widths)
        weight = next(model.parameters())
        tiles = weight.dtype == torch.bfloat16 and on_cpu(weight) and native.tiles()
        return (1, *[w for w in _WIDTHS if batch * w <= (_ROWS_OF_TILES if tiles else _ROWS)][-2:])
