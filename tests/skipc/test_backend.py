"""The backend under its string name: discovery, options, caching, several instances."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from skipc.runtime import registry

import skipc
from tests.harness import STRICT, assert_no_further, eager_skip
from tests.models.zoo import ZOO, HandWritten, ids


def compilations() -> int:
    return sum(registry._compiled.values())


def test_entry_point_needs_no_import() -> None:
    script = """
        import sys, torch
        assert "skipc" in torch.compiler.list_backends()
        net = torch.nn.Sequential(torch.nn.Linear(8, 8))
        class Residual(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.f = net
            def forward(self, x):
                return x + self.f(x)
        m = Residual().eval()
        assert not any(name.split(".")[0] == "skipc" for name in sys.modules)
        f = torch.compile(m, backend="skipc", options={"on_error": "raise"}, fullgraph=True)
        with torch.no_grad():
            x = torch.randn(2, 3, 8)
            torch.testing.assert_close(f(x), m(x))
        from skipc.runtime import registry
        assert sum(registry._compiled.values()) == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_import_is_cheap() -> None:
    script = "import sys, skipc; assert 'torch' not in sys.modules, 'import skipc loads torch'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_module_compile_and_session_function() -> None:
    model = HandWritten().eval()
    reference = HandWritten().eval()
    reference.load_state_dict(model.state_dict())
    model.compile(backend="skipc", options=dict(STRICT), fullgraph=True)
    tokens = ids()
    torch.testing.assert_close(model(tokens), reference(tokens))
    with eager_skip(reference, {"blocks.0.mlp"}):
        expected = reference(tokens)
    with skipc.session(model, skip={"blocks.0.mlp"}) as session:
        torch.testing.assert_close(model(tokens), expected)
    assert session.stats().skipped["blocks.0.mlp"] == 1


def test_equal_options_do_not_recompile_and_instances_keep_their_own() -> None:
    first, second = HandWritten().eval(), HandWritten().eval()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.5)
    tokens = ids()
    before = compilations()
    compiled = [torch.compile(m, backend="skipc", options=dict(STRICT)) for m in (first, second, first)]
    for f, m in zip(compiled, (first, second, first), strict=True):
        torch.testing.assert_close(f(tokens), m(tokens))
    assert compilations() - before <= 2  # Dynamo may compile per instance, but not per torch.compile call
    with eager_skip(second, {"blocks.1.attn"}):
        expected = second(tokens)
    with skipc.session(compiled[1], skip={"blocks.1.attn"}) as session:
        torch.testing.assert_close(compiled[0](tokens), first(tokens))  # another instance: not governed
        torch.testing.assert_close(compiled[1](tokens), expected)
    assert session.stats().calls == 1


def test_preset_off_and_lone_mode() -> None:
    model, tokens = HandWritten().eval(), ids()
    off = torch.compile(model, backend="skipc", options={"preset": "off"}, isolate_recompiles=True)
    torch.testing.assert_close(off(tokens), model(tokens))
    mode = torch.compile(model, backend="skipc", mode="reduce-overhead", isolate_recompiles=True)
    torch.testing.assert_close(mode(tokens), model(tokens))
    with pytest.raises(Exception, match="no Inductor mode is called 'fastest'"):
        torch.compile(model, backend="skipc", mode="fastest", isolate_recompiles=True)(tokens)
    with pytest.raises(Exception, match=r"Inductor has no option 'max_autotun'.*max_autotune"):
        torch.compile(model, backend="skipc", options={"inductor": {"max_autotun": True}}, isolate_recompiles=True)(
            tokens
        )


def test_equal_layers_are_compiled_once() -> None:
    model = ZOO["llama"].build()
    explanation = skipc.explain(model, ids(), use_cache=False)
    regions = {r.name: r for r in explanation.graphs[0].spec.regions}
    assert {"prologue", "attention", "mlp", "tail"} == set(regions)
    assert regions["attention"].calls == regions["mlp"].calls == 2


def test_same_bits_as_inductor() -> None:
    """Regions hold whole sublayers, so without native kernels, which sum in another order, fp32 has the same bits."""
    model, tokens = ZOO["llama"].build(), ids()
    whole = torch.compile(model, isolate_recompiles=True)(tokens, use_cache=False).logits
    off = ("fold_grouped_queries", "lower_gated_mlp", "lower_linears")
    assert torch.equal(skipc.compile(model, disable_passes=off, **STRICT)(tokens, use_cache=False).logits, whole)


def test_bfloat16() -> None:
    """Between regions the stream is rounded to bf16, as in eager."""
    model, tokens = ZOO["llama"].build(), ids()
    low = copy.deepcopy(model).to(torch.bfloat16)
    double = copy.deepcopy(low).double()
    truth = double(tokens, use_cache=False).logits
    assert_no_further(
        truth,
        low(tokens, use_cache=False).logits,
        skipc.compile(low, **STRICT)(tokens, use_cache=False).logits,
    )
