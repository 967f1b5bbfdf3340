"""Calibration from end to end on a small model: profiles, plans, presets, refusals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

import skipc
from skipc.calibration import sampling
from skipc.calibration.batches import batches_of, call_on
from skipc.calibration.calibrate import EFFORTS, Effort
from skipc.calibration.subject import Subject, _has_windows
from skipc.ir.plan import RUN, SKIP
from tests.harness import STRICT, known_times
from tests.models.zoo import ZOO


@pytest.fixture(autouse=True, scope="module")
def little_effort() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", Effort(read=4, fitted=4, steps=4, judged=2, rounds=3))
        known_times(patch)
        yield


def text(seed: int = 0, count: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (2, 24), generator=generator) for _ in range(count)]


def calibrated(folder: Path | None = None, **settings: Any) -> tuple[Any, skipc.Profile]:
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    given = {"cache": 63, "removals": (0.1, 0.3), "kinds": ["mlp"], "most_in_a_row": 0, "progress": False, **settings}
    return model, skipc.calibrate(model, text(), folder=folder, **given)


@pytest.fixture(scope="module")
def made(little_effort: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, skipc.Profile, Path]:
    folder = tmp_path_factory.mktemp("profile")
    return *calibrated(folder), folder


def test_a_profile_survives_its_files(made: Any) -> None:
    _, profile, folder = made
    again = skipc.Profile.load(folder)
    assert str(again) == str(profile)
    assert again.checkpoint == profile.checkpoint
    assert again.sites == profile.sites
    assert again.menu == profile.menu
    for name, tensors in profile.tensors.items():
        assert set(again.tensors[name]) == set(tensors)
        for key, value in tensors.items():
            assert torch.equal(again.tensors[name][key], value)
    for timing in profile.timings:
        assert again.costs.seconds(timing.regime, timing.actions) == pytest.approx(
            profile.costs.seconds(timing.regime, timing.actions)
        )
    assert not (folder / "unfinished").exists()


@torch.no_grad()
def test_plans_run_as_eager_does(made: Any) -> None:
    model, profile, _ = made
    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    (batch,) = batches_of(model, text(7, 1))
    for entry in profile.menu:
        plan = profile.plan_of(entry)
        assert set(plan.skip) == {n for n, a in entry.actions.items() if a == SKIP}
        with compiled.session(plan=plan):
            found = compiled(**batch.inputs).logits
        torch.testing.assert_close(found, call_on(model, batch, plan).logits, atol=1e-4, rtol=1e-4)


def test_the_menu_saves_what_was_asked(made: Any) -> None:
    _, profile, _ = made
    total = sum(profile.costs.of_site(profile.regime, name) for name in profile.sites)
    for entry, asked in zip(profile.menu, (0.1, 0.3), strict=True):
        spent = sum(profile.costs.of_site(profile.regime, n, entry.actions.get(n, RUN)) for n in profile.sites)
        assert 1 - spent / total == pytest.approx(entry.removed)
        assert entry.removed >= asked - 1e-9
        assert all(profile.sites[n].kind == "mlp" for n in entry.actions)


def test_plans_by_budget_and_by_speed(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, profile, _ = made
    most = max(e.judgement.loss for e in profile.menu)
    fastest = max(profile.menu, key=profile.speedup)
    assert profile.plan(budget=most).expected.name == fastest.name
    plan = profile.plan(speedup=profile.speedup(fastest))
    assert plan.expected.name == fastest.name
    assert fastest.name in repr(plan)
    assert not profile.plan(budget=-1.0).weights
    assert "everything runs" in caplog.text
    with pytest.raises(skipc.PlanError, match="no plan of the profile reaches 9x in decode, batch 2, context 32"):
        profile.plan(speedup=9, batch=2, cache=31)
    with pytest.raises(skipc.PlanError, match="a budget or for a speedup"):
        profile.plan()


@torch.no_grad()
def test_presets_run_the_plan_of_the_profile(made: Any) -> None:
    torch._dynamo.reset()
    model, profile, folder = made
    plan = profile.plan(budget=0.10)
    assert plan.weights or plan.skip
    ids = text(9, 1)[0]
    expected = call_on(model, batches_of(model, [ids])[0], plan).logits
    compiled = torch.compile(model, backend="skipc", options={"preset": "fast", "profile": str(folder)}, fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    with skipc.session(compiled, plan=skipc.Plan()):
        whole = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(whole, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    with skipc.session(compiled, skip={"model.layers.0.self_attn"}) as session:
        found = compiled(ids, use_cache=False).logits
    assert session.stats().skipped["model.layers.0.self_attn"] == 1
    skip = {"model.layers.0.self_attn", *plan.skip}
    expected = call_on(model, batches_of(model, [ids])[0], skipc.Plan(skip, plan.weights, replace=plan.replace)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with skipc.session(compiled, policy=skipc.Observe()):
        watched = compiled(ids, use_cache=False).logits
    expected = call_on(model, batches_of(model, [ids])[0], plan).logits
    torch.testing.assert_close(watched, expected, atol=1e-4, rtol=1e-4)
    handle = skipc.compile(model, preset="fast", profile=folder)
    with handle.session(plan=plan):
        chosen = skipc.generate(handle, ids, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(skipc.generate(handle, ids, max_new_tokens=12, eos_token_id=None), chosen)


def test_another_checkpoint_is_refused(made: Any) -> None:
    torch._dynamo.reset()
    _, profile, folder = made
    other = ZOO["llama"].build()
    profile.check(other)
    profile.check(ZOO["llama"].build().to(torch.bfloat16))
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 4] += 0.5
    with pytest.raises(skipc.ProfileError, match=r"another checkpoint.*model\.layers\.1\.mlp\.down_proj\.weight"):
        profile.check(other)
    compiled = torch.compile(other, backend="skipc", options={"preset": "fast", "profile": str(folder)})
    with pytest.raises(Exception, match="another checkpoint"), torch.no_grad():
        compiled(text()[0], use_cache=False)
    with pytest.raises(skipc.ProfileError, match="parameters differ"):
        profile.check(ZOO["bert"].build())


def test_damaged_files_are_refused(made: Any, tmp_path: Path) -> None:
    _, _, folder = made

    def broken(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    with pytest.raises(skipc.ProfileError, match="there is no profile"):
        skipc.Profile.load(tmp_path / "nowhere")
    copy = broken("cut")
    (copy / "profile.json").write_text((copy / "profile.json").read_text()[:-40])
    with pytest.raises(skipc.ProfileError, match="is damaged"):
        skipc.Profile.load(copy)
    copy = broken("version")
    record = json.loads((copy / "profile.json").read_text())
    (copy / "profile.json").write_text(json.dumps({**record, "version": 99}))
    with pytest.raises(skipc.ProfileError, match="of version 99"):
        skipc.Profile.load(copy)
    (copy / "profile.json").write_text(json.dumps({**record, "effort": "heroic"}))
    with pytest.raises(skipc.ProfileError, match="was edited"):
        skipc.Profile.load(copy)
    copy = broken("weights")
    data = bytearray((copy / "plans.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "plans.safetensors").write_bytes(bytes(data))
    with pytest.raises(skipc.ProfileError, match="is damaged, or belongs"):
        skipc.Profile.load(copy)
    (copy / "plans.safetensors").unlink()
    with pytest.raises(skipc.ProfileError, match="is missing"):
        skipc.Profile.load(copy)


def test_calibration_goes_on_where_it_stopped(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import skipc.calibration.calibrate as module

    real = module.distill
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "distill", failing)
    with pytest.raises(KeyboardInterrupt):
        calibrated(tmp_path)
    assert (tmp_path / "unfinished" / "10%.json").exists()
    monkeypatch.setattr(module.skipc, "compile", None)  # times are not measured again
    _, profile = calibrated(tmp_path)
    assert len(calls) == 3
    assert profile.menu == made[1].menu
    for name, tensors in made[1].tensors.items():
        assert all(torch.equal(profile.tensors[name][key], value) for key, value in tensors.items())


def test_sites_that_share_a_module_are_left_as_they_are() -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        embedding_size=32,
    )  # fmt: skip
    subject = Subject(AlbertModel(config).eval(), text(), None, None, 2, 0)
    assert any(name.endswith("#2") for name in subject.sites)
    subject.restrict((), None)
    assert not subject.free


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = ZOO["llama"].build()
    with pytest.raises(TypeError, match="tokenizer"):
        skipc.calibrate(model)
    with pytest.raises(TypeError, match="5 batches or more"):
        skipc.calibrate(model, text(count=3))
    with pytest.raises(ValueError, match="effort is one of 'quick', 'thorough'"):
        skipc.calibrate(model, text(), effort="huge")  # type: ignore[arg-type]
    with pytest.raises(skipc.UnknownSiteError, match="did you mean"):
        skipc.calibrate(model, text(), never=["model.layers.1.mpl"])
    with pytest.raises(skipc.PlanError, match="does not decode"):
        skipc.calibrate(ZOO["bert"].build(), [{"input_ids": t} for t in text()], phase="decode")
    with pytest.raises(skipc.PlanError, match="between 0 and 1, not"):
        skipc.calibrate(model, text(), removals=(20,))
    with pytest.raises(skipc.PlanError, match="training mode"):
        skipc.calibrate(ZOO["llama"].build().train(), text())


def test_a_window_of_any_part_of_a_model_counts() -> None:
    whole, part = PretrainedConfig(), PretrainedConfig(sliding_window=4)
    assert not _has_windows(whole)
    assert _has_windows(part)
    assert _has_windows(PretrainedConfig(attention_chunk_size=8))
    whole.get_text_config = lambda decoder: part if decoder else whole
    assert _has_windows(whole)


@pytest.mark.parametrize(("name", "sizes"), [("llama", {1, 32}), ("mistral", {1}), ("gemma2", {1}), ("bert", {1, 16})])
def test_attentions_over_sliding_caches_keep_all_their_heads(name: str, sizes: set[int]) -> None:
    subject = Subject(ZOO[name].build(), text(), None, None, 2, 0)
    assert {layer.size for layer in subject.layers.values()} == sizes


def test_models_whose_caches_refuse_fewer_heads_keep_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subject = Subject(ZOO["llama"].build(), text(), None, None, 2, 0)
    assert any(layer.size > 1 for layer in subject.layers.values())

    def refusing(compiled: Any, regime: Any, plans: Any, rounds: int, batch: Any) -> dict[str, list[float]]:
        if "fewer heads" in plans:
            raise skipc.PlanError("the cache is of another shape")
        return {name: [1.0] * rounds for name in plans}

    monkeypatch.setattr(sampling, "time_calls", refusing)
    monkeypatch.setattr(
        sampling, "measure_similarity", lambda *args, **kwargs: SimpleNamespace(similarity={}, scale={})
    )
    with caplog.at_level(logging.INFO, "skipc"):
        found = sampling.sample_calls(subject, subject.regime(None, 1, 1, 63), "none", 3)
    assert "attention keeps all its heads: the cache is of another shape" in caplog.text
    assert not found["heads"]
    assert all(layer.size == 1 for layer in subject.layers.values())
    thin = {site for t in found["timings"] for site, a in t["actions"].items() if a["kind"] == "thin"}
    assert thin == {"model.layers.0.mlp", "model.layers.1.mlp"}


@torch.no_grad()
def test_attentions_get_fewer_heads_or_become_maps_and_texts_are_those_of_eager() -> None:
    """Where attentions may be changed and none left out, what is left of them writes as many keys as it reads."""
    model, profile = calibrated(kinds=["attention"], removals=(0.1, 0.2))
    actions = [profile.menu[-1].actions[n] for n in ("model.layers.0.self_attn", "model.layers.1.self_attn")]
    assert {a.kind for a in actions} == {"thin", "lowrank"}
    assert profile.menu[0].actions.keys() <= profile.menu[1].actions.keys()
    assert profile.sites["model.layers.0.self_attn"].ranks[8] < profile.sites["model.layers.0.self_attn"].loss
    plan = profile.plan_of(profile.menu[-1])
    assert plan.replace.keys() == {n for n, a in profile.menu[-1].actions.items() if a.kind == "lowrank"}
    assert plan.kv == "none"
    compiled, prompt = skipc.compile(model, fullgraph=True, **STRICT), text(3, 1)[0][:, :6]
    with compiled.session(plan=plan):
        found = skipc.generate(compiled, prompt, max_new_tokens=8, eos_token_id=None)
    for _ in range(8):
        (batch,) = batches_of(model, [prompt])
        prompt = torch.cat([prompt, call_on(model, batch, plan).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, prompt)
