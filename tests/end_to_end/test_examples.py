"""Each example runs."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import skipc

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(p for p in FOLDER.glob("*.py") if p.stem != "train_layerskip")  # that one takes minutes: see below


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert "skipped" in capsys.readouterr().out


class TestTrainLayerSkip:
    """A small model, and text that says the same again and again."""

    @pytest.fixture(scope="class")
    def example(self) -> Any:
        return runpy.run_path(str(FOLDER / "train_layerskip.py"))

    @pytest.fixture(scope="class")
    def text(self) -> torch.Tensor:
        return torch.randint(1, 256, (40,), generator=torch.Generator().manual_seed(0)).repeat(60)

    @pytest.fixture(scope="class")
    def model(self, example: Any, text: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """After a training that was interrupted and went on."""
        folder, model = tmp_path_factory.mktemp("layerskip"), example["new_model"](4, 64)
        example["train"](model, text, 0.05, folder)
        half = model.lm_head.weight.detach().clone()
        before = torch.load(folder / "training.pt")["state"]  # its compilation may have taken long
        trained = example["train"](example["new_model"](4, 64), text, before["seconds"] / 60 + 0.2, folder)
        after = torch.load(folder / "training.pt")["state"]
        assert after["seconds"] >= before["seconds"] + 12
        assert after["step"] > before["step"]
        assert not torch.equal(trained.lm_head.weight, half)
        return trained

    def test_dropped_layers_and_exits(self, example: Any, text: torch.Tensor) -> None:
        model, ids = example["new_model"](4, 64), text[None, :32]
        found = example["losses"](model, ids, 0.0, 1, random.Random(0)).item()
        out = model(ids, output_hidden_states=True)
        early = model.lm_head(model.model.norm(out.hidden_states[2]))[0, :-1]
        last, truth = out.logits[0, :-1], ids[0, 1:]
        entropy = torch.nn.functional.cross_entropy
        exit_loss = (entropy(early, truth) + entropy(early, last.softmax(-1))) / 2
        assert found == pytest.approx((entropy(last, truth) + exit_loss).item() / 2, rel=1e-4)
        assert len({example["losses"](model, ids, 1.0, 1, random.Random(i)).item() for i in range(30)}) > 3  # dropped

    def test_what_was_trained_drafts(self, example: Any, model: Any, text: torch.Tensor, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
        batches = [text[i : i + 96].view(2, 48) for i in range(6)]
        plan = example["train_adapter"](model, 1, batches, tmp_path / "exit.safetensors", steps=8)
        kept = example["train_adapter"](model, 1, batches, tmp_path / "exit.safetensors")
        assert plan.skip == kept.skip
        assert all(torch.equal(a, b) for a, b in zip(plan.trained.values(), kept.trained.values(), strict=True))
        with torch.enable_grad():
            router = example["train_router"](model, 2, batches, tmp_path / "router.safetensors")
        example["measure"](model, text, {"half": skipc.SelfDraft(depth=2), "adapter": skipc.SelfDraft(plan)}, new=24)
        example["measure_router"](model, router, 2, text)
        said = capsys.readouterr().out
        assert "half" in said
        assert said.count("router, threshold") == 3
