"""What gradients say a change costs, against what it does cost."""

from __future__ import annotations

import pytest
import torch

import skipc
from skipc.calibration.batches import batches_of, call_on, left_out
from skipc.calibration.curvature import Curvature, Curvatures
from skipc.calibration.distillation import divergence
from tests.models.zoo import ZOO


def batches(count: int, tokens: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (4, tokens), generator=generator) for _ in range(count)]


def test_the_metric_prices_changes_of_single_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    h, g = torch.randn(1, 6, generator=generator), torch.randn(1, 4, generator=generator)
    change = torch.randn(4, 6, generator=generator)
    curvature = Curvature(torch.zeros(6, 6), torch.zeros(4, 4))
    curvature.add(h, g)
    e = curvature.metric() @ change.double()
    price = float((e @ curvature.inputs.double() * e).sum())
    assert price == pytest.approx(float((g @ change @ h.T).pow(2)) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_small_changes_cost_what_gradients_say(name: str) -> None:
    """A layer's weight is disturbed at random: the prices of ten disturbances against what they cost, all together."""
    torch.manual_seed(0)
    model = ZOO[name].build()
    given = batches_of(model, [{"input_ids": ids} for ids in batches(24)])
    sites = skipc.find_sites(model, **given[0].inputs).sites
    site = [s for s in sites if s.hidden][-1]
    assert site.hidden is not None
    sums = Curvatures({site.name: site.hidden}, [])
    generator = torch.Generator().manual_seed(0)
    for batch in given:
        sums.add(model, batch, generator)
    curvature = sums.found[site.name]
    assert curvature.tokens == 24 * 4 * 24
    weight = model.get_parameter(site.hidden.columns).detach()
    priced = cost = 0.0
    for _ in range(10):
        change = torch.randn(weight.shape) * weight.std() * 0.1
        e = curvature.metric() @ change.double()
        priced += float((e @ curvature.inputs.double() * e).sum())
        with torch.no_grad():
            changed = {site.hidden.columns: weight + change}
            cost += sum(
                float(divergence(call_on(model, b), call_on(model, b, skipc.Plan(weights=changed)), b)) for b in given
            ) / len(given)
    assert 0.5 < priced / cost < 2


def test_losses_of_sites_rank_them() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    given = batches_of(model, batches(12))
    names = skipc.find_sites(model, **given[0].inputs).names
    with torch.no_grad():
        for i, name in enumerate(names):  # each adds less than the one before it
            for parameter in model.get_submodule(name).parameters():
                parameter.mul_(0.55**i)
    sums = Curvatures({}, names)
    generator = torch.Generator().manual_seed(0)
    for batch in given:
        sums.add(model, batch, generator)
    with torch.no_grad():
        real = {
            n: sum(float(divergence(call_on(model, b), call_on(model, b, skipc.Plan([n])), b)) for b in given)
            for n in names
        }
    assert sorted(names, key=lambda n: sums.losses[n]) == sorted(names, key=lambda n: real[n])


def test_leaving_out_is_refused_where_no_module_stands_for_the_site() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(skipc.PlanError, match="the output of no module"), left_out(model, ["model.layers.0<mlp>"]):
        pass
