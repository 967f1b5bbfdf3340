"""What users read: explanations, the command line, the demo's parts."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import skipc
from skipc.calibration.measure import measure_sites, perplexity
from skipc.calibration.text import english_text
from skipc.cli import main
from tests.harness import STRICT
from tests.models.zoo import ZOO, HandWritten, ids


def test_explanation_prints_sites_regions_and_program() -> None:
    explanation = skipc.explain(HandWritten().eval(), ids())
    text = str(explanation)
    for part in ("find_sites 4", "distinct regions", "attention x2", "blocks.1.mlp", "4 sites"):
        assert part in text
    program = explanation.program()
    compile(program, "program", "exec")
    assert "elif arm == 1:  # without blocks.0.attn (kv=project)" in program
    assert json.loads(json.dumps(explanation.to_dict()))["graphs"][0]["sites"][0]["name"] == "blocks.0.attn"


def test_explain_tells_why_not() -> None:
    class Trained(HandWritten):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(input_ids), 0.5, True)

    assert "random numbers" in str(skipc.explain(Trained(), ids()))
    off = skipc.explain(HandWritten().eval(), ids(), config=skipc.Config(preset="off"))
    assert "preset 'off'" in str(off)


def test_explain_tells_what_would_be_slower() -> None:
    torch._dynamo.reset()  # forget sizes that other tests made dynamic
    text = str(skipc.explain(ZOO["llama"].build(), torch.randint(3, 90, (1, 40))))
    assert "linear layers of 40 rows stay with torch, whose products are faster above 16" in text
    assert "torch's attention for more than 64 queries" in text


def test_explain_tells_where_gates_are_asked_and_what_sites_save() -> None:
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    kv = StaticCache(config=model.config, max_cache_len=64)
    model(torch.tensor([[3]]), past_key_values=kv)
    decode = skipc.explain(model, torch.tensor([[3]]), past_key_values=kv)
    assert "gates inside native chains" in str(decode)
    assert len({site.nodes for site in decode.sites if site.kind == "mlp"}) == 1
    prefill = skipc.explain(model, torch.randint(3, 90, (1, 40)), past_key_values=kv)
    assert "gates in host code (Inductor compiles the region" in str(prefill)


def test_explaining_disturbs_no_compiled_model() -> None:
    model = HandWritten().eval()
    compiled = skipc.compile(model, **STRICT)
    compiled(ids())
    with compiled.session() as session:
        for _ in range(12):  # more often than Dynamo's recompile limit
            skipc.find_sites(model, ids())
        compiled(ids())
        assert session.stats().recompiles == 0


@pytest.mark.parametrize("command", [["env"], ["passes"], ["options"], ["--help"], ["--version"]])
def test_commands_run(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.output


def test_explain_command(tmp_path: object) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = CliRunner().invoke(main, ["explain", str(tmp_path), "--program"])
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp" in result.output
    assert "def program(inputs, arms):" in result.output
    missing = CliRunner().invoke(main, ["explain", "no/such/model"])
    assert missing.exit_code != 0
    assert "is no folder" in missing.output


def test_measuring_sites() -> None:
    model = ZOO["llama"].build()
    compiled = skipc.compile(model, **STRICT)
    windows = [ids(1, 12), ids(1, 12)]
    logits = model(windows[0], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], windows[0][0, 1:])
    assert perplexity(compiled, windows) == pytest.approx(loss.exp().item(), rel=1e-4)
    measured = measure_sites(compiled, windows)
    assert [m.name for m in measured] == skipc.find_sites(model, windows[0], use_cache=False).names
    assert all(m.milliseconds > 0 and -1 <= m.similarity <= 1 for m in measured)
    assert len(english_text()) > 100_000
