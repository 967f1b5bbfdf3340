"""The command line, on a folder with a small model and a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from skipc.cli import main
from tests.models.zoo import VOCAB, ZOO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    ZOO["llama"].build().save_pretrained(path)  # type: ignore[operator]
    words = {chr(32 + i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="!").save_pretrained(path)
    return path


def run(*arguments: Any) -> str:
    torch._dynamo.reset()
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_calibrate_report_explain_and_bench(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and then it went away to sleep in the sun. " * 60)
    out = tmp_path / "profile"
    printed = run("calibrate", folder, "--out", out, "--text", text, "--removal", 0.2, "--cache", 63)
    assert "20%" in printed
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("curve", "sites", "plans"))
    assert "has a profile already" in run("calibrate", folder, "--out", out)
    assert "profile of LlamaForCausalLM" in run("explain", folder, "--profile", out)
    record = json.loads(run("explain", folder, "--profile", out, "--json"))
    assert record["profile"]["effort"] == "quick"
    figures = tmp_path / "bench.json"
    printed = run("bench", folder, "--profile", out, "--rounds", 2, "--json", figures)
    assert "promised" in printed
    peers = json.loads(figures.read_text())["peers"]
    assert set(peers) == {"eager", "Inductor", "skipc exact", "skipc 20%"}
    assert peers["skipc exact"]["speed"] == 1.0
    assert peers["skipc 20%"]["promised"] > 0


def test_mistakes_are_told_in_a_line(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(main, ["calibrate", "gpt5", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no folder (models are not downloaded); or give `smollm2` or `minilm`" in " ".join(result.output.split())
    result = runner.invoke(main, ["explain", str(folder), "--profile", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no profile" in result.output
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 150)
    wrong = ["--text", str(text), "--never", "model.layers.0.mlpp"]
    result = runner.invoke(main, ["calibrate", str(folder), "--out", str(tmp_path / "x"), *wrong])
    assert result.exit_code == 1
    assert "did you mean" in result.output
