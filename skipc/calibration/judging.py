"""How far a plan is from the whole model, on text that it was not made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from skipc.calibration.batches import Batch, call_on, result_of
from skipc.ir.plan import Plan

_DRAWS = 2000


@dataclass(frozen=True)
class Judgement:
    """What a plan loses.

    Attributes:
        measure: ``perplexity``: loss is the perplexity over the whole model's, minus 1. ``cosine``: loss is 1 minus the
            mean cosine of rows' embeddings (means over tokens) to the whole model's.
        loss: see above.
        low, high: its 95 % interval, by bootstrap over batches.
        agreement: share of tokens whose likeliest successor is the whole model's; None without logits.
        tokens: judged on.
    """

    measure: str
    loss: float
    low: float
    high: float
    agreement: float | None
    tokens: int

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", {self.agreement:.0%} of tokens unchanged"
        return f"{self.loss:+.1%} {self.measure} [{self.low:+.1%}, {self.high:+.1%}]{same}"


class Judge:
    """Compares plans with a model on some batches. What the model itself gives is computed once and kept as one number
    for each token (or one embedding for each row)."""

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module, batches: Sequence[Batch]):
        self.model, self.batches = model, list(batches)
        outputs = [call_on(model, self.batches[0])]
        self.measure = "perplexity" if is_causal(model, outputs[0]) else "cosine"
        self._own = [self._measured(b, outputs.pop() if outputs else None) for b in self.batches]

    def judge(self, plan: Plan) -> Judgement:
        """What ``plan`` loses, in eager."""
        return self.judge_call(lambda batch: call_on(self.model, batch, plan.weights, plan.skip))

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
        draws = torch.randint(len(lost), (_DRAWS, len(lost)), generator=torch.Generator().manual_seed(0))
        means = torch.cat([lost.mean()[None], lost[draws].mean(1).quantile(torch.tensor([0.025, 0.975]).double())])
        loss, low, high = (means.expm1() if self.measure == "perplexity" else means).tolist()
        tokens = sum(b.tokens for b in self.batches)
        return Judgement(self.measure, loss, low, high, same / count if count else None, tokens)

    def _measured(self, batch: Batch, output: object | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For language models, nats lost on each token and the likeliest one; for others, embeddings of rows."""
        found = result_of(call_on(self.model, batch) if output is None else output).float()
        valid = batch.valid
        if self.measure == "cosine":
            if found.dim() == 2:
                return found, None
            mask = torch.ones(found.shape[:2]) if valid is None or valid.shape != found.shape[:2] else valid.float()
            mask = mask.to(found.device)[..., None]
            return (found * mask).sum(1) / mask.sum(1), None
        targets = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))[:, 1:].flatten()
        kept = torch.ones_like(targets, dtype=torch.bool) if valid is None else (valid[:, 1:] & valid[:, :-1]).flatten()
        logits = found[:, :-1].flatten(0, 1)[kept]
        return F.cross_entropy(logits, targets[kept], reduction="none"), logits.argmax(-1)


def is_causal(model: torch.nn.Module, output: object) -> bool:
    """Whether ``output``'s logits are those of each token's successor. Hugging Face's models say whether they generate;
    of others, logits for each token are taken for that."""
    logits = getattr(output, "logits", None)
    generates = getattr(model, "can_generate", lambda: True)
    return isinstance(logits, torch.Tensor) and logits.dim() == 3 and bool(generates())
