"""Similarity of two points of a residual stream.

It is the cosine of the *stream* before a sublayer and after its addition, for each token: AdaSkip (arXiv 2501.02336,
section 3), FFN-SkipLLM (2404.03865). What is kept of two points are three *moments* for each token, their scalar
product and their squares, from which cosine, ratio of norms, and any mean over tokens follow.
"""

from __future__ import annotations

import torch
from skipc.kernels.library import NATIVE, library

from skipc.ir.gating import BATCH_RULES, BatchRule

library.define("stream_moments(Tensor before, Tensor after) -> Tensor")
library.define("reached(Tensor moments, float threshold, int rule, Tensor? valid) -> bool")
RULE_CODES: dict[BatchRule, int] = {rule: i for i, rule in enumerate(BATCH_RULES)}
_TINY = 1e-8  # norms below are taken for this, as torch's cosine_similarity does


def stream_moments(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Moments of two points of a stream.

    Args:
        before: the stream entering a sublayer, ``[..., width]``, floating.
        after: the stream after its residual addition, of the same shape.

    Returns:
        fp32 ``[..., 3]``: ``sum(before * after)``, ``sum(before ** 2)``, ``sum(after ** 2)``.
    """
    x, y = before.float(), after.float()
    return torch.stack([(x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)], -1)


def _fake(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return before.new_empty((*before.shape[:-1], 3), dtype=torch.float32)


library.impl("stream_moments", stream_moments, "CompositeExplicitAutograd")
torch.library.register_fake("skipc::stream_moments", _fake)


def moments(before: object, after: object) -> torch.Tensor | None:
    """:func:`stream_moments`, or None if the two cannot be compared token by token."""
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return None
    if min(before.dim(), after.dim()) < 2 or before.shape[-1] != after.shape[-1] or before.numel() != after.numel():
        return None
    if not before.is_floating_point():
        return None
    if before.shape != after.shape:
        after = after.reshape(before.shape)
    native = before.dtype == after.dtype and before.dtype in NATIVE
    if native and before.is_cpu and before.is_contiguous() and after.is_contiguous():
        return torch.ops.skipc.stream_moments(before, after)  # type: ignore[no-any-return]
    return stream_moments(before, after)


def cosine(found: torch.Tensor) -> torch.Tensor:
    """The cosine that moments ``[..., 3]`` tell: ``[...]``."""
    dot, before, after = found.unbind(-1)
    return dot / (before.sqrt() * after.sqrt()).clamp(min=_TINY)


def norm_ratio(found: torch.Tensor) -> torch.Tensor:
    """``|after| / |before|`` that moments ``[..., 3]`` tell: ``[...]``."""
    return (found[..., 2] / found[..., 1].clamp(min=_TINY**2)).sqrt()


def stream_similarity(before: object, after: object) -> float | None:
    """Mean cosine over tokens of two points of a stream, or None if they cannot be compared token by token."""
    found = moments(before, after)
    return None if found is None else cosine(found).mean().item()


def reached(found: torch.Tensor, threshold: float, rule: BatchRule, valid: torch.Tensor | None = None) -> bool:
    """Whether the tokens of a call, taken together, are similar enough.

    Args:
        found: moments, fp32 ``[..., 3]``.
        threshold: of the cosine.
        rule: ``all`` tokens reach it, the ``majority`` does, or their ``mean``.
        valid: bool ``[...]``, False for padding; None if there is none. Without a valid token nothing is reached.
    """
    if found.is_cpu and found.dtype == torch.float32 and found.is_contiguous():
        return torch.ops.skipc.reached(found, threshold, RULE_CODES[rule], valid)  # type: ignore[no-any-return]
    return _reached(found, threshold, RULE_CODES[rule], valid)


def _reached(found: torch.Tensor, threshold: float, rule: int, valid: torch.Tensor | None) -> bool:
    cosines = cosine(found.double())[... if valid is None else valid]
    if cosines.numel() == 0:
        return False
    if BATCH_RULES[rule] == "mean":
        return bool(cosines.mean().float() >= torch.tensor(threshold))
    above = cosines.float() >= torch.tensor(threshold)
    return bool(above.all()) if BATCH_RULES[rule] == "all" else bool(2 * above.sum() > above.numel())


library.impl("reached", _reached, "CompositeExplicitAutograd")
