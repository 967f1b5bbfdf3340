"""Text, or whatever else a model takes, for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from skipc.ir.errors import PlanError
from skipc.ir.plan import Plan
from skipc.ir.replacement import Replacement
from skipc.ir.site import Source


@dataclass(frozen=True)
class Batch:
    """One call of a model, by keyword arguments."""

    inputs: Mapping[str, Any]

    @property
    def valid(self) -> torch.Tensor | None:
        """bool ``[batch, tokens]``, False for padding (of a decoder's tokens, where it has an encoder beside it); None
        if there is none."""
        decodes = {"decoder_input_ids", "decoder_attention_mask"} & self.inputs.keys()
        mask = self.inputs.get("decoder_attention_mask" if decodes else "attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def mask_of(self, rows: int) -> torch.Tensor | None:
        """bool ``[rows]``, False for padding: of the decoder's tokens or else the encoder's, whichever are so many."""
        masks = (self.valid, self.inputs.get("attention_mask"))
        found = [m.flatten().bool() for m in masks if isinstance(m, torch.Tensor) and m.dim() == 2]
        return next((m for m in found if m.numel() == rows), None)

    @property
    def tokens(self) -> int:
        """How many there are, padding included."""
        first = next((v for v in self.inputs.values() if isinstance(v, torch.Tensor)), None)
        return 0 if first is None else first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)


def batches_of(model: torch.nn.Module, given: Iterable[Any]) -> list[Batch]:
    """What the user gave, each as a batch: int64 ``[batch, tokens]`` tensors, or dictionaries of keyword arguments.

    Raises:
        TypeError: for anything else, and for none at all.
    """
    parameters = inspect.signature(model.forward).parameters
    first = next(iter(parameters))
    made = []
    for item in given:
        if isinstance(item, torch.Tensor):
            inputs: dict[str, Any] = {first: item}
        elif isinstance(item, Mapping):
            inputs = dict(item)
        else:
            raise TypeError(f"a batch is a tensor or a dictionary of keyword arguments, not {type(item).__name__}")
        if "use_cache" in parameters:
            inputs.setdefault("use_cache", False)
        made.append(Batch(inputs))
    if not made:
        raise TypeError("there is no batch to calibrate on")
    return made


def call_on(model: torch.nn.Module, batch: Batch, plan: Plan | None = None, frozen: bool = False) -> Any:
    """What ``model`` gives for ``batch`` in eager, under ``plan``. ``frozen``: where gradients are on, they are for the
    plan's tensors alone, not for the model's."""
    plan = plan or Plan()
    own = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)} if frozen else {}
    with left_out(model, plan.skip), replaced(model, plan.replace):
        return functional_call(model, {**own, **plan.weights}, (), dict(batch.inputs), tie_weights=False)


@contextmanager
def left_out(model: torch.nn.Module, skip: Iterable[str]) -> Iterator[None]:
    """Have the modules of these sites add nothing.

    Raises:
        PlanError: for a site that no module stands for.
    """
    with hooked((module_of(model, name), _nothing) for name in skip):
        yield


@contextmanager
def replaced(model: torch.nn.Module, replace: Mapping[str, Replacement]) -> Iterator[None]:
    """Have the modules of these sites give what their replacements make.

    Raises:
        PlanError: for a site that no module stands for.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def instead(site: str, replacement: Replacement) -> Hook:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, replacement.made(*seen.pop(site)).to(first_of(output).dtype))

        return hook

    hooks = [(module_of(model, r.source.module), reading(r.source, site, seen)) for site, r in replace.items()]
    hooks += [(module_of(model, site), instead(site, r)) for site, r in replace.items()]
    with hooked(hooks):
        yield


def reading(source: Source, site: str, seen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Hook:
    """A hook for the module of ``source`` that keeps the stream before ``site``, and what its branch reads, in
    ``seen``."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        value = first_of(output)
        seen[site] = (args[0] if source.normed else value, value)

    return hook


# Of a module, what it was given, by position and then by keyword, and what it made; a result takes that one's place.
Hook = Callable[[torch.nn.Module, Any, Any], Any]


@contextmanager
def hooked(hooks: Iterable[tuple[torch.nn.Module, Hook]]) -> Iterator[None]:
    """Have these functions called behind these modules, while the block runs."""
    handles: list[Any] = []
    try:
        handles += [module.register_forward_hook(_seeing_all(hook), with_kwargs=True) for module, hook in hooks]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seeing_all(hook: Hook) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: hook(module, (*args, *kwargs.values()), output)


def first_of(output: Any) -> torch.Tensor:
    """What a module gives, or the first part of it."""
    value: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return value


def with_first(output: Any, value: torch.Tensor) -> Any:
    """What a module gives, with ``value`` for it or for the first part of it."""
    return value if isinstance(output, torch.Tensor) else type(output)((value, *output[1:]))


def module_of(model: torch.nn.Module, site: str) -> torch.nn.Module:
    """The module whose output is what a site adds.

    Raises:
        PlanError: if there is none.
    """
    try:
        return model.get_submodule(site)
    except AttributeError:
        raise PlanError(f"{site} is the output of no module of its own, so it cannot be left out in eager") from None


def _nothing(module: torch.nn.Module, args: Any, output: Any) -> Any:
    return with_first(output, torch.zeros_like(first_of(output)))


def in_half(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 matrix products where the machine has units for them: for statistics and training, not for judging."""
    known = torch.cpu.get_capabilities()
    fast = device.type != "cpu" or bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(model.parameters()).device


def result_of(output: Any) -> torch.Tensor:
    """The tensor that a model is for: logits ``[batch, tokens, vocabulary]``, or else its last hidden state."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, torch.Tensor):
        return output
    return result_of(next(v for v in (output.values() if isinstance(output, Mapping) else output) if v is not None))


def valid_rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``[batch, tokens, ...]`` as ``[valid tokens, ...]``, in fp32."""
    return own_rows(values, batch).float()


def own_rows(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The same in its own dtype."""
    rows = values.flatten(0, -2)
    mask = batch.mask_of(len(rows))
    return rows if mask is None else rows[mask]
