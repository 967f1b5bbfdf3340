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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from skipc.calibration.batches import Batch, call_on, device_of, in_half, module_of, result_of, valid_rows
from skipc.ir.site import HiddenLayer

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
        norms = g.pow(2).sum(-1)
        norms = norms.clamp(max=float(norms.mean()) * _MOST)
        scaled = h * norms.sqrt()[:, None]
        self.inputs.addmm_(scaled.T, scaled)
        self.outputs.addmm_(g.T, g)
        self.tokens += len(h)

    def metric(self) -> torch.Tensor:
        """float64 ``[out, out]``, a symmetric root: what a change ``D`` of the layer costs, in nats per token, is
        ``tr(E inputs E')`` with ``E = metric @ D``."""
        values, vectors = torch.linalg.eigh(self.outputs.double())
        root = (values.clamp(min=0) / values.sum().clamp(min=1e-300)).sqrt()
        return (vectors * root) @ vectors.T * (0.5 / max(self.tokens, 1)) ** 0.5


@dataclass
class Curvatures:
    """Streamed statistics of backward passes.

    Attributes:
        layers: the linear layers behind the neurons of MLPs, by site.
        sites: names of sites to leave out.
        found: curvature of the layers.
        losses: sums over tokens of half of ``(g . f)^2``: to second order, what leaving out a site costs.
        tokens: how many there were.
    """

    layers: Mapping[str, HiddenLayer]
    sites: Sequence[str]
    found: dict[str, Curvature] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, model: torch.nn.Module, batch: Batch, generator: torch.Generator) -> None:
        """Run ``model`` forward and backward on one batch."""
        own = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        seen: list[tuple[str, torch.Tensor | None, torch.Tensor]] = []
        with torch.enable_grad(), self._watched(model, seen), in_half(device_of(model)):
            output = call_on(model, batch, own)
            score = log_likelihood(output, batch, generator)
            gradients = torch.autograd.grad(score, [s[2] for s in seen], allow_unused=True)
        for (name, h, output), gradient in zip(seen, gradients, strict=True):
            if gradient is None:
                continue
            g = valid_rows(gradient, batch)
            if h is None:
                lost = (g * valid_rows(output.detach(), batch)).sum(-1).double().pow(2).sum() / 2
                self.losses[name] = self.losses.get(name, 0.0) + float(lost)
            else:
                if name not in self.found:
                    inside, outside = (torch.zeros(n, n, device=g.device) for n in (h.shape[-1], g.shape[-1]))
                    self.found[name] = Curvature(inside, outside)
                self.found[name].add(valid_rows(h, batch), g)
        self.tokens += batch.tokens if batch.valid is None else int(batch.valid.sum())

    @contextmanager
    def _watched(
        self, model: torch.nn.Module, seen: list[tuple[str, torch.Tensor | None, torch.Tensor]]
    ) -> Iterator[None]:
        def note(name: str, with_input: bool) -> Any:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                value = output if isinstance(output, torch.Tensor) else output[0]
                if not value.requires_grad:  # no weight does: gradients begin at the first output that is watched
                    value.requires_grad_()
                seen.append((name, args[0].detach() if with_input else None, value))

            return hook

        handles = [
            model.get_submodule(layer.columns.rpartition(".")[0]).register_forward_hook(note(name, True))
            for name, layer in self.layers.items()
        ]
        handles += [module_of(model, name).register_forward_hook(note(name, False)) for name in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


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
