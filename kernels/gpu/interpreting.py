"""Kernels under Triton's interpreter, in a process that also compiles them. The only module that knows its internals
(Triton 3.9).

Triton decides when a kernel is defined whether it will be interpreted, by ``TRITON_INTERPRET``, and its own library
with it. Here, modules of kernels are loaded a second time instead. What the interpreter changes about
``triton.language`` is changed once for each launch and put back behind it (3.9 changes it at each call of a function by
a kernel, and leaves it so)."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import triton
import triton.experimental.gluon  # which triton imports at the first launch, and which wants its library as it is
import triton.language as tl
from triton.runtime import interpreter


def run(function: Any, grid: Sequence[int], arguments: dict[str, Any]) -> None:
    """Run a kernel's programs one after the other."""
    with _interpreting():
        _interpreted(function)[tuple(grid)](**arguments)


@contextmanager
def _interpreting() -> Iterator[None]:
    own = {key: _interpreted(value) for key, value in vars(tl).items() if isinstance(value, triton.JITFunction)}
    own["standard"] = _module(tl.standard.__name__)  # by whose functions the interpreter knows sums and maxima

    both = FunctionType(_interpreted.__code__, {"tl": tl, "core": tl.core})  # only what it sees matters
    nothing = interpreter._LangPatchScope()
    with mock.patch.multiple(tl, **own):
        scope = interpreter._patch_lang(both)
        try:
            with mock.patch.object(interpreter, "_patch_lang", return_value=nothing):
                yield
        finally:
            scope.restore()


def _interpreted(function: Any) -> Any:
    return getattr(_module(function.fn.__module__), function.fn.__name__)


@functools.cache
def _module(name: str) -> Any:
    """A second copy of a module of kernels, in which they are interpreted."""
    spec = importlib.util.spec_from_file_location(f"{name}__interpreted", str(sys.modules[name].__file__))
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy  # where its dataclasses look themselves up
    tensor = dict(vars(tl.core.tensor))  # whose methods `standard` sets anew
    before, triton.knobs.runtime.interpret = triton.knobs.runtime.interpret, True
    try:
        spec.loader.exec_module(copy)
    finally:
        triton.knobs.runtime.interpret = before
    for key, value in tensor.items():
        if vars(tl.core.tensor)[key] is not value:
            setattr(tl.core.tensor, key, value)
    for key, value in list(vars(copy).items()):
        if isinstance(value, triton.JITFunction):  # of another module
            setattr(copy, key, _interpreted(value))
    return copy
