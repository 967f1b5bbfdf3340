"""Similarity of stream points."""

from __future__ import annotations

import torch
from skipc.kernels.similarity import stream_similarity


def test_mean_cosine_over_tokens_in_fp32() -> None:
    a = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    b = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x, y = a.double().flatten(0, 1), b.double().flatten(0, 1)
    truth = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean().item()
    assert abs(stream_similarity(a, b) - truth) < 1e-5
    assert abs(stream_similarity(a, 3 * a) - 1) < 1e-5


def test_incomparable_is_none() -> None:
    x = torch.randn(2, 5, 64)
    assert stream_similarity(x, None) is None
    assert stream_similarity(x, x[:, :2]) is None
    assert stream_similarity(x, x.mean()) is None
    assert stream_similarity(x.long(), x.long()) is None
