"""Gates on the device: sites that are told by a number in memory not to run, and that tell later ones.

A kernel of such a site looks at ``skipped`` first: where it is not zero, it hands the stream on and returns before it
reads a weight. (:class:`skipc.kernels.chain.Gates` is the same on the CPU.)"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def decide(
    moments, skipped, closes, threshold, rule, sites, valid, rows,
    HAS_VALID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Close the gates that a site decides about, if the tokens of a call are similar enough (see
    :func:`skipc.kernels.similarity.reached`)."""
    row = tl.arange(0, BLOCK_M)
    there = row < rows
    if HAS_VALID:
        there = there & (tl.load(valid + row, mask=there, other=0) != 0)
    dot = tl.load(moments + 3 * row, mask=there, other=0.0)
    before = tl.load(moments + 3 * row + 1, mask=there, other=0.0)
    after = tl.load(moments + 3 * row + 2, mask=there, other=0.0)
    cosine = dot / tl.maximum(tl.sqrt_rn(before) * tl.sqrt_rn(after), 1e-12)
    count = tl.sum(there.to(tl.int32), 0)
    above = tl.sum((there & (cosine >= threshold)).to(tl.int32), 0)
    mean = tl.sum(tl.where(there, cosine, 0.0), 0) / tl.maximum(count, 1)
    # 0: all tokens; 1: most; 2: their mean (RULE_CODES).
    met = tl.where(rule == 0, above == count, tl.where(rule == 1, 2 * above > count, mean >= threshold))
    if met & (count > 0):
        for begin in range(0, sites, BLOCK_S):
            at = begin + tl.arange(0, BLOCK_S)
            closing = tl.load(closes + at, mask=at < sites, other=0)
            kept = tl.load(skipped + at, mask=at < sites, other=0)
            tl.store(skipped + at, tl.where(closing != 0, 1, kept).to(kept.dtype), mask=at < sites)


@dataclass(frozen=True)
class Gate:
    """What a site does about gates on the device.

    Attributes:
        skipped: int8 ``[sites]``: sites that are skipped, not zero; what this one decides is added.
        site: which one this is.
        moments: fp32 ``[rows, 3]``, written where the site runs; None if nobody wants them.
        closes: int8 ``[sites]``: gates that it closes, not zero; None if it decides nothing.
        threshold, rule: of :func:`skipc.kernels.similarity.reached`, as numbers.
        valid: bool ``[rows]``, False for padding; None if there is none.
    """

    skipped: torch.Tensor
    site: int
    moments: torch.Tensor | None = None
    closes: torch.Tensor | None = None
    threshold: float = 2.0
    rule: int = 0
    valid: torch.Tensor | None = None
