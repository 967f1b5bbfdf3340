"""Narrower MLPs: which neurons to keep, and what the layer behind them makes of those.

Neurons leave one by one. Taking neuron ``j`` out of a hidden layer with second moments ``H`` (over tokens) and
correcting the others' columns of the next layer ``W`` for it, as well as a linear map can, costs
``|W_j|^2 / (H^-1)_jj``; the cheapest leaves, and ``W`` and ``H^-1`` are corrected (Optimal Brain Surgeon, Hassibi and
Stork 1993; by whole structures, as in ZipLM, arXiv 2302.04089, section 3.1). The order is that of all widths at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skipc.calibration.batches import Batch, Hook, call_on, result_of
from skipc.ir.errors import PlanError, UnknownSiteError
from skipc.ir.plan import Plan
from skipc.ir.site import HiddenLayer, Site

log = logging.getLogger("skipc")

_STRETCH = 64  # neurons that leave before matrices shrink
_ALIKE = 0.02  # relative difference, of bf16, of results that are the same


class SecondMoments:
    """Sums of ``h h'`` over tokens, of the neurons of some hidden layers: streamed, in fp32 ``[width, width]`` each.

    A token counts for as much as the layer's output is small beside it: a few tokens with huge activations (the first
    of a text, in most language models) would otherwise be all that is fitted.
    """

    def __init__(self, layers: Mapping[str, HiddenLayer]):
        self.layers = dict(layers)
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = 0

    def hooks(self, model: torch.nn.Module, batch: Batch) -> list[tuple[torch.nn.Module, Hook]]:
        """What sees the neurons in a call on ``batch``."""
        self.tokens += int(batch.valid.sum()) if batch.valid is not None else batch.tokens
        return [(_reader(model, layer), self._hook(name, batch)) for name, layer in self.layers.items()]

    def _hook(self, name: str, batch: Batch) -> Hook:
        def note(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            h = args[0].flatten(0, -2).float()
            h = h * token_scale(output.flatten(0, -2).float(), batch)
            if name not in self.sums:
                self.sums[name] = h.new_zeros(h.shape[-1], h.shape[-1])
            self.sums[name].addmm_(h.T, h)

        return note


def token_scale(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What each token of an output ``[tokens, width]`` is multiplied by, ``[tokens, 1]``: 1 over its size (or over a
    tenth of the usual size, if it is smaller), 0 for padding."""
    squares = output.pow(2).mean(-1, keepdim=True)
    scale = squares.clamp(min=max(1e-12, 0.01 * float(squares.median()))).rsqrt()
    mask = batch.mask_of(len(output))
    return scale if mask is None else scale * mask[:, None]


def _reader(model: torch.nn.Module, layer: HiddenLayer) -> torch.nn.Module:
    """The module that reads the neurons.

    Raises:
        PlanError: if that is done by no module of its own, whose input could be seen.
    """
    path = layer.columns.rpartition(".")[0]
    module = model.get_submodule(path)
    if not isinstance(module, torch.nn.Linear):
        raise PlanError(f"{layer.columns} cannot be fitted: {path or 'the model'} is no torch.nn.Linear")
    return module


@dataclass(frozen=True)
class Elimination:
    """Neurons in the order in which they leave.

    Attributes:
        order: int64 ``[width]``, the first to leave first.
        costs: float64 ``[width]``: the squared error that each adds, relative to the layer's whole output.
        total: the square of that output.
    """

    order: torch.Tensor
    costs: torch.Tensor
    total: float

    def kept(self, width: int) -> torch.Tensor:
        """The neurons of a layer of ``width``, in their old order."""
        return self.order[len(self.order) - width :].sort().values

    def error(self, width: int) -> float:
        """Squared error of a layer of ``width``, relative to the layer's whole output."""
        return float(self.costs[: len(self.costs) - width].sum())


def eliminate(
    moments: torch.Tensor, columns: torch.Tensor, ridge: float = 1e-3, least: int = 0, size: int = 1
) -> Elimination:
    """The order in which neurons, or groups of ``size`` of them, leave.

    Args:
        moments: ``[width, width]``, see :class:`SecondMoments`.
        columns: the next layer's weight, ``[out, width]``.
        ridge: added to the diagonal, relative to its mean.
        least: the last so many are left in no order.
    """
    moments = moments.double()
    weight = columns.double().T.clone()
    total = float((weight * (moments @ weight)).sum())
    if size > 1:
        return _eliminate_groups(ridged(moments, ridge), weight, total, size)
    inverse = torch.linalg.inv(ridged(moments, ridge))
    names = torch.arange(len(moments))
    gone = torch.zeros(len(moments), dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    while len(order) < len(moments) - least:
        cost = weight.pow(2).sum(1) / inverse.diagonal().clamp(min=1e-300)
        cost[gone] = torch.inf
        j = int(cost.argmin())
        order.append(int(names[j]))
        costs.append(float(cost[j]))
        step = inverse[:, j] / inverse[j, j]
        weight.addr_(step, weight[j].clone(), alpha=-1)
        inverse.addr_(step, inverse[j].clone(), alpha=-1)
        gone[j] = True
        if int(gone.sum()) >= _STRETCH:
            left = ~gone
            inverse, weight, names = inverse[left][:, left].contiguous(), weight[left], names[left]
            gone = torch.zeros(len(names), dtype=torch.bool)
    rest = names[~gone].tolist()
    return Elimination(
        torch.tensor(order + rest),
        torch.tensor(costs + [torch.inf] * len(rest), dtype=torch.float64) / max(total, 1e-300),
        total,
    )


def _eliminate_groups(moments: torch.Tensor, weight: torch.Tensor, total: float, size: int) -> Elimination:
    """The same for groups, few enough to compute anew what is left: of ``|W_G|^2`` in the metric of ``((H^-1)_GG)^-1``.
    The last one goes for what the layer still makes."""
    left, order, costs = list(range(len(moments) // size)), [], []
    while left:
        at = torch.cat([torch.arange(g * size, (g + 1) * size) for g in left])
        own = moments[at][:, at]
        inverse = torch.linalg.inv(own)
        parts = [slice(i * size, (i + 1) * size) for i in range(len(left))]
        prices = [float((weight[p] * torch.linalg.solve(inverse[p, p], weight[p])).sum()) for p in parts]
        i = min(range(len(left)), key=prices.__getitem__)
        order.append(left.pop(i))
        costs.append(prices[i])
        weight = weight - inverse[:, parts[i]] @ torch.linalg.solve(inverse[parts[i], parts[i]], weight[parts[i]])
        weight = torch.cat([weight[p] for j, p in enumerate(parts) if j != i]) if left else weight[:0]
    return Elimination(torch.tensor(order), torch.tensor(costs, dtype=torch.float64) / max(total, 1e-300), total)


def refit(moments: torch.Tensor, columns: torch.Tensor, kept: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The next layer's weight for the kept neurons alone, ``[out, kept]``, nearest to what all of them give; ``ridge``
    is on how far it is from what it was, so that directions that the moments know little of stay as they are."""
    moments, weight = moments.double(), columns.double().T
    gone = torch.ones(len(moments), dtype=torch.bool)
    gone[kept] = False
    change = torch.linalg.solve(ridged(moments[kept][:, kept], ridge), moments[kept][:, gone] @ weight[gone])
    return (weight[kept] + change).T.to(columns.dtype).contiguous()


def ridged(moments: torch.Tensor, ridge: float) -> torch.Tensor:
    """``moments`` with ``ridge`` times their mean on the diagonal."""
    return moments + torch.eye(len(moments), dtype=moments.dtype) * (ridge * float(moments.diagonal().mean()) + 1e-30)


def thin_weights(
    model: torch.nn.Module,
    layer: HiddenLayer,
    kept: torch.Tensor,
    columns: torch.Tensor | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The parameters of a sublayer with the ``kept`` neurons, or groups of heads, of those it has in ``weights`` (else
    in the model), and ``columns`` for the layer behind them; None: its own for those."""
    whole = parameter(model, layer.columns, weights)
    width = whole.shape[1] // layer.size
    made = {layer.columns: whole[:, layer.channels(kept)] if columns is None else columns}
    for name, times in layer.rows:
        value = parameter(model, name, weights)
        made[name] = torch.cat([part.unflatten(0, (width, -1))[kept].flatten(0, 1) for part in value.chunk(times)])
    return made


def parameter(model: torch.nn.Module, name: str, weights: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The parameter of this name, in ``weights`` or else in the model."""
    return weights[name] if weights is not None and name in weights else model.get_parameter(name).detach()


@torch.no_grad()
def drops_groups(model: torch.nn.Module, batch: Batch, layers: Mapping[str, HiddenLayer]) -> bool:
    """Whether attentions without their first group of heads give, in eager, what they do when the layer behind them
    makes nothing of that group: heads lie in all their weights as :class:`HiddenLayer` says."""
    thin: dict[str, torch.Tensor] = {}
    deaf: dict[str, torch.Tensor] = {}
    for layer in layers.values():
        thin |= thin_weights(model, layer, torch.arange(1, layer.width))
        deaf[layer.columns] = model.get_parameter(layer.columns).detach().clone()
        deaf[layer.columns][:, : layer.size] = 0
    try:
        found = result_of(call_on(model, batch, Plan(weights=thin)))
    except Exception as error:  # whatever the model's own code says to weights of other shapes
        log.info("attention keeps all its heads: %s", error)
        return False
    truth = result_of(call_on(model, batch, Plan(weights=deaf)))
    return float((found - truth).float().norm()) < _ALIKE * float(truth.float().norm())


def hidden_layers(sites: Iterable[Site], names: Iterable[str]) -> dict[str, HiddenLayer]:
    """The hidden layers of the sites of these names, in order of execution.

    Raises:
        UnknownSiteError: for a name that no site has.
        PlanError: for a site whose neurons cannot be left out one by one.
    """
    known = {site.name: site.hidden for site in sites}
    wanted = frozenset(names)
    for name in sorted(wanted):
        if name not in known:
            raise UnknownSiteError(name, list(known))
        if known[name] is None:
            raise PlanError(
                f"{name} cannot be made thinner: it is made of more than plain linear layers with their own weights"
            )
    return {name: layer for name, layer in known.items() if name in wanted and layer is not None}
