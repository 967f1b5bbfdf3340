"""What cannot work says so: a typed error, or a logged fallback with the same results. Never a wrong answer."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn

import skipc
from tests.harness import STRICT, eager_skip
from tests.models.zoo import HandWritten, ids


@pytest.fixture
def model() -> nn.Module:
    return HandWritten().eval()


def test_no_residual_stream(caplog: pytest.LogCaptureFixture) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 8)
    with pytest.raises(skipc.NoResidualStreamError):
        skipc.find_sites(plain, x)
    with caplog.at_level(logging.WARNING, "skipc"):
        torch.testing.assert_close(skipc.compile(plain)(x), plain(x))
    assert "no residual stream" in caplog.text


def test_grad_falls_back_with_gradients(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    compiled = skipc.compile(model)
    with torch.enable_grad(), caplog.at_level(logging.WARNING, "skipc"):
        out = compiled(ids())
        out.sum().backward()
    assert "gradients are enabled" in caplog.text
    assert model.head.weight.grad is not None
    with (
        torch.enable_grad(),
        pytest.raises(skipc.FallbackError, match="gradients"),
        compiled.session(skip={"blocks.0.mlp"}),
    ):
        compiled(ids())
    torch.testing.assert_close(compiled(ids()), model(ids()))  # and without gradients, skipc again


def test_training_mode_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    class Dropped(HandWritten):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(input_ids), 0.5, self.training)

    model = Dropped().train()
    with caplog.at_level(logging.WARNING, "skipc"):
        out = skipc.compile(model)(ids())
    assert "random numbers" in caplog.text
    assert 0.3 < (out == 0).float().mean() < 0.7


def test_graph_break_runs_but_refuses_a_session(model: nn.Module) -> None:
    class Broken(HandWritten):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.head(self.blocks[1](x))

    broken = Broken().eval()
    compiled = skipc.compile(broken)
    torch.testing.assert_close(compiled(ids()), broken(ids()))
    with pytest.raises(skipc.FallbackError, match="graph break"), compiled.session(skip={"blocks.0.mlp"}):
        compiled(ids())
    assert skipc.find_sites(broken, ids()).graph_breaks


def test_already_compiled(model: nn.Module) -> None:
    with pytest.raises(skipc.AlreadyCompiledError):
        skipc.compile(torch.compile(model))
    with pytest.raises(skipc.AlreadyCompiledError):
        skipc.compile(skipc.compile(model))  # type: ignore[arg-type]
    model.compile(backend="skipc")
    with pytest.raises(skipc.AlreadyCompiledError):
        skipc.compile(model)


def test_unknown_option_and_pass(model: nn.Module) -> None:
    with pytest.raises(skipc.ConfigError, match="did you mean 'lowering'"):
        skipc.compile(model, lowring="outline")
    with pytest.raises(Exception, match="did you mean 'remove_noops'"):
        skipc.compile(model, disable_passes=("remove_noop",))(ids())
    with pytest.raises(Exception, match="cannot be left out"):
        skipc.compile(model, disable_passes=("find_sites",))(ids())


def test_unknown_site_before_and_after_compiling(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    with (
        pytest.raises(skipc.UnknownSiteError, match=r"blocks\.0\.mlp"),
        compiled.session(skip={"blocks.0.mpl"}),
    ):
        compiled(ids())
    with pytest.raises(skipc.UnknownSiteError, match="did you mean"):
        compiled.session(skip={"blocks.0.mpl"})
    with pytest.raises(TypeError, match="not one string"):
        compiled.session(skip="blocks.0.mlp")


def test_a_module_that_is_no_site_is_refused(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    compiled(ids())
    with pytest.raises(skipc.SessionError, match=r"blocks\.0\.norm1 runs in this call, but is no site"):  # noqa: SIM117
        with compiled.session(skip={"blocks.0.norm1"}):
            compiled(ids())


def test_session_without_a_call_warns(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    with pytest.warns(UserWarning, match="no call of a compiled model"), compiled.session():
        model(ids())


def test_session_on_two_threads(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    tokens = ids()
    exact = compiled(tokens)
    with eager_skip(model, {"blocks.0.mlp"}):
        skipped = model(tokens)
    errors: list[BaseException] = []
    results: list[torch.Tensor] = []

    def call() -> None:
        try:
            with torch.no_grad():
                results.append(compiled(tokens))
        except BaseException as error:
            errors.append(error)

    def run(target: object) -> None:
        thread = threading.Thread(target=target)  # type: ignore[arg-type]
        thread.start()
        thread.join()

    with compiled.session(skip={"blocks.0.mlp"}) as session:
        run(call)
        assert isinstance(errors.pop(), skipc.SessionThreadError)
        run(session.bind(call))
        torch.testing.assert_close(results.pop(), skipped)
        compiled(tokens)
    run(call)
    torch.testing.assert_close(results.pop(), exact)
    with pytest.raises(skipc.SessionError, match="closed"):
        session.bind(call)()


def test_two_sessions_in_two_threads_do_not_mix(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    tokens = ids()
    compiled(tokens)
    names = ["blocks.0.mlp", "blocks.1.attn"]
    expected, found = {}, {}
    for name in names:
        with eager_skip(model, {name}):
            expected[name] = model(tokens)
    barrier = threading.Barrier(2)

    def request(name: str) -> None:
        with torch.no_grad(), compiled.session(skip={name}):
            barrier.wait()
            for _ in range(5):
                found[name] = compiled(tokens)
            barrier.wait()

    threads = [threading.Thread(target=request, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def test_nested_sessions_use_the_innermost(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    tokens = ids()
    with eager_skip(model, {"blocks.0.mlp"}):
        expected = model(tokens)
    with compiled.session() as outer:
        with compiled.session(skip={"blocks.0.mlp"}) as inner:
            torch.testing.assert_close(compiled(tokens), expected)
            with pytest.raises(skipc.SessionError, match="open already"):
                inner.__enter__()
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert (outer.stats().calls, inner.stats().calls) == (1, 1)


def test_edited_models_are_noticed(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    compiled = skipc.compile(model, **STRICT)
    tokens = ids()
    compiled(tokens)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
        model.blocks[0].mlp[0].weight = nn.Parameter(torch.randn_like(model.blocks[0].mlp[0].weight))
    torch.testing.assert_close(compiled(tokens), model(tokens))
    model.blocks[0].mlp = nn.Identity()
    torch.testing.assert_close(compiled(tokens), model(tokens))
    handle = model.blocks[1].mlp.register_forward_hook(lambda m, a, o: o * 0)
    with caplog.at_level(logging.WARNING, "skipc"):
        torch.testing.assert_close(compiled(tokens), model(tokens))
    assert "hooks changed on blocks.1.mlp" in caplog.text
    handle.remove()
    torch.testing.assert_close(compiled(tokens), model(tokens))


def test_autocast_inside_the_model_falls_back(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    class Cast(HandWritten):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(input_ids)

    cast = Cast().eval()
    with caplog.at_level(logging.WARNING, "skipc"):
        torch.testing.assert_close(skipc.compile(cast)(ids()), cast(ids()), rtol=2e-2, atol=2e-2)
    assert "autocast" in caplog.text


def test_inference_mode(model: nn.Module) -> None:
    compiled = skipc.compile(model, **STRICT)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(ids()), model(ids()))
        with eager_skip(model, {"blocks.0.mlp"}):
            expected = model(ids())
        with compiled.session(skip={"blocks.0.mlp"}):
            torch.testing.assert_close(compiled(ids()), expected)
