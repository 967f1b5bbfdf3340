"""A gated model as a package that runs without skipc."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skipc.kernels import native
from transformers import StaticCache

import skipc
from tests.harness import eager_skip
from tests.models.zoo import ZOO

RUN = """
import json, sys, torch
torch.set_grad_enabled(False)
folder = sys.argv[1]
given = torch.load(folder + "/given.pt")
call = torch._inductor.aoti_load_package(folder + "/model.pt2")
about = json.loads(call.get_metadata()["skipc"])
results = []
for skip in given["plans"]:
    inputs = {k: v.clone() for k, v in given["inputs"].items()}
    sites = len(about["sites"])
    gates = {"skip": torch.tensor([s in skip for s in about["sites"]]), "threshold": torch.full((sites,), torch.inf),
             "closes": torch.zeros(sites, sites, dtype=torch.bool), "scale": torch.ones(sites),
             "since": torch.arange(sites), "rule": torch.tensor(0), "valid": torch.ones(2, 1, dtype=torch.bool)}
    out = call(*[(inputs | gates)[name] for name in about["inputs"]])
    results.append((out[: about["outputs"]], out[about["outputs"]], inputs))
assert not [m for m in sys.modules if m.startswith("skipc")]
torch.save(results, folder + "/results.pt")
"""


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
@torch.no_grad()
def test_a_package_runs_in_a_process_without_skipc(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]), past_key_values=cache)
    before = copy.deepcopy(cache)
    token = torch.tensor([[9], [10]])
    skipc.package(model, input_ids=token, past_key_values=cache, path=tmp_path / "model.pt2")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    plans = [[], names[1:3], names]
    inputs = {"input_ids": token}
    for i, layer in enumerate(before.layers):
        for part in ("keys", "values", "cumulative_length"):
            inputs[f"past_key_values_layers_{i}_{part}"] = getattr(layer, part)
    torch.save({"inputs": inputs, "plans": plans}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True, cwd=tmp_path)
    for plan, (out, skipped, after) in zip(plans, torch.load(tmp_path / "results.pt"), strict=True):
        theirs = copy.deepcopy(before)
        with eager_skip(model, plan):
            expected = model(input_ids=token, past_key_values=theirs).logits
        torch.testing.assert_close(out[-1], expected, rtol=1e-4, atol=1e-4)
        assert [n for n, gone in zip(names, skipped.tolist(), strict=True) if gone] == plan
        for i, layer in enumerate(theirs.layers):
            torch.testing.assert_close(after[f"past_key_values_layers_{i}_keys"], layer.keys)
            assert int(after[f"past_key_values_layers_{i}_cumulative_length"]) == 4


def test_what_cannot_be_packaged_is_said(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    with pytest.raises(skipc.SkipcError, match="no residual stream"):
        skipc.package(model, torch.randn(2, 4), path=tmp_path / "model.pt2")
