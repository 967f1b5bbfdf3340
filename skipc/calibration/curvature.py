"""What changes of a sublayer's output cost, by one backward pass: gradients of the model's own uncertainty.

The Kullback-Leibler divergence of a slightly changed model from the model is, to second order, half the mean of
``(g . d)^2``, with ``d`` the change of an output and ``g`` the gradient of the log likelihood of a token that is drawn
from the model itself (the Fisher information; Martens 2020, arXiv 1412.1193, section 5). Drawn tokens are independent,
so one backward pass gives the gradients for all tokens of a text. Encoders have no likelihood: their last hidden state
takes its place, with a random direction for each token (the Gauss-Newton matrix of the relative squared distance).

For a linear layer's change ``D`` on inputs ``h`` this is ``tr(G D H D')`` with ``G`` the mean of ``g g'`` and ``H``
that of ``h h'`` weighted by ``|g|^2`` (Kronecker-factored, as in K-FAC, arXiv 1503.05671): two matrices instead of a
pair of vectors for each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from skipc.calibration.batches import (
    Batch,
    Hook,
    call_on,
    device_of,
    first_of,
    hooked,
    in_half,
    module_of,
    reading,
    result_of,
    valid_rows,
)
from skipc.calibration.replacing import Moments
from skipc.ir.site import HiddenLayer, Source

_MOST = 100.0  # times the mean: a few tokens have squared gradients so large that nothing else would be seen


@dataclass
class Curvature:
    """Sums over tokens, for one linear layer.

    Attributes:
        inputs: fp32 ``[in, in]``, of ``|g|^2 h h'``.
        outputs: fp32 ``[out, out]``, of ``g g'``.
        tokens: how many there were.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    tokens: int = 0

    def add(self, h: torch.Tensor, g: torch.Tensor) -> None:
        """Take in tokens: ``h`` fp32 ``[tokens, in]``, ``g`` fp32 ``[tokens, out]``."""
        scaled = h * _clamped(g).sqrt()[:, None]
        self.inputs.addmm_(scaled.T, scaled)
        self.outputs.addmm_(g.T, g)
        self.tokens += len(h)

    def metric(self, tokens: int | None = None) -> torch.Tensor:
        """float64 ``[out, out]``, a symmetric root: what a change ``D`` of the layer costs, in nats per token (of
        ``tokens``, if the model predicts another number of them than the layer sees), is ``tr(E inputs E')`` with
        ``E = metric @ D``."""
        return metric_of(self.outputs) * (0.5 / max(tokens or self.tokens, 1)) ** 0.5


def metric_of(gradients: torch.Tensor) -> torch.Tensor:
    """The symmetric root, float64, of second moments of gradients, whose trace is made 1."""
    values, vectors = torch.linalg.eigh(gradients.double())
    root = (values.clamp(min=0) / values.sum().clamp(min=1e-300)).sqrt()
    return (vectors * root) @ vectors.T


@dataclass
class SiteCurvature:
    """Sums over tokens, for one site: of its inputs and outputs weighted by ``|g|^2``, and of ``g g'``, with ``g`` the
    gradients of its module's output."""

    moments: Moments
    outputs: torch.Tensor

    def add(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> None:
        """Take in tokens: the stream, what the branch reads, what the module gives, fp32 ``[tokens, width]`` each."""
        self.moments.add(x, u, y, _clamped(g)[:, None].sqrt())
        self.outputs.addmm_(g.T, g)


def _clamped(g: torch.Tensor) -> torch.Tensor:
    norms = g.pow(2).sum(-1)
    return norms.clamp(max=float(norms.mean()) * _MOST)


@dataclass
class Curvatures:
    """Streamed statistics of backward passes.

    Attributes:
        layers: the linear layers behind the neurons of MLPs, by site.
        sites: names of sites to leave out.
        sources: of sites to replace.
        found: curvature of the layers.
        replaced: that of the sites to replace.
        losses: sums over tokens of half of ``(g . f)^2``: to second order, what leaving out a site costs.
        tokens: how many the model was scored on.
    """

    layers: Mapping[str, HiddenLayer]
    sites: Sequence[str]
    sources: Mapping[str, Source] = field(default_factory=dict)
    found: dict[str, Curvature] = field(default_factory=dict)
    replaced: dict[str, SiteCurvature] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, model: torch.nn.Module, batch: Batch, generator: torch.Generator) -> None:
        """Run ``model`` forward and backward on one batch."""
        seen: list[_Seen] = []
        with torch.enable_grad(), hooked(self._hooks(model, seen)), in_half(device_of(model)):
            output = call_on(model, batch, frozen=True)
            score = log_likelihood(output, batch, generator)
            gradients = torch.autograd.grad(score, [s.output for s in seen], allow_unused=True)
        for one, gradient in zip(seen, gradients, strict=True):
            if gradient is None:
                continue
            g = valid_rows(gradient, batch)
            if one.neurons is not None:
                if one.name not in self.found:
                    inside, outside = (torch.zeros(n, n, device=g.device) for n in (one.neurons.shape[-1], g.shape[-1]))
                    self.found[one.name] = Curvature(inside, outside)
                self.found[one.name].add(valid_rows(one.neurons, batch), g)
                continue
            y = valid_rows(one.output.detach(), batch)
            if one.name in self.sites:
                lost = (g * y).sum(-1).double().pow(2).sum() / 2
                self.losses[one.name] = self.losses.get(one.name, 0.0) + float(lost)
            if one.read is not None:
                if one.name not in self.replaced:
                    width = y.shape[-1]
                    empty = torch.zeros(width, width, device=g.device)
                    self.replaced[one.name] = SiteCurvature(Moments.empty(width, g.device), empty)
                x, u = (valid_rows(t.detach(), batch) for t in one.read)
                self.replaced[one.name].add(x, u, y, g)
        self.tokens += len(valid_rows(result_of(output), batch))

    def _hooks(self, model: torch.nn.Module, seen: list[_Seen]) -> list[tuple[torch.nn.Module, Hook]]:
        read: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(name: str, neurons: bool) -> Hook:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                value = first_of(output)
                if not value.requires_grad:  # no weight does: gradients begin at the first output that is watched
                    value.requires_grad_()
                inside = args[0].detach() if neurons else None
                seen.append(_Seen(name, value, inside, None if neurons else read.pop(name, None)))

            return hook

        hooks = [(module_of(model, s.module), reading(s, name, read)) for name, s in self.sources.items()]
        hooks += [
            (model.get_submodule(layer.columns.rpartition(".")[0]), note(name, True))
            for name, layer in self.layers.items()
        ]
        return hooks + [(module_of(model, n), note(n, False)) for n in dict.fromkeys((*self.sites, *self.sources))]


@dataclass
class _Seen:
    name: str
    output: torch.Tensor
    neurons: torch.Tensor | None
    read: tuple[torch.Tensor, torch.Tensor] | None


def log_likelihood(output: Any, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """The sum over tokens of the log likelihood of a token drawn from the model; for encoders, of the last hidden state
    along random directions, relative to its size."""
    found = valid_rows(result_of(output), batch)
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        logs = found.log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return logs.gather(1, drawn).sum()
    signs = torch.randint(0, 2, found.shape, generator=generator).to(found.device) * 2 - 1
    return (found * signs / found.detach().norm(dim=-1, keepdim=True)).sum() * 2**0.5
