"""The one place where skipc calls Inductor, and the only one that knows its internals (torch 2.13)."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from skipc.passes.fx_edit import fake_mode_of
from torch import fx

from skipc.ir.config import Config
from skipc.ir.errors import ConfigError, VersionError, nearest

SUPPORTED_TORCH = (2, 13)

Compiled = Callable[[list[Any]], Sequence[Any]]


def check_torch_version() -> None:
    """Refuse a torch that this release does not know.

    Raises:
        VersionError: naming the version found and the one that is needed.
    """
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    found = tuple(map(int, match.groups())) if match else ()
    if found != SUPPORTED_TORCH:
        need = ".".join(map(str, SUPPORTED_TORCH))
        raise VersionError(f"skipc needs torch {need}.x, found {torch.__version__}: pip install 'torch=={need}.*'")


def config_patches(config: Config) -> dict[str, Any]:
    """Inductor's settings from ``config.mode`` and ``config.inductor``.

    Raises:
        ConfigError: for a mode or option that Inductor does not have.
    """
    patches: dict[str, Any] = {}
    if config.mode not in (None, "default"):
        modes = torch._inductor.list_mode_options()
        if config.mode not in modes:
            raise ConfigError(f"no Inductor mode is called {config.mode!r}; known: {', '.join(modes)}")
        patches.update(modes[config.mode])
    known = torch._inductor.list_options()
    for key, value in config.inductor.items():
        name = key.replace("-", "_")
        if name not in known:
            close = nearest(name, known)
            raise ConfigError(f"Inductor has no option {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        patches[name] = value
    # Regions hand each other fresh tensors, which CUDA graphs would have to copy in. One graph a plan comes in a later
    # release. Until then, modes that ask for CUDA graphs run without.
    patches.pop("triton.cudagraphs", None)
    return patches


@functools.cache
def source_tag() -> str:
    """A digest of skipc's own code, which Inductor's caches do not see: of the operations that it puts into graphs they
    know the names alone."""
    package = Path(str(importlib.util.find_spec("skipc").origin)).parent  # type: ignore[union-attr]
    roots = [package, *(Path(str(sys.modules[f"skipc.{name}"].__file__)).parent for name in ("passes", "kernels"))]
    digest = hashlib.sha256()
    for path in sorted({p for root in roots for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _tagged() -> AbstractContextManager[None]:
    """What is compiled in here is found again in Inductor's caches, of any kind, by this version of skipc alone."""
    tag = f"{torch.compiler.config.cache_key_tag} skipc {source_tag()}"
    return torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined,no-any-return]


def compile_whole(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """Plain Inductor on a whole Dynamo graph, settings included."""
    from torch._inductor.compile_fx import compile_fx

    patches = config_patches(config)
    if config.mode in ("reduce-overhead", "max-autotune"):
        patches.update(torch._inductor.list_mode_options(config.mode))
    with _tagged():
        whole: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return whole


@contextmanager
def overlapped_builds() -> Iterator[None]:
    """While this is open, Inductor writes the code of one CPU region while g++ still builds that of the ones before;
    all builds are waited for at the end. (Inductor itself waits at the end of each graph, and knows no later one.)

    A generated module calls ``AsyncCompile.wait(globals())`` before it defines its entry, which looks its kernels up
    by name when it is called: not before this context has closed.
    """
    from torch._inductor.async_compile import AsyncCompile

    wait = AsyncCompile.wait
    pending: list[tuple[AsyncCompile, dict[str, Any]]] = []
    owner = threading.get_ident()  # Inductor in another thread waits as ever

    def later(builds: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            pending.append((builds, scope))
        else:
            wait(builds, scope)

    with mock.patch.object(AsyncCompile, "wait", later):
        yield
    for builds, scope in pending:
        wait(builds, scope)


@contextmanager
def late_guards(gm: fx.GraphModule) -> Iterator[list[Any]]:
    """What was assumed about the sizes of ``gm`` while this was open, sympy expressions, is in the list afterwards.
    (Dynamo freezes its ShapeEnv when it is done with a graph, after which assumptions are dropped without a word.)"""
    mode = fake_mode_of(gm.graph)
    shape_env = mode.shape_env if mode is not None else None
    found: list[Any] = []
    if shape_env is None:
        yield found
        return
    frozen, before = shape_env.frozen, len(shape_env.guards)
    shape_env.frozen = False
    try:
        yield found
    finally:
        shape_env.frozen = frozen
        found += [guard.expr for guard in shape_env.guards[before:]]


def compile_region(gm: fx.GraphModule, config: Config, checked: bool = True) -> Compiled:
    """Compile one region with Inductor. The result takes a list of inputs and returns the outputs in order. With
    ``checked`` it checks their sizes and strides at every call, which takes a tenth of the time between kernels.

    Example inputs are the fake tensors of Dynamo's trace, so guards on size symbols land in Dynamo's own ShapeEnv.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
    mode = fake_mode_of(gm.graph)
    inner: list[Any] = []

    def keep_inner(*args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(*args, **kwargs))
        return inner[-1]

    # A tracing context of its own: AOTAutograd would otherwise mix the example values with the outer context's mode,
    # and leave this region's metadata there for the next one. Its cache is off because a hit hides the inner function;
    # Inductor's own cache, which holds the costly part, stays on.
    patches = config_patches(config)
    if not checked:
        patches = {"size_asserts": False, "alignment_asserts": False, **patches}
    context = TracingContext(mode)
    with tracing(context), torch._functorch.config.patch(enable_autograd_cache=False), _tagged():
        compiled: Any = compile_fx(gm, values, inner_compile=keep_inner, config_patches=patches)
    function = getattr(inner[0], "current_callable", None) if len(inner) == 1 else None
    if function is not None and _wrapper_does_nothing(context.fw_metadata, values):
        return _direct(function, context.fw_metadata)
    # The host program already runs with Dynamo off, so the guard that compile_fx puts around its result is taken off.
    # (That result takes its inputs unpacked, although it inherits a `_boxed_call` mark from what it wraps.)
    if getattr(compiled, "_torchdynamo_disable", False):
        compiled = getattr(compiled, "__wrapped__", compiled)
    return lambda arguments: compiled(*arguments)


def _wrapper_does_nothing(meta: Any, values: Sequence[Any]) -> bool:
    """True if AOTAutograd's run-time wrapper, which costs some 20 microseconds a call, would only pass inputs and
    outputs through: no output is an alias, all writes to inputs happen inside, and none of those inputs overlaps
    another."""
    from torch._functorch._aot_autograd.schemas import MutationType, OutputType

    if meta is None or meta.num_intermediate_bases or meta.tokens:
        return False
    if any(o.output_type is not OutputType.non_alias for o in meta.output_info):
        return False
    if any(i.mutation_type is MutationType.MUTATED_OUT_GRAPH for i in meta.input_info):
        return False
    if len(meta.input_info) != len(values):
        return False
    storages = [v.untyped_storage()._cdata if isinstance(v, torch.Tensor) else None for v in values]
    written = [s for s, i in zip(storages, meta.input_info, strict=True) if i.mutates_data]
    return all(storages.count(s) == 1 for s in written)


def _direct(function: Compiled, meta: Any) -> Compiled:
    """The inner function alone, noting writes to inputs as the wrapper would."""
    written = [i for i, info in enumerate(meta.input_info) if info.mutates_data]
    if not written:
        return function

    def call(arguments: list[Any]) -> Sequence[Any]:
        torch._C._increment_version([arguments[i] for i in written])
        return function(arguments)

    return call
