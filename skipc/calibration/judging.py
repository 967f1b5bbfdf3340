"""How far a plan is from the whole model, on text that it was not made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from skipc.calibration.batches import Batch, call_on, result_of
from skipc.ir.plan import Plan

_DRAWS = 2000
_NONE = -100  # in place of a token that is not judged


@dataclass(frozen=True)
class Judgement:
    """What a plan loses.

    Attributes:
        measure: ``perplexity``: loss is the perplexity over the whole model's, minus 1. ``cosine``: loss is 1 minus the
            mean cosine of rows' embeddings (means over tokens) to the whole model's.
        loss: see above.
        low, high: its 95 % interval, by bootstrap over the batches of each kind.
        agreement: share of tokens whose likeliest successor is the whole model's; None without logits.
        tokens: judged on.
        parts: loss, low and high of each kind of text; empty where all is of one kind.
    """

    measure: str
    loss: float
    low: float
    high: float
    agreement: float | None
    tokens: int
    parts: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {kind: (loss, low, high) for kind, (loss, low, high) in self.parts.items()}  # JSON has lists
        object.__setattr__(self, "parts", found)

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", {self.agreement:.0%} of tokens unchanged"
        each = ", ".join(f"{kind} {loss:+.1%}" for kind, (loss, _, _) in self.parts.items())
        return f"{self.loss:+.1%} {self.measure} [{self.low:+.1%}, {self.high:+.1%}]{same}{each and f' ({each})'}"


class Judge:
    """Compares plans with a model on some batches. What the model itself gives is computed once and kept as one number
    for each token (or one embedding for each row).

    Args:
        kinds: of text, one for each batch: each is judged by itself, too.
    """

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module, batches: Sequence[Batch], kinds: Sequence[str] | None = None):
        self.model, self.batches = model, list(batches)
        self._members: dict[str, list[int]] = {}
        for i, (kind, _) in enumerate(zip(kinds or [""] * len(self.batches), self.batches, strict=True)):
            self._members.setdefault(kind, []).append(i)
        outputs = [call_on(model, self.batches[0])]
        self.measure = "perplexity" if is_causal(model, outputs[0]) else "cosine"
        self._own = [self._measured(b, outputs.pop() if outputs else None) for b in self.batches]

    def judge(self, plan: Plan) -> Judgement:
        """What ``plan`` loses, in eager."""
        return self.judge_call(lambda batch: call_on(self.model, batch, plan))

    @torch.no_grad()
    def judge_call(self, call: Callable[[Batch], object]) -> Judgement:
        """What anything else that gives outputs for batches loses."""
        losses, same, count = [], 0, 0
        for batch, (own, likeliest) in zip(self.batches, self._own, strict=True):
            found, chosen = self._measured(batch, call(batch))
            if self.measure == "perplexity":
                losses.append((found - own).mean())
                assert likeliest is not None
                assert chosen is not None
                same, count = same + int((likeliest == chosen).sum()), count + len(chosen)
            else:
                losses.append(1 - F.cosine_similarity(own, found, dim=-1).mean())
        lost = torch.stack(losses).double()
        generator = torch.Generator().manual_seed(0)
        drawn = {
            kind: torch.tensor(some)[torch.randint(len(some), (_DRAWS, len(some)), generator=generator)]
            for kind, some in self._members.items()
        }
        loss, low, high = self._interval(lost, lost[torch.cat([*drawn.values()], 1)])
        parts = {kind: self._interval(lost[some], lost[drawn[kind]]) for kind, some in self._members.items()}
        tokens = sum(b.tokens for b in self.batches)
        unchanged = same / count if count else None
        return Judgement(self.measure, loss, low, high, unchanged, tokens, parts if len(parts) > 1 else {})

    def _interval(self, lost: torch.Tensor, draws: torch.Tensor) -> tuple[float, float, float]:
        """A loss and its interval: of batches, ``[batches]``, and of those drawn from them, ``[draws, batches]``."""
        ends = draws.mean(1).quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device))
        means = torch.cat([lost.mean()[None], ends])
        loss, low, high = (means.expm1() if self.measure == "perplexity" else means).tolist()
        return loss, low, high

    def _measured(self, batch: Batch, output: object | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For language models, nats lost on each token and the likeliest one; for others, embeddings of rows."""
        found = result_of(call_on(self.model, batch) if output is None else output).float()
        if self.measure == "cosine":
            if found.dim() == 2:
                return found, None
            valid = self._valid(batch)
            mask = torch.ones(found.shape[:2]) if valid is None or valid.shape != found.shape[:2] else valid.float()
            mask = mask.to(found.device)[..., None]
            return (found * mask).sum(1) / mask.sum(1), None
        targets = self._targets(batch)
        kept = targets != _NONE
        logits = found[kept]
        return F.cross_entropy(logits, targets[kept], reduction="none"), logits.argmax(-1)

    def _targets(self, batch: Batch) -> torch.Tensor:
        """The token that each logit is for: int64 ``[batch, tokens]``, with ``_NONE`` at the end and beside padding."""
        inputs, valid = batch.inputs, self._valid(batch)
        if self._is_paired and "decoder_input_ids" not in inputs:  # the model shifts these by itself
            targets = inputs["labels" if "labels" in inputs else "input_ids"]
            return targets if valid is None else targets.masked_fill(~valid, _NONE)
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        targets = F.pad(ids[:, 1:], (0, 1), value=_NONE)
        return targets if valid is None else targets.masked_fill(~(valid & F.pad(valid[:, 1:], (0, 1))), _NONE)

    def _valid(self, batch: Batch) -> torch.Tensor | None:
        """:attr:`Batch.valid` of the tokens that the model answers with: of an encoder-decoder, the decoder's."""
        decodes = {"decoder_input_ids", "decoder_attention_mask"} & batch.inputs.keys()
        of_encoder = self._is_paired and "labels" in batch.inputs and not decodes
        return None if of_encoder else batch.valid

    @property
    def _is_paired(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))


def is_causal(model: torch.nn.Module, output: object) -> bool:
    """Whether ``output``'s logits are those of each token's successor. Hugging Face's models say whether they generate;
    of others, logits for each token are taken for that."""
    logits = getattr(output, "logits", None)
    generates = getattr(model, "can_generate", lambda: True)
    return isinstance(logits, torch.Tensor) and logits.dim() == 3 and bool(generates())
