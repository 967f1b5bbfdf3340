"""Replacements of whole sites in closed form: what a site adds, as a linear map of what its branch reads.

With second moments of the inputs ``u`` and of inputs and outputs ``y``, the least-squares map is known for every rank
at once: ``y`` is projected on the directions in which the full map varies most (reduced-rank regression, Izenman
1975). "Most" is measured in the metric of the gradients, where there is one (see ``curvature.py``): what the loss does
not feel need not be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from skipc.calibration.batches import Batch, Hook, first_of, module_of, reading
from skipc.calibration.thinning import ridged, token_scale
from skipc.ir.plan import Action
from skipc.ir.replacement import Affine, LowRank, Replacement
from skipc.ir.site import Source


@dataclass
class Moments:
    """Sums over tokens of one site, each token with its weight ``w``: of what its branch reads (``u``), of the stream
    before it (``x``) and of its module's output (``y``).

    Attributes:
        inputs: fp32 ``[width + 1, width + 1]``, of ``w [u, 1] [u, 1]'``.
        crossed: fp32 ``[width + 1, width]``, of ``w [u, 1] y'``.
        outputs: fp32 ``[width, width]``, of ``w y y'``.
        channels: fp32 ``[5, width]``, of ``w`` times ``x``, ``x x``, ``x y``, ``y`` and 1.
    """

    inputs: torch.Tensor
    crossed: torch.Tensor
    outputs: torch.Tensor
    channels: torch.Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        """Of no token."""
        sizes = [(width + 1, width + 1), (width + 1, width), (width, width), (5, width)]
        return cls(*(torch.zeros(size, device=device) for size in sizes))

    def add(self, x: torch.Tensor, u: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> None:
        """Take in tokens: fp32 ``[tokens, width]`` each, and the roots of their weights, ``[tokens, 1]``."""
        x, y = x * scale, y * scale
        u = torch.cat([u * scale, scale], 1)
        self.inputs.addmm_(u.T, u)
        self.crossed.addmm_(u.T, y)
        self.outputs.addmm_(y.T, y)
        one = scale.expand_as(x)
        self.channels += torch.stack([(a * b).sum(0) for a, b in ((x, one), (x, x), (x, y), (y, one), (one, one))])


@dataclass(frozen=True)
class Fit:
    """All replacements of one site.

    Attributes:
        source: of the site.
        slope: float64 ``[width, width]``, the map of full rank from what the branch reads, less its mean.
        means: float64 ``[2, width]``, of what the branch reads and of what the module gives.
        directions: float64 ``[width, width]``, columns: those that a map of low rank keeps, the first ones first.
        duals: float64 ``[width, width]``, rows: what tells how much of each direction there is.
        channels: float64 ``[2, width]``: scale and shift of each channel.
        scale: of all channels alike.
        errors: squared errors relative to that of leaving the site out: of maps of rank 0 and up, and, by kind, of the
            others.
    """

    source: Source
    slope: torch.Tensor
    means: torch.Tensor
    directions: torch.Tensor
    duals: torch.Tensor
    channels: torch.Tensor
    scale: float
    errors: tuple[list[float], dict[str, float]]

    def error(self, action: Action) -> float:
        """Squared error of a replacement, relative to that of leaving the site out."""
        by_rank, others = self.errors
        return by_rank[action.size] if action.kind == "lowrank" else others[action.kind]

    def replacement(self, action: Action, dtype: torch.dtype = torch.float32) -> Replacement:
        """A replacement of a dtype."""
        if action.kind == "lowrank":
            up, down = self.directions[:, : action.size], self.duals[: action.size] @ self.slope
            sizes = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(1e-6, 1e6)
            up, down = up / sizes, down * sizes[:, None]  # alike, so that one rate suits both in training
            shift = self.means[1] - up @ (down @ self.means[0])
            return LowRank(self.source, *(t.to(dtype).contiguous() for t in (down, up, shift)))
        if action.kind == "affine":
            return Affine(self.source, *(t.to(dtype, copy=True) for t in self.channels))
        return Affine(self.source, torch.tensor([self.scale], dtype=dtype), torch.zeros(1, dtype=dtype))


def fit(source: Source, moments: Moments, metric: torch.Tensor | None = None, ridge: float = 1e-3) -> Fit:
    """Replacements of a site.

    Args:
        source: of the site.
        moments: of its inputs and outputs.
        metric: ``[width, width]``, symmetric: of an error ``e``, ``|metric @ e|`` counts.
        ridge: of the map, relative to the mean second moment.
    """
    inputs, crossed, outputs = (t.double() for t in (moments.inputs, moments.crossed, moments.outputs))
    width, count = outputs.shape[0], inputs[-1, -1].clamp(min=1e-300)
    metric = torch.eye(width, dtype=torch.float64) if metric is None else ridged(metric.double(), 1e-3)
    means = torch.stack([inputs[:-1, -1], crossed[-1]]) / count
    inputs = inputs[:-1, :-1] - count * torch.outer(means[0], means[0])
    crossed = crossed[:-1] - count * torch.outer(means[0], means[1])
    slope = torch.linalg.solve(ridged(inputs, ridge), crossed).T
    fitted, vectors = torch.linalg.eigh(metric @ slope @ inputs @ slope.T @ metric)
    fitted, vectors = fitted.flip(0), vectors.flip(1)
    total = (metric @ outputs @ metric).trace().clamp(min=1e-300)
    rest = (metric @ (outputs - count * torch.outer(means[1], means[1])) @ metric).trace()
    gains = 2 * (vectors.T @ metric @ crossed.T @ slope.T @ metric @ vectors).diagonal() - fitted
    by_rank = torch.cat([rest[None], rest - gains.cumsum(0)]) / total
    channels, scale, others = _by_channel(moments, (metric @ metric).diagonal())
    duals = vectors.T @ metric
    return Fit(
        source, slope, means, torch.linalg.solve(metric, vectors), duals, channels, scale, (by_rank.tolist(), others)
    )


def _by_channel(moments: Moments, weight: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, float]]:
    """Scale and shift of each channel, one scale for all, and their errors, as if those of channels were unrelated."""
    x, xx, xy, y, n = moments.channels.double()
    n, yy = n.clamp(min=1e-300), moments.outputs.double().diagonal()
    scales = (xy - x * y / n) / (xx - x * x / n).clamp(min=1e-300)
    scale = float((weight * xy).sum() / (weight * xx).sum().clamp(min=1e-300))
    total = (weight * yy).sum().clamp(min=1e-300)
    affine = (weight * (yy - y * y / n - scales * (xy - x * y / n))).sum() / total
    alike = (weight * (yy - 2 * scale * xy + scale**2 * xx)).sum() / total
    return torch.stack([scales, (y - scales * x) / n]), scale, {"affine": float(affine), "scale": float(alike)}


@dataclass
class SiteMoments:
    """Streamed :class:`Moments` of some sites, with tokens weighted as :class:`SecondMoments` does."""

    sites: Mapping[str, Source]
    found: dict[str, Moments] = field(default_factory=dict)

    def hooks(self, model: torch.nn.Module, batch: Batch) -> list[tuple[torch.nn.Module, Hook]]:
        """What sees inputs and outputs of the sites in a call on ``batch``."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(site: str, source: Source) -> Hook:
            def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
                x, u = (t.flatten(0, -2).float() for t in seen.pop(site))
                y = first_of(output).flatten(0, -2).float()
                if site not in self.found:
                    self.found[site] = Moments.empty(source.width, y.device)
                self.found[site].add(x, u, y, token_scale(y, batch))

            return hook

        hooks = [(module_of(model, s.module), reading(s, name, seen)) for name, s in self.sites.items()]
        return hooks + [(module_of(model, name), note(name, s)) for name, s in self.sites.items()]
