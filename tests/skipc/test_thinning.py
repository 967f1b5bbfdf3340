"""Narrower MLPs: the order in which neurons leave, the refit, and plans made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from skipc.passes.hidden_layers import hidden_layer

import skipc
from skipc.calibration.batches import Batch, batches_of, call_on, hooked, result_of
from skipc.calibration.distillation import distill, divergence
from skipc.calibration.fitting import fit_plan
from skipc.calibration.thinning import SecondMoments, eliminate, hidden_layers, refit
from skipc.ir.plan import Action
from tests.harness import STRICT, unlike_in_padding
from tests.models.zoo import ZOO, ids


def error(h: torch.Tensor, columns: torch.Tensor, kept: list[int]) -> float:
    """The least squares error of a layer with the kept neurons, by QR."""
    y = h @ columns.T
    return float((y - h[:, kept] @ torch.linalg.lstsq(h[:, kept], y).solution).pow(2).sum())


def test_each_step_takes_the_neuron_that_costs_least() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 9, generator=generator, dtype=torch.float64) @ torch.randn(9, 9, generator=generator).double()
    columns = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    found = eliminate(h.T @ h, columns, ridge=0)
    left, spent = list(range(9)), 0.0
    for j, cost in zip(found.order[:-1].tolist(), found.costs.tolist(), strict=False):
        prices = {k: error(h, columns, [i for i in left if i != k]) for k in left}
        assert prices[j] == pytest.approx(min(prices.values()), rel=1e-6)
        spent += cost * float((h @ columns.T).pow(2).sum())
        assert spent == pytest.approx(prices[j], rel=1e-6)
        left.remove(j)
        kept = found.kept(len(left))
        assert kept.tolist() == left
        refitted = refit(h.T @ h, columns, kept, ridge=0)
        assert float((h @ columns.T - h[:, kept] @ refitted.T).pow(2).sum()) == pytest.approx(prices[j], rel=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_each_step_takes_the_group_that_costs_least(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    h = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    h = h @ torch.randn(12, 12, generator=generator).double()
    columns = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    found = eliminate(h.T @ h, columns, ridge=0, size=size)
    left = list(range(12 // size))

    def price(groups: list[int]) -> float:
        return error(h, columns, [g * size + i for g in groups for i in range(size)])

    for j in found.order.tolist():
        prices = {k: price([g for g in left if g != k]) for k in left}
        assert prices[j] == pytest.approx(min(prices.values()), rel=1e-6)
        left.remove(j)
        assert found.kept(len(left)).tolist() == left
        assert found.error(len(left)) * found.total == pytest.approx(prices[j], rel=1e-6)


def test_dead_and_double_neurons_cost_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(500, 100, generator=generator)
    h[:, 50:90] = h[:, :40] * 2
    h[:, 90:] = 0
    columns = torch.randn(7, 100, generator=generator)
    found = eliminate(h.T @ h, columns, ridge=1e-6)
    assert found.error(50) < 1e-5
    assert found.error(49) > 1e-3
    kept = found.kept(50)
    torch.testing.assert_close(h[:, kept] @ refit(h.T @ h, columns, kept, 1e-6).T, h @ columns.T, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "t5", "hand_written"])
@torch.no_grad()
def test_double_neurons_and_heads_leave(name: str) -> None:
    """Every neuron, and every group of heads, twice, of which the plan keeps half: the same results, in eager and
    compiled."""
    torch._dynamo.reset()
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    sites = skipc.find_sites(model, **inputs).sites
    layers = {s.name: s.hidden for s in sites if s.hidden is not None}
    for layer in layers.values():
        half = layer.width // 2
        for path, times in layer.rows:
            value = model.get_parameter(path)
            for part in value.chunk(times):
                part = part.unflatten(0, (layer.width, -1))
                part[half:] = part[:half]
    generator = torch.Generator().manual_seed(5)
    more = [
        {k: torch.randint(3, 90, v.shape, generator=generator) if k.endswith("ids") else v for k, v in inputs.items()}
        for _ in range(40)
    ]
    actions = {n: Action("thin", layer.width // 2) for n, layer in layers.items()}
    plan = fit_plan(model, batches_of(model, more), sites, actions, groups=2, ridge=1e-6)
    (batch,) = batches_of(model, [inputs])
    expected, found = result_of(call_on(model, batch)), result_of(call_on(model, batch, plan))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    with compiled.session(plan=plan):
        torch.testing.assert_close(result_of(compiled(**inputs)), found, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_has_no_say() -> None:
    model = ZOO["bert"].build()
    sites = skipc.find_sites(model, ids(2, 7)).sites
    layers = hidden_layers(sites, [s.name for s in sites if s.hidden])
    sums = []
    for batch in batches_of(model, unlike_in_padding()):
        moments = SecondMoments(layers)
        with hooked(moments.hooks(model, batch)):
            call_on(model, batch)
        assert moments.tokens == 12
        sums.append(moments.sums)
    for name in layers:
        torch.testing.assert_close(sums[0][name], sums[1][name])


def test_what_cannot_be_thinned_is_refused_by_name() -> None:
    fused: Any = skipc.find_sites(ZOO["phi3"].build(), **ZOO["phi3"].inputs()).sites
    with pytest.raises(skipc.PlanError, match="self_attn cannot be made thinner"):
        hidden_layers(fused, ["model.layers.0.self_attn"])
    sites: Any = skipc.find_sites(ZOO["llama"].build(), **ZOO["llama"].inputs()).sites
    with pytest.raises(skipc.UnknownSiteError):
        hidden_layers(sites, ["model.layers.7.mlp"])
    with pytest.raises(TypeError, match="no batch"):
        batches_of(ZOO["llama"].build(), [])
    for kind in skipc.SiteKind:
        assert hidden_layer(SimpleNamespace(kind=kind, branch=[])) is None  # type: ignore[arg-type]


def test_what_cannot_be_fitted_is_refused_by_name() -> None:
    class Raw(torch.nn.Module):
        """An MLP without modules of its own, as wide as the stream: its input would pass for its neurons."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.nn.functional.linear(torch.nn.functional.linear(x, self.first).relu(), self.last)

    model, x = Raw(), torch.randn(2, 7, 64)
    (site,) = skipc.find_sites(model, x).sites
    with pytest.raises(skipc.PlanError, match=r"is no torch\.nn\.Linear"):
        fit_plan(model, batches_of(model, [x]), [site], {site.name: Action("thin", 32)})
    llama = ZOO["llama"].build()
    sites = skipc.find_sites(llama, **ZOO["llama"].inputs()).sites
    for width in (0, 129):
        with pytest.raises(skipc.PlanError, match="has 128 neurons"):
            fit_plan(llama, batches_of(llama, [ids()]), sites, {"model.layers.0.mlp": Action("thin", width)})
    with pytest.raises(skipc.PlanError, match="did not run on any"):
        fit_plan(llama, [], sites, {"model.layers.0.mlp": Action("thin", 64)})
    with pytest.raises(skipc.PlanError, match="no weights to train"):
        distill(llama, skipc.Plan({"model.layers.0.mlp"}), batches_of(llama, [ids()]), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.enable_grad()
def test_divergence_and_its_slope_are_those_of_torch(dtype: torch.dtype) -> None:
    """With padding, over a number of rows that no stretch of them divides."""
    generator = torch.Generator().manual_seed(0)
    truth, found = (torch.randn(3, 17, 501, generator=generator).to(dtype) * 3 for _ in range(2))
    mask = torch.ones(3, 17, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = Batch({"input_ids": torch.zeros_like(mask), "attention_mask": mask})

    def both(found: torch.Tensor, measure: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = found.clone().requires_grad_()
        value = measure(found)
        return value.detach(), torch.autograd.grad(2 * value, found)[0]

    value, slope = both(found, lambda f: divergence(SimpleNamespace(logits=truth), SimpleNamespace(logits=f), batch))
    valid = mask.bool()
    expected, expected_slope = both(
        found.double(),
        lambda f: F.kl_div(
            f[valid].log_softmax(-1), truth.double()[valid].log_softmax(-1), log_target=True, reduction="batchmean"
        ),
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert slope.dtype == dtype
    most = float(expected_slope.abs().max())
    assert float((slope - expected_slope).abs().max()) < most * (1e-5 if dtype == torch.float32 else 1e-2)
    assert not slope[~valid].any()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_distillation_brings_a_plan_nearer_to_the_model_on_other_text(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sites = skipc.find_sites(model, **inputs).sites
    text = [
        {**inputs, "input_ids": torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(s))}
        for s in range(34)
    ]
    text = [{k: v for k, v in t.items() if k != "attention_mask"} for t in text]
    batches = batches_of(model, text)
    actions = {s.name: Action("thin", s.hidden.width // 2) for s in sites if s.hidden and s.kind == "mlp"}
    if name == "llama":
        actions[sites[0].name] = Action("lowrank", 8)  # trained along
    plan = fit_plan(model, batches[:32], sites, actions)
    trained = distill(model, plan, batches[:32], steps=64, rate=1e-3)
    again = distill(model, plan, batches[:32], steps=64, rate=1e-3)

    def far(plan: skipc.Plan) -> float:
        with torch.no_grad():
            return sum(float(divergence(call_on(model, b), call_on(model, b, plan), b)) for b in batches[32:])

    assert far(trained) < 0.8 * far(plan)
    assert all(torch.equal(t, again.trained[n]) for n, t in trained.trained.items())  # no luck in it
    assert not any(torch.equal(t, plan.trained[n]) for n, t in trained.trained.items())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
