"""Calling a program again without Dynamo in between: what a decode loop does once nothing but tensors' contents change.

Dynamo checks some hundred guards at every call and gathers the program's inputs anew. For a loop that owns its inputs
both are the same each time. That is not assumed but seen: two calls through Dynamo must hand the program the very same
tensors, and leave every plain attribute of the model and its cache as it was; afterwards the model is watched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from operator import itemgetter
from typing import Any

import torch

Call = tuple[Any, tuple[Any, ...], tuple[Any, ...]]  # a program, its inputs and its outputs

_record: ContextVar[list[Call] | None] = ContextVar("skipc_record", default=None)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collects the calls of programs in this context, in order."""
    calls: list[Call] = []
    token = _record.set(calls)
    try:
        yield calls
    finally:
        _record.reset(token)


def note_call(program: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Called by programs."""
    calls = _record.get()
    if calls is not None:
        calls.append((program, inputs, outputs))


class ModelWatch:
    """Notices edits of a model that a compiled call would have noticed: parameters, buffers and submodules that were
    replaced, hooks, training mode. Edits inside a tensor need no notice: programs take weights as inputs.

    It is asked before every token, so it compares identities in one sweep of C code (60 microseconds for 300 modules).
    """

    def __init__(self, model: torch.nn.Module):
        modules = list(model.modules())
        self._members: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._attributes = [vars(m) for m in modules]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._kept = [v for d in self._members for v in d.values()]  # alive, so that no identity is used again
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        return (
            tuple(map(id, chain.from_iterable(map(dict.values, self._members)))),
            tuple(map(itemgetter("training"), self._attributes)),
            tuple(map(len, self._hooks)),
        )

    def changed(self) -> bool:
        """True if the model is not the one that was watched first."""
        return self._read() != self._state


class Replay:
    """One call, repeatable: ``step()`` is ``call()`` as long as that provably means running one program on the same
    tensors.

    Args:
        call: the compiled call, on tensors that the caller refills in place.
        result: what of the call's result :meth:`step` returns, a tensor.
        model: is watched for edits.
        owners: objects whose plain attributes must not change in a call (the cache).
    """

    def __init__(
        self,
        call: Callable[[], Any],
        result: Callable[[Any], torch.Tensor],
        model: torch.nn.Module,
        owners: Iterable[object],
    ):
        self._call, self._result, self._model = call, result, model
        self._owners = [*owners, *model.modules()]
        self._watch: ModelWatch | None = None
        self._last: tuple[Any, tuple[Any, ...], int] | None = None
        self._earlier: tuple[Any, tuple[Any, ...], int] | None = None  # the last before something outside ran
        self._repeated: Any = None
        self._before: Any = None  # what was repeated before it had to be proven anew
        self.refused: str | None = None
        self.replayed = 0

    def step(self, watched: bool = True) -> torch.Tensor:
        """The next result. The model is not ``watched`` if nobody else can have run since the last step."""
        if self._repeated is not None and watched and self._watch is not None and self._watch.changed():
            self.forget()
        if self._repeated is None:
            return self._guarded()
        assert self._last is not None
        self.replayed += 1
        return self._repeated(not watched)[self._last[2]]  # type: ignore[no-any-return]

    @property
    def repeats(self) -> bool:
        """Whether the next step is proven."""
        return self._repeated is not None

    def forget(self) -> None:
        """Prove anew, since something outside has run: by one call through Dynamo, if it hands the program what one
        did before, otherwise by two."""
        self._repeated = None
        self._earlier, self._last = self._last or self._earlier, None

    def _guarded(self) -> torch.Tensor:
        if self.refused:
            return self._result(self._call())
        before = _plain_state(self._owners)
        self._watch = ModelWatch(self._model)
        with recording() as calls:
            result = self._result(self._call())
        now, why = self._single(calls, result)
        last = self._last or self._earlier
        if now is not None and last is not None and _same(now, last):
            if _plain_state(self._owners) == before:
                program, inputs, _ = now
                self._repeated = self._again(program, inputs)
            else:
                why = "the model or its cache counts steps in Python"
        elif now is not None and self._last is not None:
            why = "the program's inputs are new at each call"
        self.refused, self._last, self._earlier = why, now, None
        return result

    def _again(self, program: Any, inputs: tuple[Any, ...]) -> Any:
        """The program on these inputs; what was made for them before, if they are the same, since graphs that were
        captured cost more than a proof."""
        before = self._before
        if before is None or before.program is not program or not before.takes(inputs):
            before = self._before = program.repeated(inputs)
        else:
            before.distrust()
        return before

    @staticmethod
    def _single(calls: list[Call], result: torch.Tensor) -> tuple[tuple[Any, tuple[Any, ...], int] | None, str | None]:
        if len(calls) != 1:
            return None, f"a step runs {len(calls)} programs"
        program, inputs, outputs = calls[0]
        if program.partial:
            return None, "the model has graph breaks"
        index = next((i for i, o in enumerate(outputs) if o is result), None)
        if index is None:
            return None, "the result is computed outside the program"
        return (program, inputs, index), None


def _same(a: tuple[Any, tuple[Any, ...], int], b: tuple[Any, tuple[Any, ...], int]) -> bool:
    return (
        a[0] is b[0]
        and a[2] == b[2]
        and len(a[1]) == len(b[1])
        and all(x is y if isinstance(x, torch.Tensor) else x == y for x, y in zip(a[1], b[1], strict=True))
    )


def _plain_state(owners: Iterable[object]) -> list[Any]:
    """Numbers, strings and flags in the attributes of ``owners``, and which tensors they hold. (A model has thousands
    of attributes, and this is asked for at each proof: so known types are told apart before instances are.)"""
    state: list[Any] = []
    for owner in owners:
        for name, value in vars(owner).items():
            kind = type(value)
            if kind in _OTHERS:
                continue
            if kind in _PLAIN or isinstance(value, _PLAIN):
                state.append((name, value))
            elif isinstance(value, torch.Tensor):
                state.append((name, id(value)))
    return state


_PLAIN = (bool, int, float, str, type(None))
_OTHERS = frozenset({dict, OrderedDict, set, list, tuple})
