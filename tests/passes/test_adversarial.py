"""Models written to break the passes: in-place arithmetic, views, aliases, odd branches, clashing names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipc
from skipc.ir.site import Reason
from tests.harness import STRICT, check_model, eager_skip, run_regions_uncompiled

D = 16


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Attn(nn.Module):
    """One-head attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v))


class Net(nn.Module):
    """Parts for a forward given as a function."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.mlp2, self.attn = Mlp(), Mlp(), Attn()
        self.l, self.head, self.q, self.o = (nn.Linear(D, D) for _ in range(4))
        self.gate = nn.Linear(D, D)
        self.n, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.point = nn.Parameter(torch.randn(1, 5, D))
        self.tail, self.arm, self.attention = (nn.Parameter(torch.randn(D)) for _ in range(3))
        self.__dict__["function"] = forward

    def forward(self, *args: Any) -> Any:
        return self.__dict__["function"](self, *args)


CASES: dict[str, Callable[..., Any]] = {}


def case(function: Callable[..., Any]) -> Callable[..., Any]:
    CASES[function.__name__] = function
    return function


@case
def write_through_view_of_a_sum(s: Any, x: torch.Tensor) -> Any:
    h = s.l(x)
    h += x
    v = h.view(-1, D)
    v[0] = 3.0
    h = h + s.mlp(h)
    return s.head(h)


@case
def two_in_place_sums(s: Any, x: torch.Tensor) -> Any:
    h = s.l(x)
    h += s.attn(h)
    h += s.mlp(h)
    return h


@case
def chained_in_place_arithmetic(s: Any, x: torch.Tensor) -> Any:
    h = s.l(x).mul_(2).add_(1)
    return s.head(h + s.mlp(h))


@case
def in_place_with_two_names(s: Any, x: torch.Tensor) -> Any:
    y = s.l(x)
    h = s.head(x)
    y.add_(h)
    h.add_(x)
    return y + s.mlp(h + y)


@case
def inplace_keyword(s: Any, x: torch.Tensor) -> Any:
    b = s.l(torch.ones(5, D))
    v = b[:2]
    F.relu(input=b, inplace=True)
    x = x + s.mlp(x)
    return x + s.mlp2(x) * v.sum()


@case
def foreach_write(s: Any, x: torch.Tensor) -> Any:
    h = s.l(x)
    v = h[:, :1]
    torch._foreach_add_([h], 1.0)
    h = h + s.mlp(h)
    return s.head(h), v


@case
def names_that_clash(s: Any, x: torch.Tensor) -> Any:
    attention = s.l(torch.ones(D))
    x = x + s.attn(x) * attention * s.attention
    x = x + s.mlp(x) * s.arm
    return s.head(x) * s.tail


@case
def row_of_the_stream_is_overwritten(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    h[:, 0] = 0
    h = h + s.mlp2(h)
    return s.head(h)


@case
def stream_is_masked_in_place(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    h[h > 1] = 0
    h = h + s.mlp2(h)
    return s.head(h)


@case
def stream_is_written_through_a_view(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    row = h[:, 0]
    row.add_(1)
    h = h + s.attn(h)
    h.view(10, D)[0] = 9
    return s.head(h + s.mlp2(h))


@case
def post_norm_stream_is_overwritten(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    h[:, 0] = 0
    x = s.n(h)
    return s.n2(x + s.mlp2(x))


@case
def returns_a_view_of_the_stream(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    return h[:, 0]


@case
def returns_stream_and_view(s: Any, x: torch.Tensor) -> Any:
    h = x + s.mlp(x)
    g = h + s.attn(h)
    return h, g.view(-1), g


@case
def stream_starts_at_a_parameter(s: Any, x: torch.Tensor) -> Any:
    q = s.point + s.mlp(s.point)
    q = q + s.attn(q)
    return q[0:1] + 0 * x[0, :1], q.transpose(1, 2)


@case
def transposed_stream(s: Any, x: torch.Tensor) -> Any:
    t = x.transpose(1, 2).contiguous().transpose(1, 2)
    h = s.mlp(t) + t
    h = s.n(h.reshape(-1, D))
    return s.head(h)


@case
def mixed_dtypes(s: Any, x: torch.Tensor) -> Any:
    h = x.to(torch.bfloat16)
    h = h.float() + s.mlp(h.float())
    y = h.to(torch.bfloat16) + s.attn(h)
    return s.head(y + s.mlp2(y))


@case
def branch_reads_another_branch(s: Any, x: torch.Tensor) -> Any:
    a = s.attn(x)
    b = s.mlp(a)
    x = x + a + b
    return s.head(x + s.mlp2(x))


@case
def branch_is_also_returned(s: Any, x: torch.Tensor) -> Any:
    a = s.attn(x)
    y = x + a
    y = y + s.mlp(y)
    return s.head(y), s.l(a)


@case
def branch_counted_twice(s: Any, x: torch.Tensor) -> Any:
    a = s.attn(x)
    x = a + x + a
    return x + s.mlp(x)


@case
def gate_is_no_module_of_the_branch(s: Any, x: torch.Tensor) -> Any:
    x = x + s.mlp2(x) * torch.sigmoid(s.gate(x))
    return x + s.mlp(x)


@case
def fill_keeps_no_zero(s: Any, x: torch.Tensor) -> Any:
    x = x + s.l(F.pad(s.mlp(x)[:, 1:], (0, 0, 1, 0), value=2.0))
    return x + s.attn(x)


@case
def parallel_branches_with_scale(s: Any, x: torch.Tensor) -> Any:
    n = s.n(x)
    x = x + s.attn(n) * 0.5 + s.mlp(n) * 2.0
    n = s.n2(x)
    return s.head(s.mlp2(n) + x + s.attn(n))


@case
def two_streams_from_one_point(s: Any, x: torch.Tensor) -> Any:
    n = s.n(x)
    return s.head(x + s.mlp(n)), s.l(x + s.mlp2(n))


@case
def scaled_shortcut(s: Any, x: torch.Tensor) -> Any:
    x = s.n(x * 1.7 + s.attn(x))
    return s.n2(x * 1.7 + s.mlp(x))


@case
def input_is_written(s: Any, x: torch.Tensor) -> Any:
    y = x + s.mlp(x)
    x.mul_(2)
    return y + s.attn(y) + x.sum()


@case
def constant_outputs(s: Any, x: torch.Tensor) -> Any:
    return s.head(x + s.mlp(x)), None, 3, float("inf")


@pytest.mark.parametrize("name", list(CASES))
def test_equals_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)
    check_model(Net(CASES[name]).eval(), torch.randn(2, 5, D))


COMPILED = ["write_through_view_of_a_sum", "row_of_the_stream_is_overwritten", "post_norm_stream_is_overwritten",
            "parallel_branches_with_scale", "transposed_stream", "input_is_written"]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_equals_eager_compiled(name: str) -> None:
    check_model(Net(CASES[name]).eval(), torch.randn(2, 5, D))


def reads_by_an_early_view(s: Any, x: torch.Tensor, k: torch.Tensor) -> Any:
    v = k[:, :5]
    k[:, :5].copy_(s.q(x))
    x = x + s.o(F.scaled_dot_product_attention(x, v, v))
    x = x + s.mlp(x)
    return s.head(x), v


def test_cache_read_through_a_view_taken_before_the_write() -> None:
    """Whatever tensor the cache is a view of, also one that changes between calls."""
    model = Net(reads_by_an_early_view).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    big = torch.zeros(2, 2, 8, D)
    x = torch.randn(2, 5, D)
    for cache in (big[0], big[1], torch.zeros(2, 8, D)):
        theirs = cache.clone()
        expected = model(x, theirs)
        for a, b in zip(compiled(x, cache), expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(cache, theirs)


def test_too_many_parallel_branches_stay_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(20))
            self.last = nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x
            for expert in self.experts:
                x = x + expert(h)
            return x + self.last(x)

    model = Many().eval()
    report = skipc.find_sites(model, torch.randn(2, 3, D))
    assert report.names == ["last"]
    assert Reason.TOO_MANY_BRANCHES in {r.reason for r in report.rejected}
    check_model(model, torch.randn(2, 3, D))


def test_synthetic_names_are_no_module_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)

    def forward(s: Any, x: torch.Tensor) -> Any:
        x = x + torch.sigmoid(s.gate(x)) * x
        return x + s.mlp(x)

    model = Net(forward).eval()
    assert skipc.find_sites(model, torch.randn(2, 3, D)).names == ["<mlp>", "mlp"]
    x = torch.randn(2, 3, D)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    with eager_skip(model, {"mlp"}):
        expected = model(x)
    with compiled.session(skip={"mlp"}):
        torch.testing.assert_close(compiled(x), expected)
    with compiled.session(skip={"<mlp>"}):
        torch.testing.assert_close(compiled(x), x + model.mlp(x))


def test_a_session_does_not_govern_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)
    model = Net(CASES["two_in_place_sums"]).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    x = torch.randn(2, 5, D)
    sampler = torch.compile(lambda t: t.softmax(-1) * 2, backend="skipc")
    with compiled.session(skip={"mlp"}):
        compiled(x)
        torch.testing.assert_close(sampler(x), x.softmax(-1) * 2)


def test_a_later_graph_without_the_site_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)

    def forward(s: Any, x: torch.Tensor) -> Any:
        x = x + s.attn(x)
        return x + s.mlp(x) if x.shape[1] > 4 else torch.add(x, s.mlp(x), alpha=2)

    model = Net(forward).eval()
    compiled = skipc.compile(model, fullgraph=True, dynamic=False, **STRICT)
    with compiled.session(skip={"mlp"}):
        compiled(torch.randn(2, 5, D))
        with pytest.raises(skipc.SessionError, match="mlp runs in this call, but is no site of it"):
            compiled(torch.randn(2, 3, D))


def test_tasks_of_one_event_loop_keep_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)
    model = Net(CASES["two_in_place_sums"]).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    x = torch.randn(2, 5, D)
    compiled(x)

    expected = {}
    for name in ("mlp", "attn"):
        with eager_skip(model, {name}):
            expected[name] = model(x)

    async def request(name: str) -> None:
        with compiled.session(skip={name}):
            for _ in range(3):
                await asyncio.sleep(0)
                torch.testing.assert_close(compiled(x), expected[name])

    async def both() -> None:
        await asyncio.gather(request("mlp"), request("attn"))

    asyncio.run(both())


def test_measuring_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run_regions_uncompiled(monkeypatch)
    model = Net(CASES["returns_stream_and_view"]).eval()
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    x = torch.randn(2, 5, D)
    expected = model(x)
    with compiled.session(measure=True) as session:
        found = compiled(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    h = x + model.mlp(x)
    truth = F.cosine_similarity(x.flatten(0, 1), h.flatten(0, 1), dim=-1).mean().item()
    assert session.stats().similarity["mlp"] == pytest.approx(truth, abs=1e-5)
    with compiled.session(skip={"mlp", "attn"}, measure=True):
        first, _, last = compiled(x)
    assert first.data_ptr() != x.data_ptr()
    assert last.data_ptr() != first.data_ptr()
