"""Helpers that all tests share: fp64 truth, eager skipping by hooks, and the contract that every pass is held to."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from skipc.passes.base import Pass, PassContext, PassResult
from skipc.passes.fx_edit import copy_graph
from skipc.passes.manager import PassManager, same_signature, signature
from skipc.passes.ops import op_name
from torch import fx
from torch.utils import _pytree as pytree

import skipc
from skipc.calibration import sampling
from skipc.calibration.costs import Regime
from tests.models.zoo import ids

STRICT = {"on_error": "raise"}


def seldom(*values: Any) -> Any:
    """Parameters of a test that `make test` leaves out: another case of what others show."""
    return pytest.param(*values, marks=pytest.mark.slow)


def floats(output: Any) -> list[torch.Tensor]:
    """All floating tensors in a model's output."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def in_double(module: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The module and its inputs in fp64."""
    double = copy.deepcopy(module).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # torch's grouped matrix product has no fp64 kernel
    cast = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return double, cast


def assert_no_further(truth: Any, eager: Any, ours: Any, factor: float = 2.0) -> None:
    """``ours`` is at most ``factor`` times as far from the fp64 ``truth`` as ``eager`` is. Where eager is exact by
    luck (few elements), one rounding of the largest value is allowed."""
    truths, eagers, mine = floats(truth), floats(eager), floats(ours)
    assert len(truths) == len(eagers) == len(mine)
    for t, e, o in zip(truths, eagers, mine, strict=True):
        assert o.shape == e.shape
        assert o.dtype == e.dtype
        slack = torch.finfo(e.dtype).eps * max(1.0, t.abs().max().item() if t.numel() else 1.0) * 4
        allowed = factor * distance(e, t) + slack
        assert distance(o, t) <= allowed, f"{distance(o, t):.2e} from fp64, eager {distance(e, t):.2e}"


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite if NaNs or infinities do not agree."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).max().item() if a.numel() else 0.0


def assert_equal_bits(a: Any, b: Any) -> None:
    """All floating tensors of two outputs agree in every bit (NaN equals NaN)."""
    for x, y in zip(floats(a), floats(b), strict=True):
        assert torch.equal(x.nan_to_num(nan=1e30), y.nan_to_num(nan=1e30))


def _zeroed(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


@contextlib.contextmanager
def eager_skip(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Zero the outputs of the named modules while the block runs: what skipping means, in eager.

    ``a#2`` stands for the second run of module ``a`` in a call.
    """
    wanted: dict[str, set[int]] = {}
    for name in names:
        module, _, run = name.partition("#")
        wanted.setdefault(module, set()).add(int(run or 1))
    runs: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., Any]:
        def zero(module: torch.nn.Module, args: Any, output: Any) -> Any:
            runs[name] += 1
            return _zeroed(module, args, output) if runs[name] in wanted[name] else output

        return zero

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in wanted]
    handles.append(model.register_forward_pre_hook(lambda *_: runs.clear()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Passes


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and its real inputs."""
    caught: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        caught[:] = [copy_graph(gm), list(inputs)]
        return gm.forward

    torch._dynamo.reset()  # forget sizes that earlier tests made dynamic
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    return caught[0], caught[1]


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation occurs."""
    return Counter(op_name(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method"))


def check_pass(
    kind: type[Pass],
    model: Callable[..., Any],
    *args: Any,
    matches: int,
    gone: Iterable[str] = (),
    there: Iterable[str] = (),
) -> fx.GraphModule:
    """Hold a pass to its contract on one model: numerics equal to eager, the expected number of matches, operations
    that must be gone or there, inputs and outputs as they were, and nothing left to do for a second run."""
    gm, inputs = capture(model, *args)
    before = signature(gm.graph)
    text = gm.code
    manager = PassManager(PassContext(), (kind,))
    result = manager.run(gm)
    assert gm.code == text, "the pass edited Dynamo's own graph"
    assert manager.records[0].matched == matches, f"{manager.records[0].matched} matches"
    assert same_signature(signature(result.graph), before)
    assert not set(gone) & set(ops(result)), f"left over: {set(gone) & set(ops(result))}"
    assert set(there) <= set(ops(result)), f"missing: {set(there) - set(ops(result))}"
    ours, theirs = copy.deepcopy(inputs), copy.deepcopy(inputs)
    expected, found = gm(*theirs), result(*ours)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(b, a)
    for a, b in zip(theirs, ours, strict=True):  # writes to inputs
        torch.testing.assert_close(b, a)
    again: PassResult = kind().run(result, PassContext())
    assert not again.changed, "a second run still changes the graph"
    return result


def unlike_in_padding() -> list[dict[str, torch.Tensor]]:
    """Two calls of an encoder, int64 [2, 7], that differ in what stands in the place of padding alone."""
    made = []
    for padding in (1, 2):
        text, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
        mask[0, 5:], text[0, 5:] = 0, padding
        made.append({"input_ids": text, "attention_mask": mask})
    return made


def in_threads(function: Callable[[Any], object], arguments: Sequence[Any]) -> None:
    """Call ``function`` with each argument, all at the same time. What a call raises is raised here."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        for call in [pool.submit(function, argument) for argument in arguments]:
            call.result()


def run_regions_uncompiled(monkeypatch: Any) -> None:
    """Let regions run as they are, without Inductor: for tests of passes and programs that need many graphs."""
    import skipc.passes.lowering.outline as outline

    monkeypatch.setattr(
        outline, "compile_region", lambda gm, config, checked=True: lambda arguments: gm.forward(*arguments)
    )


def check_model(model: torch.nn.Module, *args: Any, subsets: int = 8, seed: int = 0) -> list[str]:
    """Hold skipc to eager on one model: exact without a session, equal to zeroing by hooks for every subset of sites
    (or ``subsets`` random ones), inputs written alike, outputs that share memory with nothing they should not. Returns
    the names of its sites."""
    import random

    import skipc

    compiled = skipc.compile(model, fullgraph=True, **STRICT)
    theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
    _assert_same(model(*theirs), compiled(*ours))
    _assert_same(theirs, ours)
    names = [n for n in skipc.find_sites(model, *copy.deepcopy(args)).names if "<" not in n]  # those eager can zero
    rng = random.Random(seed)
    every = [{n for i, n in enumerate(names) if bits >> i & 1} for bits in range(1, 1 << len(names))]
    for skip in every if len(every) <= subsets else [set(names), *rng.sample(every, subsets - 1)]:
        theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
        with eager_skip(model, skip):
            expected = model(*theirs)
        with compiled.session(skip=skip) as session:
            found = compiled(*ours)
            assert session.stats().recompiles == 0
        _assert_same(expected, found)
        _assert_same(theirs, ours)
        for made in (t for t in floats(found)):
            owners = [t for t in (*floats(ours), *model.parameters()) if _share(made, t)]
            exact = [t for t in (*floats(theirs), *model.parameters()) if any(_share(e, t) for e in floats(expected))]
            assert len(owners) <= len(exact), "an output shares memory with an input or a weight"
    return names


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _assert_same(expected: Any, found: Any) -> None:
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        else:
            assert a == b


def known_times(patch: pytest.MonkeyPatch) -> None:
    """Let calls take a nanosecond for each weight that they read, and 20 microseconds: small models have none to
    measure but overheads."""

    def times(
        compiled: Any, regime: Regime, plans: Mapping[str, skipc.Plan | None], rounds: int, example: Any
    ) -> dict[str, list[float]]:
        found = {}
        for name, plan in plans.items():
            plan = plan or skipc.Plan()
            gone = (*plan.skip, *plan.replace)
            read = sum(
                plan.weights.get(path, value).numel()
                for path, value in compiled.model.named_parameters()
                if value.dim() > 1 and not any(path.startswith(f"{site}.") for site in gone)
            )
            read += sum(t.numel() for r in plan.replace.values() for t in r.tensors.values())
            found[name] = [2e-5 + read * regime.batch * regime.tokens * 1e-9] * rounds
        return found

    patch.setattr(sampling, "time_calls", times)
