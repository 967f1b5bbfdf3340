"""The host program: what it defers to its end, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import skipc
from tests.harness import STRICT, run_regions_uncompiled

D = 16


class Counting(nn.Module):
    """Three residual linears. The first counts calls: in place, in a tensor that it gets, as a static cache does."""

    def __init__(self, late_reader: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(D, D) for _ in range(3))
        self.late_reader = late_reader

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x) * (count + 1)
        count.add_(1)
        x = x + self.second(x) * (count if self.late_reader else 1)
        return x + self.third(x) * (count if self.late_reader else 1)


@pytest.mark.parametrize("late_reader", [False, True])
def test_counters_run_last_unless_someone_reads_them(monkeypatch: Any, late_reader: bool) -> None:
    run_regions_uncompiled(monkeypatch)
    model = Counting(late_reader).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    twin = Counting(late_reader).eval()
    twin.load_state_dict(model.state_dict())
    nn.init.zeros_(twin.first.weight)
    nn.init.zeros_(twin.first.bias)
    x, count = torch.randn(1, 3, D), torch.zeros((), dtype=torch.long)
    compiled(x, count.clone())
    source = skipc.explain(model, x, count.clone()).program()
    assert ("late.append" in source) is not late_reader
    for call in range(1, 4):
        with compiled.session(skip={"first"}):
            found = compiled(x, count)
        assert count.item() == call
        torch.testing.assert_close(found, twin(x, torch.tensor(call - 1)))
