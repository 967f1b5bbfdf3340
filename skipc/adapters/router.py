"""A router that chooses adapters for each token, once for all layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from skipc.ir.errors import AdapterError
from skipc.kernels.routing import HEADER

_CONFIG, _TENSORS = "adapter_router.json", "adapter_router.safetensors"
_FORMAT = 1


class AdapterRouter:
    """What adapters a token wants, decided from the residual stream before the first site, for all layers at once
    (AdaFuse, arXiv 2603.11873: "decide once, apply everywhere"). Give it to a session in place of names:
    ``compiled.session(adapters=router)``.

    A token wants the experts of its ``top_k`` largest logits ``weight @ token + bias``, each as much as its softmax
    says.

    Args:
        weight: ``[experts, width]``, floating; ``width`` is that of the stream.
        experts: for each the name of an adapter of the bank, or None for no adapter.
        top_k: how many experts a token gets.
        bias: ``[experts]``, or None.
        renormalize: whether the amounts of a token's experts add up to one, or are shares of a softmax over all.

    Raises:
        AdapterError: for sizes that do not go together, and for one name twice.

    A router that a model has in each of its layers is another model: it is compiled as it stands, and never made into
    one of these. Whoever trained with one router for all takes it from there: ``AdapterRouter(layer.router.weight,
    ["a", "b"])``.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        experts: Sequence[str | None],
        top_k: int = 2,
        bias: torch.Tensor | None = None,
        renormalize: bool = True,
    ):
        self.weight, self.experts = weight.detach().float().cpu().contiguous(), tuple(experts)
        self.bias = torch.zeros(len(self.experts)) if bias is None else bias.detach().float().cpu()
        self.top_k, self.renormalize = top_k, renormalize
        if self.weight.dim() != 2 or len(self.weight) != len(self.experts) or not self.experts:
            raise AdapterError(f"a router of weights {list(weight.shape)} is not one of {len(self.experts)} experts")
        if self.bias.shape != self.weight.shape[:1]:
            raise AdapterError(f"a router of {len(self.experts)} experts has biases {list(self.bias.shape)}")
        if not 1 <= top_k <= len(self.experts):
            raise AdapterError(f"a token gets 1 to {len(self.experts)} of {len(self.experts)} experts, not {top_k}")
        if len(set(self.experts)) < len(self.experts):
            twice = next(e for e in self.experts if self.experts.count(e) > 1)
            raise AdapterError(f"a router has {twice!r} for more than one expert")
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise AdapterError("a router has weights that are not finite")

    @property
    def width(self) -> int:
        """Of tokens."""
        return self.weight.shape[1]

    def __repr__(self) -> str:
        return f"AdapterRouter({self.top_k} of {', '.join(map(str, self.experts))}, width {self.width})"

    def packed(self, slots: Mapping[str, int | None]) -> torch.Tensor:
        """As kernels read it (see :mod:`skipc.kernels.routing`), with the slots of adapters; the others want none."""
        head = torch.tensor([len(self.experts), self.width, self.top_k, float(self.renormalize)])
        assert len(head) == HEADER
        places = [-1 if name is None or (slot := slots.get(name)) is None else slot for name in self.experts]
        return torch.cat([head, torch.tensor(places, dtype=torch.float32), self.bias, self.weight.flatten()])

    def save(self, folder: str | Path) -> None:
        """Write ``adapter_router.json`` and ``adapter_router.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": _FORMAT, "experts": self.experts, "top_k": self.top_k, "renormalize": self.renormalize,
        }  # fmt: skip
        (folder / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        save_file({"weight": self.weight, "bias": self.bias}, folder / _TENSORS)

    @classmethod
    def load(cls, folder: str | Path) -> AdapterRouter:
        """What :meth:`save` wrote.

        Raises:
            AdapterError: if it is missing, damaged, or of a later version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            settings = json.loads((folder / _CONFIG).read_text())
            if settings["format"] != _FORMAT:
                raise AdapterError(f"{folder} holds a router of format {settings['format']}, and {_FORMAT} is known")
            tensors = load_file(folder / _TENSORS)
            given = tensors["weight"], settings["experts"], settings["top_k"], tensors["bias"], settings["renormalize"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterError(f"{folder} holds no router: {type(error).__name__}: {error}") from error
        return cls(*given)
