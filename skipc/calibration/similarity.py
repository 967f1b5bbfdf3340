"""Similarities and scales of all sites, as AdaSkip measures them (arXiv 2501.02336, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from skipc.kernels.similarity import cosine, norm_ratio
from skipc.model import CompiledModel
from skipc.runtime.gating import Observation
from skipc.runtime.policies.base import Call, Phase
from skipc.runtime.policies.static import Observe


@dataclass(frozen=True)
class Similarities:
    """What was measured, by site.

    Attributes:
        similarity: mean cosine of the stream before and after the site, over all tokens.
        scale: mean ratio of their norms, over all tokens: what AdaSkip multiplies the stream by.
        frobenius: mean over batches of the ratio of the whole tensors' norms: what the released code takes instead.
            Tokens with huge activations dominate it.
    """

    similarity: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    frobenius: dict[str, float] = field(default_factory=dict)

    def ranked(self) -> list[str]:
        """Sites, the most similar first."""
        return sorted(self.similarity, key=lambda name: -self.similarity[name])


class _Sum(Observe):
    def __init__(self, phases: tuple[Phase, ...]):
        super().__init__()
        self.only = phases
        self.sums: dict[str, torch.Tensor] = {}  # float64: tokens, cosines, ratios, batches, ratios of whole tensors

    def fresh(self) -> _Sum:
        return self  # what it sums is read after the session

    def observe(self, call: Call, seen: Observation) -> None:
        if call.phase not in self.only:
            return
        for block in seen.blocks:
            for name, moments in zip(seen.table.sites, block.flatten(1, -2), strict=True):
                rows = moments if seen.valid is None else moments[seen.valid.flatten()]
                if not rows.numel() or rows.isnan().any():
                    continue
                whole = (rows[:, 2].double().sum() / rows[:, 1].double().sum()).sqrt()
                new = torch.stack([
                    torch.tensor(float(len(rows)), dtype=torch.float64), cosine(rows).double().sum(),
                    norm_ratio(rows).double().sum(), torch.tensor(1.0, dtype=torch.float64), whole,
                ])  # fmt: skip
                self.sums[name] = self.sums.get(name, torch.zeros(5, dtype=torch.float64)) + new


@torch.no_grad()
def measure_similarity(
    compiled: CompiledModel,
    batches: Iterable[torch.Tensor | Mapping[str, Any]],
    phases: tuple[Phase, ...] = ("prefill", "decode"),
    generate: int = 0,
) -> Similarities:
    """Run ``compiled`` over text and measure the stream around every site.

    Args:
        compiled: what :func:`skipc.compile` returned.
        batches: int64 ``[batch, tokens]`` each, or keyword arguments of a call.
        phases: which calls count.
        generate: continue each batch by so many tokens, greedily (for decoders, with ``phases=("decode",)``).
    """
    from skipc.runtime.generation import generate as decode

    policy = _Sum(phases)
    for batch in batches:
        with compiled.session(policy=policy):
            if generate:
                assert isinstance(batch, torch.Tensor)
                decode(compiled, batch, max_new_tokens=generate, eos_token_id=None)
            elif isinstance(batch, torch.Tensor):
                compiled(batch)
            else:
                compiled(**batch)
    return Similarities(
        {n: (s[1] / s[0]).item() for n, s in policy.sums.items()},
        {n: (s[2] / s[0]).item() for n, s in policy.sums.items()},
        {n: (s[4] / s[3]).item() for n, s in policy.sums.items()},
    )
