"""Work of sites against torch's own count, and cost models against calls whose times are known."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from skipc.passes.site_work import BATCH, CONTEXT, TOKENS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from skipc.calibration.batches import batches_of
from skipc.calibration.costs import CostModel, Regime, Timing, nonnegative_least_squares, trace_work
from skipc.ir.plan import SKIP, Action
from tests.models.zoo import ZOO


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "falcon", "vit"])
@torch.no_grad()
def test_work_is_what_torch_counts(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    (batch,) = batches_of(model, [inputs])
    work = trace_work(model, batch)
    first = next(v for v in inputs.values() if isinstance(v, torch.Tensor))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of torch's, what is counted
        model(**batch.inputs)
    counts = counter.get_flop_counts()
    prefix, sums = type(model).__name__, 0.0
    assert len(work) == ZOO[name].layers * sum(map(len, ZOO[name].streams))
    for site, found in work.items():
        rows, tokens = first.shape[0], first.shape[1]
        if name == "vit":
            tokens = 1 + (inputs["pixel_values"].shape[-1] // model.config.patch_size) ** 2
        sizes = {BATCH: rows, TOKENS: tokens, CONTEXT: tokens}
        total = float((found.products + found.attention).subs(sizes))
        path = f"{prefix}.{site}"
        inside = path.removesuffix(
            ".output.dense"
        )  # BERT and ViT add behind their last layer, which is all of its module
        expected = sum(counts[path if inside == path or inside not in counts else inside].values())
        if inside == path or "attention" in site:
            assert total == expected, site
        sums += total
    layers = [c for n, c in counts.items() if re.fullmatch(rf"{prefix}\.(\w+\.)+\d+", n)]
    assert sums == sum(sum(c.values()) for c in layers)


def test_work_of_grouped_attention_reads_the_keys_of_its_groups() -> None:
    model = ZOO["llama"].build()
    (batch,) = batches_of(model, [ZOO["llama"].inputs()])
    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    found = trace_work(model, batch)["model.layers.0.self_attn"]
    assert found.cached == 2 * heads * width * BATCH * CONTEXT
    assert found.attention == 4 * config.num_attention_heads * width * BATCH * TOKENS * CONTEXT


def made() -> CostModel:
    model = ZOO["llama"].build()
    (batch,) = batches_of(model, [ZOO["llama"].inputs()])
    work = trace_work(model, batch)
    kinds = {n: "mlp" if n.endswith("mlp") else "attention" for n in work}
    return CostModel(work, kinds, 4)


def test_a_fitted_model_predicts_other_calls() -> None:
    truth, fitted = made(), made()
    truth.coefficients["decode"] = dict(
        zip(truth.names, [1e-3, 1e-5, 2e-5, 1e-5, 5e-6, 3e-11, 5e-11, 0.0, 0.0], strict=True)
    )
    timings = []
    actions: list[dict[str, Action]] = [{}]
    for kind in ("mlp", "self_attn"):
        names = [n for n in truth.work if n.endswith(kind)]
        actions += [dict.fromkeys(names, SKIP), dict.fromkeys(names[::2], SKIP)]
    actions.append({n: Action("thin", 64) for n in truth.work if n.endswith("mlp")})
    actions.append(dict.fromkeys(truth.work, Action("lowrank", 8)))
    for batch in (1, 4):
        for context in (64, 1024):
            regime = Regime("decode", batch, 1, context)
            timings += [Timing(regime, a, truth.seconds(regime, a)) for a in actions]
    fitted.fit(timings)
    assert fitted.error(timings) < 1e-3
    other = Regime("decode", 2, 1, 500)
    plan = {"model.layers.0.mlp": Action("thin", 96), "model.layers.0.self_attn": Action("lowrank", 16)}
    plan["model.layers.1.self_attn"] = SKIP
    assert fitted.seconds(other, plan) == pytest.approx(truth.seconds(other, plan), rel=2e-3)
    again = CostModel.from_dict(fitted.to_dict())
    assert again.seconds(other, plan) == fitted.seconds(other, plan)
    with pytest.raises(KeyError):
        fitted.seconds(Regime("prefill", 1, 8, 8))


def test_expressions_of_a_file_are_no_code() -> None:
    record: dict[str, Any] = made().to_dict()
    record["work"]["model.layers.0.mlp"][1] = "__import__('os').getcwd()"
    with pytest.raises(ValueError, match="no polynomial"):
        CostModel.from_dict(record)


def test_least_squares_stays_above_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        a = torch.rand(12, 5, generator=generator, dtype=torch.float64)
        b = torch.randn(12, generator=generator, dtype=torch.float64)
        x = nonnegative_least_squares(a, b)
        slope = a.T @ (a @ x - b)
        assert bool((x >= 0).all())
        assert bool((slope >= -1e-6).all())  # the conditions of Karush, Kuhn and Tucker
        assert float((slope * x).abs().max()) < 1e-6
