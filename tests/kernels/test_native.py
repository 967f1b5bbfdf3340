"""Building the native kernels: once, or not at all with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from skipc.kernels import native

import skipc
from tests.models.zoo import ZOO


def test_the_second_run_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = native.find_compiler()
    assert compiler is not None
    built = native._built(compiler)
    stamp = built.stat().st_mtime_ns
    monkeypatch.setattr(native.os, "replace", None)  # building again would fail
    assert native._built(compiler) == built
    assert built.stat().st_mtime_ns == stamp


def test_a_broken_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo broken; else echo 'no such header' ; exit 1; fi\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("SKIPC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    reason = native._load.__wrapped__()
    assert reason is not None
    assert "no such header" in reason
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler")
def test_the_environment_switches_tile_registers_off() -> None:
    asked = (
        "from skipc.kernels import native, linear; import torch; print(native.tiles(), linear.max_rows(torch.bfloat16))"
    )
    environment = {**os.environ, "SKIPC_TILES": "0"}
    done = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "8"]
    here = native.tiles()
    with native.without_tiles():
        assert not native.tiles()
    assert native.tiles() == here


def test_without_a_compiler_models_run_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: "no C++ compiler was found (set CXX, or install g++)")
    model: Any = ZOO["llama"].build()
    ids = torch.randint(3, 90, (1, 5))
    with torch.no_grad():
        compiled = skipc.compile(model, on_error="raise", fullgraph=True)
        torch.testing.assert_close(compiled(ids.clone()).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()  # forget sizes that other tests made dynamic
    notes = {p.name: p.notes for p in skipc.explain(model, ids).graphs[0].passes}
    assert "no C++ compiler" in notes["lower_linears"][0]
    assert "no C++ compiler" in str(skipc.explain(model, ids))
