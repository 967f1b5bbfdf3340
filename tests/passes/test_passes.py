"""Each pass against its contract: numerics, matches, operations, unchanged inputs and outputs, idempotence, and a case
that must not match. And the manager around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.decompose_fast_paths import DecomposeFastPaths
from skipc.passes.find_sites import FindSites
from skipc.passes.functionalize_inplace import FunctionalizeInplace
from skipc.passes.manager import PassManager
from skipc.passes.ops import written_arguments
from skipc.passes.pipeline import PIPELINE, REGION_PIPELINE
from skipc.passes.remove_noops import RemoveNoops
from torch import fx, nn

import skipc
from skipc.cli import passes_markdown
from skipc.ir.errors import PassError
from tests.harness import capture, check_pass, ops
from tests.models.zoo import HandWritten, ids

X = torch.randn(2, 5, 16)


class TestRemoveNoops:
    def test_matches(self) -> None:
        def model(x: torch.Tensor) -> torch.Tensor:
            y = F.dropout(x, 0.5, False).to(torch.float32).contiguous()
            with torch.autocast("cpu", enabled=False):
                y = y + x
            return y.detach().float()

        check_pass(RemoveNoops, model, X, matches=5, gone=["dropout", "_enter_autocast"], there=["add"])

    def test_leaves_real_work(self) -> None:
        def model(x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float64).transpose(1, 2).contiguous().clone() + x.to(torch.float32, copy=True).mean()

        check_pass(RemoveNoops, model, X, matches=0, there=["to", "contiguous", "clone"])

    def test_leaves_training_dropout(self) -> None:
        gm, _ = capture(lambda x: F.dropout(x, 0.5, True), X)
        assert PassManager(PassContext(), (RemoveNoops,)).run(gm).code == gm.code


class TestFunctionalizeInplace:
    def test_matches(self) -> None:
        def model(x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            h += x
            h.mul_(3)
            return F.relu(h, inplace=True) + h

        check_pass(FunctionalizeInplace, model, X, matches=3, gone=["iadd", "mul_"], there=["add", "mul", "relu"])

    def test_leaves_inputs_views_and_indexed_writes(self) -> None:
        def model(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache.add_(x)  # the caller sees it
            h = x * 2
            row = h[:, 0]
            h += 1  # the view must see it
            g = x * 3
            g[:, 0] = row
            return g

        check_pass(FunctionalizeInplace, model, X, X.clone(), matches=0, there=["add_", "iadd", "setitem"])

    def test_leaves_sums_that_would_promote(self) -> None:
        def model(x: torch.Tensor) -> torch.Tensor:
            h = x.to(torch.bfloat16)
            h += x
            return h

        check_pass(FunctionalizeInplace, model, X, matches=0, there=["iadd"])


class TestDecomposeFastPaths:
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    def test_matches(self, norm_first: bool, masked: bool) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu").eval()
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[0, 3:] = True
        args = (X, None, padding) if masked else (X,)
        check_pass(
            DecomposeFastPaths, layer, *args, matches=1, gone=["_transformer_encoder_layer_fwd"],
            there=["scaled_dot_product_attention", "layer_norm", "gelu"],
        )  # fmt: skip

    def test_leaves_layers_without_a_fast_path(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=False).eval()
        check_pass(DecomposeFastPaths, layer, X, matches=0)


class TestFindSites:
    def test_changes_nothing(self) -> None:
        check_pass(
            FindSites, HandWritten().eval(), ids(), matches=2
        )  # sums in place are hidden without the passes before

    def test_finds_nothing_in_a_chain(self) -> None:
        check_pass(FindSites, nn.Sequential(nn.Linear(16, 16), nn.ReLU()), X, matches=0)

    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda s, x: torch.add(x, s.f(x), alpha=2), skipc.Reason.SCALED_ADD),
            (lambda s, x: s.g(x) + s.f(x), skipc.Reason.PROJECTED_SHORTCUT),
            (lambda s, x: s.h(x + s.p), skipc.Reason.BRANCH_INDEPENDENT),
            (lambda s, x: s.f(x + s.f(x)) + s.g(x), skipc.Reason.NOT_POST_DOMINATING),
            (lambda s, x: x + s.f(s.h(s.h(s.h(x)))), skipc.Reason.CONTAINS_SITES),
            (lambda s, x: s.b(s.f(x[:1])), skipc.Reason.SHAPE_CHANGES),
        ],
        ids=lambda v: v.value if isinstance(v, skipc.Reason) else "",
    )
    def test_near_misses_have_reasons(self, forward: object, reason: skipc.Reason) -> None:
        class Near(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)
                self.p = nn.Parameter(torch.randn(5, 16))

            def h(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.g(x)

            def b(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.g(x.expand(2, 5, 16))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return forward(self, x) * 2  # type: ignore[operator]

        report = skipc.explain(Near().eval(), X).report
        assert reason in {r.reason for r in report.rejected}, report
        assert all(r.reason.text for r in report.rejected)


class TestManager:
    def test_dump_writes_each_stage(self, tmp_path: Path) -> None:
        gm, _ = capture(HandWritten().eval(), ids())
        PassManager(PassContext(), dump=str(tmp_path)).run(gm)
        files = sorted(p.name for p in (tmp_path / "graph_000").iterdir())
        stages = ["input", *(p.name for p in PIPELINE)]
        assert files == [*(f"{i:02d}.{s}.py" for i, s in enumerate(stages)), "config.json", "passes.json"]
        assert "linear" in (tmp_path / "graph_000" / "00.input.py").read_text()
        assert [r["name"] for r in json.loads((tmp_path / "graph_000" / "passes.json").read_text())] == stages[1:]

    def test_a_pass_that_drops_a_write_is_caught(self) -> None:
        class Careless(Pass):
            name = "careless"

            def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
                gm.graph.erase_node(next(n for n in gm.graph.nodes if n.target == "add_"))
                return PassResult(1, True)

        def model(x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            x.add_(1)
            return y

        gm, _ = capture(model, X.clone())
        with pytest.raises(PassError, match="careless dropped a write"):
            PassManager(PassContext(), (Careless,)).run(gm)

    def test_a_pass_that_changes_the_output_is_caught(self) -> None:
        class Wrong(Pass):
            name = "wrong"

            def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
                output = next(iter(reversed(gm.graph.nodes)))
                output.args = ((output.args[0][0], output.args[0][0]),)
                return PassResult(1, True)

        gm, _ = capture(lambda x: x * 2, X)
        with pytest.raises(PassError, match="wrong changed the inputs or outputs"):
            PassManager(PassContext(), (Wrong,)).run(gm)

    def test_every_pass_is_documented(self) -> None:
        for kind in (*PIPELINE, *REGION_PIPELINE):
            for part in (
                "Before",
                "After",
                "Leaves alone:",
                "f32[" if "bf16[" not in (kind.__doc__ or "") else "bf16[",
            ):
                assert part in (kind.__doc__ or ""), f"{kind.name} has no {part}"
        assert (Path(__file__).parents[2] / "docs" / "passes.md").read_text() == passes_markdown()

    def test_passes_can_be_switched_off(self) -> None:
        explanation = skipc.explain(
            HandWritten().eval(), ids(), config=skipc.Config(disable_passes=["functionalize_inplace"])
        )
        assert [p.name for p in explanation.graphs[0].passes] == [
            "decompose_fast_paths",
            "remove_noops",
            "fuse_lora",
            "hoist_slices",
            "share_common_values",
            "fold_grouped_queries",
            "narrow_kv_cache",
            "find_sites",
            "lower_attention",
            "lower_gated_mlp",
            "lower_linears",
            "lower_attention_block",
            "lower_copied_keys",
            "group_adapters",
        ]
        assert len(explanation.sites) == 2  # sums in place stay hidden

    def test_symbolic_sizes_are_compared_by_value(self) -> None:
        """A pass may write a dynamic size another way."""
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        for length in (5, 9, 7):
            x = torch.randn(2, length, 16)
            torch._dynamo.mark_dynamic(x, 1)
            compiled = torch.compile(layer, backend="skipc", options={"on_error": "raise"}, fullgraph=True)
            torch.testing.assert_close(compiled(x), layer(x))


def test_operators_named_like_writes_write_nothing() -> None:
    """``operator.and_`` ends like ``add_``."""
    gm, _ = capture(lambda a, b: (a & b) | a, torch.tensor([True]), torch.tensor([False]))
    assert set(ops(gm)) == {"and_", "or_"}
    assert not any(written_arguments(n) for n in gm.graph.nodes)
