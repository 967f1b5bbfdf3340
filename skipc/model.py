"""``skipc.compile``: a compiled model with a handle for sessions and generation."""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from skipc.backend import skipc as backend
from skipc.dynamo import compile_isolated
from skipc.ir.config import Config
from skipc.ir.errors import AlreadyCompiledError, ConfigError, FallbackError
from skipc.ir.plan import Plan
from skipc.ir.program import KVPolicy
from skipc.ir.route import Route
from skipc.runtime import sessions
from skipc.runtime.policies.base import Policy
from skipc.runtime.sessions import Session

if TYPE_CHECKING:
    from skipc.adapters.bank import Rows
    from skipc.adapters.modes import Mode

log = logging.getLogger("skipc")

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class CompiledModel:
    """A model compiled by skipc. Call it like the model; the model itself stays as it was.

    One compilation serves prompts of any length: the token axis of the inputs, and the length of growing caches, are
    marked dynamic before each call that is longer than one token.
    """

    def __init__(self, model: torch.nn.Module, config: Config, **compile_options: Any):
        self.model = model
        self.options = config
        self._compile_options = compile_options
        self.refresh()

    def refresh(self) -> None:
        """Forget what was compiled; the next call compiles anew. Needed after edits that nothing can see, such as
        new code for a method; replaced or edited weights, changed submodules and forward hooks are noticed."""
        options = self.options.model_dump()
        self._function = compile_isolated(self.model, backend=backend, options=options, **self._compile_options)
        self._modules = list(self.model.named_modules())
        self._hooks = self._hook_state()
        self._generator: torch.nn.Module | None = None
        self._decoder: Any = None  # what skipc.generate keeps from one request to the next
        self._decoder_kinds: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check_hooks()
        if self._compile_options.get("dynamic") is None:
            _mark_dynamic(args, kwargs)
        session = sessions.innermost(self.model)
        before = session.calls if session is not None else 0
        if session is not None:
            session.note_mask(kwargs.get("attention_mask"))
        result = self._function(*args, **kwargs)
        if session is not None and session.calls == before:
            raise FallbackError("the session cannot be honoured: the call ran without any compiled program")
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("model", "options"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def session(
        self,
        *,
        skip: Iterable[str] = (),
        kv: KVPolicy | None = None,
        measure: bool = False,
        policy: Policy | None = None,
        record: bool = False,
        route: Route | None = None,
        plan: Plan | None = None,
        adapters: Rows | None = None,
        adapter_mode: Mode = "unmerged",
    ) -> Session:
        """Open a session; see :class:`skipc.Session`. Use it in a ``with`` statement."""
        bank = self.options.adapters
        return Session(self.model, skip, kv, measure, policy, record, route, plan, adapters, bank, adapter_mode)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate`` (Hugging Face), with prefill and decode compiled."""
        if not hasattr(self.model, "generate"):
            raise TypeError(f"{type(self.model).__name__} has no generate method")
        if self._generator is None:
            self._generator = self._make_generator()
        return self._generator.generate(*args, **kwargs)  # type: ignore[operator]

    def _make_generator(self) -> torch.nn.Module:
        """A shallow twin of the model, sharing all its weights, whose forward is this compiled model. The twin runs no
        hooks of its own: the model does, inside."""
        twin = copy.copy(self.model)
        for name in _HOOK_TABLES:
            twin.__dict__[name] = OrderedDict()
        twin.__dict__["forward"] = self._forward_like(self.model)
        return twin

    def _forward_like(self, model: torch.nn.Module) -> Any:
        """``self`` as a function with the signature of the model's forward, which ``generate`` inspects."""

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return forward

    def _hook_state(self) -> tuple[int, ...]:
        return tuple(len(m._forward_hooks) + len(m._forward_pre_hooks) for _, m in self._modules)

    def _check_hooks(self) -> None:
        """Dynamo does not guard on hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``), so skipc does."""
        state = self._hook_state()
        if state != self._hooks:
            names = [n or "the model" for (n, _), a, b in zip(self._modules, state, self._hooks, strict=True) if a != b]
            log.warning("compiling again: forward hooks changed on %s", ", ".join(names[:3]))
            self.refresh()


def compile(model: torch.nn.Module, config: Config | None = None, **options: Any) -> CompiledModel:
    """Compile ``model`` and return a handle: callable like the model, with sessions and ``generate``.

    Args:
        model: a module in evaluation mode. It is not changed.
        config: all options in one object, or
        **options: fields of :class:`skipc.Config`; ``dynamic`` and ``fullgraph`` are passed to ``torch.compile``.

    Raises:
        ConfigError: for an unknown option.
        AlreadyCompiledError: if ``model`` is compiled already.
    """
    if isinstance(model, CompiledModel | torch._dynamo.eval_frame.OptimizedModule):
        raise AlreadyCompiledError("the model is compiled already; give skipc.compile the original module")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"skipc.compile takes a torch.nn.Module, not {type(model).__name__}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise AlreadyCompiledError("model.compile() was called on this module already; compile a fresh one")
    compile_options = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    if config is not None and options:
        raise ConfigError("give either a Config or options, not both")
    config = config or Config(**options)
    if config.adapters is not None and config.adapters.model is not model:
        raise ConfigError("the bank of option 'adapters' was made for another model")
    return CompiledModel(model, config, **compile_options)


def session(function: Any, **settings: Any) -> Session:
    """A session on what ``torch.compile(..., backend="skipc")`` returned, or on a module after ``m.compile(...)``. It
    takes the settings of :class:`skipc.Session`.

    On a compiled plain function the session governs every compiled call of this thread.
    """
    if isinstance(function, CompiledModel):
        return function.session(**settings)
    model = getattr(function, "_orig_mod", function)
    if not isinstance(model, torch.nn.Module):
        model = getattr(function, "__self__", None)
    return Session(model if isinstance(model, torch.nn.Module) else None, **settings)


def _mark_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mark the token axis of a multi-token call: every input dimension, behind the batch, of the length of the first
    integer input's second dimension; the mask's own length; and the length of growing caches. Dimensions that somebody
    has marked as static stay so."""
    values = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    tokens = {v.shape[1] for v in values if v.dim() == 2 and not v.is_floating_point() and v.shape[1] > 1}
    tokens |= {v.shape[1] for v in values if v.dim() == 3 and v.is_floating_point() and v.shape[1] > 1}
    for value in values:
        for dim in range(1, value.dim()):
            if value.shape[dim] in tokens and dim not in getattr(value, "_dynamo_static_indices", ()):
                torch._dynamo.maybe_mark_dynamic(value, dim)
    for cache in kwargs.values():
        if getattr(cache, "is_compileable", True):
            continue
        for layer in getattr(cache, "layers", ()):
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(part, torch.Tensor) and part.dim() == 4 and part.shape[2] > 1:
                    torch._dynamo.maybe_mark_dynamic(part, 2)
