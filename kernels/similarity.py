"""Similarity of two points of a residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def stream_similarity(before: object, after: object) -> float | None:
    """Cosine between two stream points, per token in fp32, averaged over tokens.

    Args:
        before: the stream entering a sublayer, ``[..., width]``, floating.
        after: the stream after its residual addition, of the same number of elements and width.

    Returns:
        The mean cosine, or None if the two cannot be compared token by token.

    The cosine of the *stream*, not of the branch: AdaSkip (arXiv 2501.02336, section 3), FFN-SkipLLM (2404.03865).
    """
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return None
    if min(before.dim(), after.dim()) < 2 or before.shape[-1] != after.shape[-1] or before.numel() != after.numel():
        return None
    if not before.is_floating_point():
        return None
    width = before.shape[-1]
    return (
        F.cosine_similarity(before.reshape(-1, width).float(), after.reshape(-1, width).float(), dim=-1).mean().item()
    )
