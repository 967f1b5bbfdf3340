"""Linear maps in the place of sites: against least squares by other means, and in whole models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import skipc
from skipc.calibration.batches import batches_of, call_on, hooked, result_of
from skipc.calibration.curvature import Curvatures, metric_of
from skipc.calibration.distillation import divergence
from skipc.calibration.fitting import fit_plan
from skipc.calibration.replacing import Moments, SiteMoments, fit
from skipc.calibration.thinning import token_scale
from skipc.ir.plan import Action
from skipc.ir.replacement import Affine, LowRank
from skipc.ir.site import Source
from tests.harness import unlike_in_padding
from tests.models.zoo import ZOO, ids

SOURCE = Source("norm", True, 6)


def moments(x: torch.Tensor, u: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> Moments:
    made = Moments.empty(y.shape[1], y.device)
    for part in range(3):  # streamed
        made.add(x[part::3], u[part::3], y[part::3], weight[part::3, None].sqrt())
    return made


def tokens(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 6, generator=generator) + 1
    u = x * torch.linspace(0.5, 2, 6) + 0.3
    y = u @ torch.randn(6, 6, generator=generator) + torch.randn(400, 6, generator=generator) * 0.5 + 2
    return x, u, y, torch.rand(400, generator=generator) + 0.1


def cost(made: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, metric: torch.Tensor) -> float:
    return float((((made - y).double() @ metric) ** 2).sum(1) @ weight.double())


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_maps_are_the_best_of_their_rank(rank: int, seed: int) -> None:
    """Against alternating least squares from random starts, in a metric; and the error is as foretold."""
    x, u, y, weight = tokens(seed)
    metric = metric_of(torch.randn(50, 6, generator=torch.Generator().manual_seed(9)).T.cov())
    found = fit(SOURCE, moments(x, u, y, weight), metric, ridge=0)
    made = found.replacement(Action("lowrank", rank))
    assert isinstance(made, LowRank)
    assert made.rank == rank
    assert metric.trace() > 0
    ridged = metric + torch.eye(6, dtype=torch.float64) * 1e-3 * metric.diagonal().mean()
    ours, nothing = cost(made.made(x, u), y, weight, ridged), cost(torch.zeros_like(y), y, weight, ridged)
    assert found.error(Action("lowrank", rank)) == pytest.approx(ours / nothing, rel=1e-3)
    best = float("inf")
    root = weight.double().sqrt()[:, None]
    inputs = torch.cat([u.double(), torch.ones(400, 1, dtype=torch.float64)], 1) * root
    target = (y.double() @ ridged) * root
    full = torch.linalg.lstsq(inputs, target).solution
    for start in range(4):
        generator = torch.Generator().manual_seed(start)
        left = torch.randn(6, rank, generator=generator, dtype=torch.float64)
        for _ in range(200):  # for one factor, then for the other; the shift is free in both
            down = full[:6] @ torch.linalg.qr(left).Q
            values = torch.cat([inputs[:, :6] @ down, root], 1)
            left = torch.linalg.lstsq(values, target).solution[:rank].T
        values = torch.cat([inputs[:, :6] @ down, root], 1)
        best = min(best, float((values @ torch.linalg.lstsq(values, target).solution - target).pow(2).sum()))
    assert ours <= best * 1.001
    errors = [found.error(Action("lowrank", r)) for r in range(7)]
    assert errors == sorted(errors, reverse=True)


def test_scales_and_shifts_are_least_squares() -> None:
    x, u, y, weight = tokens()
    found = fit(SOURCE, moments(x, u, y, weight), ridge=0)
    affine, scale = found.replacement(Action("affine")), found.replacement(Action("scale"))
    assert isinstance(affine, Affine)
    assert isinstance(scale, Affine)
    assert scale.scale.numel() == scale.shift.numel() == 1
    root = weight.sqrt()[:, None].double()
    for i in range(6):
        columns = torch.stack([x[:, i].double(), torch.ones(400, dtype=torch.float64)], 1) * root
        best = torch.linalg.lstsq(columns, y[:, i : i + 1].double() * root).solution[:, 0]
        assert [float(affine.scale[i]), float(affine.shift[i])] == pytest.approx(best.tolist(), rel=1e-3)
    eye = torch.eye(6, dtype=torch.float64)
    nothing = cost(torch.zeros_like(y), y, weight, eye)
    for made, action in ((affine, Action("affine")), (scale, Action("scale"))):
        ours = cost(made.made(x, u), y, weight, eye)
        assert found.error(action) == pytest.approx(ours / nothing, rel=1e-3)
        for change in (-1e-3, 1e-3):
            other = Affine(SOURCE, made.scale + change, made.shift)
            assert cost(other.made(x, u), y, weight, eye) > ours


def is_text(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.long and bool((value > 1).any())


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "hand_written"])
@torch.no_grad()
def test_a_linear_site_is_replaced_without_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP whose module gives a linear map of what its branch reads, of rank 3: what is fitted is that map."""
    monkeypatch.setattr("skipc.calibration.fitting.in_half", lambda device: nullcontext())
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    sites = skipc.find_sites(model, **inputs).sites
    site = next(s for s in sites if s.kind == "mlp" and s.layer == 1)
    assert site.source is not None
    generator = torch.Generator().manual_seed(0)
    width = site.source.width
    a, b = torch.randn(width, 3, generator=generator) * 0.3, torch.randn(3, width, generator=generator) * 0.3
    seen: dict[str, Any] = {}
    reader = model.get_submodule(site.source.module)

    def keep(module: Any, args: Any, output: Any) -> None:
        seen["u"] = output

    def linear(module: Any, args: Any, output: Any) -> Any:
        return seen["u"] @ a @ b + 0.5

    with hooked([(reader, keep), (model.get_submodule(site.name), linear)]):
        more = [
            {k: torch.randint(3, 90, v.shape, generator=generator) if is_text(v) else v for k, v in inputs.items()}
            for _ in range(20)
        ]
        batches = batches_of(model, more)
        plan = fit_plan(model, batches, sites, {site.name: Action("lowrank", 3)}, ridge=1e-7)
        (batch,) = batches_of(model, [inputs])
        expected = result_of(call_on(model, batch))
    torch.testing.assert_close(result_of(call_on(model, batch, plan)), expected, atol=1e-3, rtol=1e-3)


def test_padding_has_no_say() -> None:
    model, found = ZOO["bert"].build(), []
    sources = {s.name: s.source for s in skipc.find_sites(model, ids(2, 7)).sites if s.source is not None}
    for batch in batches_of(model, unlike_in_padding()):
        sums = SiteMoments(sources)
        with torch.no_grad(), hooked(sums.hooks(model, batch)):
            call_on(model, batch)
        found.append(sums.found)
    assert len(found[0]) == len(sources) == 4
    for name in sources:
        torch.testing.assert_close(found[0][name].crossed, found[1][name].crossed)


def test_what_a_norm_is_given_by_keyword_is_seen() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp(self.norm(input=x))

    model, x = Block(), torch.randn(3, 8)
    moments = SiteMoments({"mlp": Source("norm", True, 8)})
    (batch,) = batches_of(model, [x])
    with torch.no_grad(), hooked(moments.hooks(model, batch)):
        call_on(model, batch)
    weight = token_scale(model.mlp(model.norm(x)), batch)
    torch.testing.assert_close(moments.found["mlp"].channels[0], (x * weight**2).sum(0))


def test_prices_of_maps_rank_what_they_cost() -> None:
    """Ranks of one site by what gradients say against what their maps do to the model's predictions."""
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    generator = torch.Generator().manual_seed(0)
    given = batches_of(model, [torch.randint(3, 90, (4, 24), generator=generator) for _ in range(16)])
    sites = skipc.find_sites(model, **given[0].inputs).sites
    name, actions = "model.layers.1.mlp", [Action("lowrank", r) for r in (1, 4, 16, 48)]
    layers = {s.name: s.hidden for s in sites if s.hidden is not None}  # neurons and maps of a site, in one pass
    sums = Curvatures(layers, [name], {s.name: s.source for s in sites if s.source is not None})
    for batch in given:
        sums.add(model, batch, generator)
    seen = sums.replaced[name]
    found = fit(sums.sources[name], seen.moments, metric_of(seen.outputs))
    priced = [found.error(a) * sums.losses[name] / sums.tokens for a in actions]
    real = []
    with torch.no_grad():
        for action in actions:
            plan = skipc.Plan(replace={name: found.replacement(action)})
            real.append(
                sum(float(divergence(call_on(model, b), call_on(model, b, plan), b)) for b in given) / len(given)
            )
    assert priced == sorted(priced, reverse=True)
    assert real == sorted(real, reverse=True)
    assert all(0.4 < p / r < 2.5 for p, r in zip(priced, real, strict=True))


def test_what_cannot_be_replaced_is_refused_by_name() -> None:
    model = ZOO["torch_encoder"].build()
    inputs = ZOO["torch_encoder"].inputs()
    sites = skipc.find_sites(model, **inputs).sites
    assert sites[0].source is None
    with pytest.raises(skipc.PlanError, match="cannot be replaced: no module gives what it reads"):
        fit_plan(model, batches_of(model, [inputs]), sites, {sites[0].name: Action("lowrank", 4)})
    llama = ZOO["llama"].build()
    found = skipc.find_sites(llama, ids(), use_cache=False).sites
    with pytest.raises(skipc.PlanError, match="a rank of 65 makes no sense"):
        fit_plan(llama, batches_of(llama, [ids()]), found, {found[0].name: Action("lowrank", 65)})
    with pytest.raises(skipc.UnknownSiteError):
        fit_plan(llama, batches_of(llama, [ids()]), found, {"model.layers.9.mlp": Action("affine")})
