"""Random residual graphs with writes, views and shared producers; random skip sets; the program equals eager."""

from __future__ import annotations

from typing import Any

import pytest
import skipc.passes.lowering.outline as outline
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.harness import check_model

D, T = 8, 4

# What a generated model may do between two additions, and how it adds. Each is a statement on `x` (the stream), `c` (a
# cache given by the caller), `n` (a value shared by later layers) and `i` (the layer).
ADD = ("x + f(x)", "f(x) + x", "x += f(x)", "x.add_(f(x))", "norm(x + f(x))", "x * 1.5 + f(x)", "x + f(x) * 0.5",
       "parallel",
       "x + norm(f(x))", "x + f(n)", "alpha")  # fmt: skip
EXTRA = (
    "nothing",
    "cache",
    "early view",
    "reshape",
    "write row",
    "write view",
    "share",
    "return",
    "return view",
    "scale",
    "mask",
)


class Random(nn.Module):
    """A model from a list of (how to add, what else to do, kind of branch)."""

    def __init__(self, layers: list[tuple[str, str, bool]], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = layers
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in layers)
        self.others = nn.ModuleList(nn.Linear(D, D) for _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in layers)
        self.writers = nn.ModuleList(nn.Linear(D, D) for _ in layers)
        self.outer = nn.ModuleList(nn.LayerNorm(D) for _ in layers)
        self.head = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> Any:
        x = self.head(x)
        tokens = x.shape[1]
        n, results = x * 2, []
        for i, (add, extra, attends) in enumerate(self.layers):
            f, g, norm = self.linears[i], self.others[i], self.norms[i]
            view = c[i, :, :tokens] if extra == "early view" else None
            if extra in ("cache", "early view"):
                c[i, :, :tokens] = F.silu(self.writers[i](x))
            if attends:
                keys = view if view is not None else c[i]
                y = f(F.scaled_dot_product_attention(x, keys, keys))
            else:
                y = f(norm(n if add == "x + f(n)" else x))
            if extra == "reshape":
                x, y = x.reshape(-1, D), y.reshape(-1, D)
            if add in ("x + f(x)", "x + f(n)"):
                x = x + y
            elif add == "f(x) + x":
                x = y + x
            elif add == "x += f(x)":
                x += y
            elif add == "x.add_(f(x))":
                x.add_(y)
            elif add == "norm(x + f(x))":
                x = self.outer[i](x + y)
            elif add == "x * 1.5 + f(x)":
                x = x * 1.5 + y
            elif add == "x + f(x) * 0.5":
                x = x + y * 0.5
            elif add == "x + norm(f(x))":
                x = x + self.outer[i](y)
            elif add == "alpha":
                x = torch.add(x, y, alpha=2)
            else:
                x = x + g(x) + y if i % 2 else y + g(x) + x
            if extra == "reshape":
                x = x.view(-1, tokens, D)
            elif extra == "write row":
                x[:, 0] = 0
            elif extra == "write view":
                x.view(-1, D)[1].mul_(3)
            elif extra == "share":
                n = F.gelu(x)
            elif extra == "return":
                results.append(x)
            elif extra == "return view":
                results.append(x[:, -1])
            elif extra == "scale":
                x = x * 0.7
            elif extra == "mask":
                x.masked_fill_(x > 2, 0.0)
        return self.head(norm(x)), *results


layer = st.tuples(st.sampled_from(ADD), st.sampled_from(EXTRA), st.booleans())


def check(layers: list[tuple[str, str, bool]], batch: int, seed: int) -> None:
    torch._dynamo.reset()  # every example is a new model of one class: Dynamo would count them all against one limit
    torch.manual_seed(seed + 1)
    model = Random([*layers, ("x + f(x)", "nothing", False)], seed).eval()
    check_model(model, torch.randn(batch, T, D), torch.randn(len(layers) + 1, batch, T + 2, D), subsets=4, seed=seed)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(layer, min_size=1, max_size=4), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_program_equals_eager(layers: list[tuple[str, str, bool]], batch: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outline, "compile_region", lambda gm, config, checked=True: lambda arguments: gm.forward(*arguments)
        )
        check(layers, batch, seed)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(layer, min_size=1, max_size=5), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_program_equals_eager_long(layers: list[tuple[str, str, bool]], batch: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            outline, "compile_region", lambda gm, config, checked=True: lambda arguments: gm.forward(*arguments)
        )
        check(layers, batch, seed)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(layer, min_size=2, max_size=3), st.integers(0, 1000))
def test_compiled_program_equals_eager(layers: list[tuple[str, str, bool]], seed: int) -> None:
    check(layers, 2, seed)
