"""``skipc.find_sites`` and ``skipc.explain``: what skipc sees in a model, and what it would make of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from skipc.backend import build_outline, config_from, graph_break_of, refusal
from skipc.dynamo import compile_isolated
from skipc.ir.config import Config
from skipc.ir.errors import AdapterError, NoResidualStreamError
from skipc.ir.program import ProgramSpec
from skipc.ir.site import Rejection, Site, SiteReport
from skipc.passes.base import PassContext
from skipc.passes.manager import PassManager, PassRecord
from skipc.runtime.codegen import source_of


@dataclass(frozen=True)
class GraphExplanation:
    """One captured graph: passes, sites, regions and host program, or the reason for plain Inductor."""

    fallback: str | None
    graph_break: str | None
    passes: tuple[PassRecord, ...]
    rejected: tuple[Rejection, ...]
    spec: ProgramSpec | None
    source: str


@dataclass(frozen=True)
class Explanation:
    """What :func:`skipc.explain` found out. ``print`` it, or take :meth:`to_dict`."""

    graphs: tuple[GraphExplanation, ...]
    config: Config

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in order of execution."""
        return tuple(s for g in self.graphs if g.spec is not None for s in g.spec.sites)

    @property
    def report(self) -> SiteReport:
        """Sites and rejections alone."""
        rejected = tuple(r for g in self.graphs for r in g.rejected)
        return SiteReport(self.sites, rejected, tuple(g.graph_break for g in self.graphs if g.graph_break))

    def program(self, graph: int = 0) -> str:
        """Source of the host program of one graph."""
        return self.graphs[graph].source

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "config": self.config.model_dump(mode="json"),
            "graphs": [
                {
                    "fallback": g.fallback,
                    "graph_break": g.graph_break,
                    "passes": [asdict(p) for p in g.passes],
                    "rejected": [{"name": r.name, "reason": r.reason.value} for r in g.rejected],
                    "sites": [asdict(s) for s in g.spec.sites] if g.spec else [],
                    "regions": [asdict(r) for r in g.spec.regions] if g.spec else [],
                    "adapters": (
                        {"layers": g.spec.adapted, "left": dict(g.spec.left), "routed": sorted(g.spec.routed)}
                        if g.spec is not None and g.spec.adapted
                        else None
                    ),
                    "program": g.source,
                }
                for g in self.graphs
            ],
        }

    def __str__(self) -> str:
        parts = []
        for i, g in enumerate(self.graphs):
            parts.append(f"graph {i}" + (f" (ends at a graph break: {g.graph_break})" if g.graph_break else ""))
            if g.spec is None:
                parts.append(f"  plain Inductor: {g.fallback}")
                continue
            parts.append("  passes: " + ", ".join(f"{p.name} {p.matched} ({p.milliseconds:.0f} ms)" for p in g.passes))
            parts += [f"    {p.name}: {note}" for p in g.passes if p.name != "find_sites" for note in p.notes]
            parts.append(
                f"  lowering: {self.config.lowering}, " + _LOWERINGS.get(self.config.lowering, _regions(g.spec))
            )
            if self.config.lowering == "outline":
                parts += [f"  gates {how}: {', '.join(names)}" for how, names in _gates(g.spec).items()]
            if g.spec.adapted:
                parts += _adapters(g.spec, self.config)
            report = str(SiteReport(g.spec.sites, g.rejected))
            parts += [f"  {line}" for line in report.splitlines()]
        return "\n".join(parts)


_LOWERINGS = {
    "cond": "one Inductor graph with a torch.cond at each site; no native kernels",
    "static": "one Inductor graph without the sites of the plan; no native kernels",
}


def _adapters(spec: ProgramSpec, config: Config) -> list[str]:
    bank = config.adapters
    assert bank is not None
    lines = [f"  adapters: {bank!r}, {len(spec.adapted)} of its layers here, {len(spec.routed)} for routers"]
    lines += [f"    none for {path}: {why}" for path, why in spec.left.items()]
    if bank.resident:
        with contextlib.suppress(AdapterError):  # open sessions have all slots
            lines.append(f"    {bank.resident[-1]} for all rows, mode 'auto': {bank.explain(bank.resident[-1])}")
    return lines


def _regions(spec: ProgramSpec) -> str:
    names = [f"{r.name} x{r.calls} ({r.nodes} ops{'' if r.compiled else ', not compiled'})" for r in spec.regions]
    return f"{len(names)} distinct regions: {', '.join(names)}"


def _gates(spec: ProgramSpec) -> dict[str, list[str]]:
    """Sites by where their gates are asked in the outline lowering, and why there."""
    found: dict[str, list[str]] = {}
    for step in spec.steps:
        region = step.arms[0].region
        if not step.sites or region is None:
            continue
        if not spec.regions[region].kernels:
            how = "in host code (Inductor compiles the region, which is no sublayer kernel)"
        elif len(step.sites) > 1 or step.stream is None:
            how = "in host code (a sublayer kernel, but the sites share their sum)"
        else:
            how = "inside native chains (the region is a sublayer kernel)"
        found.setdefault(how, []).extend(step.sites)
    return found


def explain(model: torch.nn.Module, *args: Any, config: Config | None = None, **kwargs: Any) -> Explanation:
    """Trace a call of ``model`` and tell what skipc would do with it. Compiles nothing; runs the model once in eager,
    on copies of nothing: caches given as arguments are written as by any call.

    Args:
        model: the module to trace, in evaluation mode.
        *args, **kwargs: inputs of one call.
        config: options to explain under.
    """
    config = config or config_from(None)
    graphs: list[GraphExplanation] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(_explain_graph(gm, config))
        return gm.forward

    traced = compile_isolated(model, backend=capture)
    with torch.no_grad():
        traced(*args, **kwargs)
    return Explanation(tuple(graphs), config)


def find_sites(model: torch.nn.Module, *args: Any, **kwargs: Any) -> SiteReport:
    """The sites of ``model`` in a call with these inputs. Traces only; see :func:`explain`.

    Raises:
        NoResidualStreamError: if there is none.
    """
    explanation = explain(model, *args, **kwargs)
    report = explanation.report
    if not report.sites:
        fallbacks = [g.fallback for g in explanation.graphs if g.fallback]
        why = "; ".join(map(str, fallbacks or report.rejected)) or "the trace has no graph"
        raise NoResidualStreamError(f"no site was found: {why}")
    return report


def _explain_graph(gm: fx.GraphModule, config: Config) -> GraphExplanation:
    graph_break = graph_break_of(gm)
    reason: str | None = refusal(gm)
    if config.preset == "off":
        reason = "preset 'off'"
    if reason is not None:
        return GraphExplanation(str(reason), graph_break, (), (), None, "")
    try:
        outline, manager = build_outline(gm, config)
    except NoResidualStreamError as error:
        logging.getLogger("skipc").debug("no stream", exc_info=True)
        manager = PassManager(PassContext(config))
        manager.run(gm)
        assert manager.ctx.streams is not None
        rejected = tuple(manager.ctx.streams.rejected)
        return GraphExplanation(str(error), graph_break, tuple(manager.records), rejected, None, "")
    spec = replace(outline.spec, regions=tuple(r.info() for r in outline.regions))
    assert manager.ctx.streams is not None
    rejected = tuple(manager.ctx.streams.rejected)
    return GraphExplanation(None, graph_break, tuple(manager.records), rejected, spec, source_of(spec))
