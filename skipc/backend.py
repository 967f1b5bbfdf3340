"""The ``torch.compile`` backend: what Dynamo calls with each graph that it captured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from skipc.ir.config import BUDGETS, Config
from skipc.ir.errors import (
    AdapterError,
    ConfigError,
    NoResidualStreamError,
    PlanError,
    ProfileError,
    SkipcError,
    UnknownSiteError,
)
from skipc.ir.plan import Plan
from skipc.ir.replacement import Replaced
from skipc.passes.attach_adapters import Attached, attach_adapters
from skipc.passes.base import Pass, PassContext
from skipc.passes.fx_edit import constants_of, copy_graph
from skipc.passes.lowering.inductor import check_torch_version, compile_whole, late_guards
from skipc.passes.lowering.outline import Outline
from skipc.passes.lowering.whole import lower_cond, lower_static
from skipc.passes.manager import PassManager
from skipc.passes.ops import is_parameter_like, is_random, op_name, switches_autocast_off, tensors
from skipc.passes.pipeline import REGION_PIPELINE
from skipc.passes.replace_sites import replace_sites
from skipc.passes.substitute_weights import substitute_weights, weight_name
from skipc.runtime import registry
from skipc.runtime.graph_program import CondProgram, StaticProgram
from skipc.runtime.program import Fallback, Program
from skipc.runtime.variants import SizeGuards

log = logging.getLogger("skipc")

_NONE_REPLACED = Replaced()


class FallbackReason(StrEnum):
    """Why a graph is compiled by plain Inductor instead."""

    GRAD = "gradients are enabled: call the model under torch.no_grad() or torch.inference_mode()"
    TRAINING = "the graph draws random numbers (dropout): call model.eval() first"
    NO_STREAM = "no residual stream was found in the graph"
    SUBCLASS = "the graph works on tensor subclasses (quantised or distributed weights)"
    AUTOCAST = "the graph switches autocast on, off or between precisions"
    MODES = "the graph switches gradients or inference mode on or off"
    FROZEN = "Inductor's freezing made the weights constants of the graph"
    FAILED = "skipc failed"


def skipc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: ``torch.compile(model, backend="skipc", options={...})``, found by entry point.

    Args:
        gm: a graph from Dynamo; left as it is.
        example_inputs: the real inputs of the call that is being compiled.
        mode: an Inductor mode, from a lone ``torch.compile(mode=...)``.
        options: fields of :class:`skipc.Config`.

    Raises:
        ConfigError: for an unknown option or value.
    """
    check_torch_version()
    config = config_from(options, mode)
    return compile_graph(gm, example_inputs, config)


def config_from(options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
    """A config from what ``torch.compile`` passes on."""
    given = dict(options or {})
    if mode is not None:
        given["mode"] = mode
    return Config(**given)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    """A program for ``gm``, or plain Inductor with a logged reason."""
    parameters = [i for i, n in enumerate(_placeholders(gm)) if is_parameter_like(n)]
    identities = [id(example_inputs[i]) for i in parameters]
    registry.note_compilation(identities)
    if config.preset == "off":
        return compile_whole(gm, example_inputs, config)
    reason: str | None = refusal(gm)
    if reason is None:
        try:
            program = build_program(gm, config)
            program.plan = preset_plan(program, gm, example_inputs, config)
            registry.register(program, identities)
            return program
        except NoResidualStreamError:
            if config.on_error == "raise":
                raise
            reason = FallbackReason.NO_STREAM
        except (AdapterError, ConfigError, PlanError, ProfileError, UnknownSiteError):
            raise
        except Exception as error:
            if config.on_error == "raise":
                raise
            reason = f"{FallbackReason.FAILED} ({type(error).__name__}: {error})"
            log.debug("skipc failed", exc_info=True)
    elif config.on_error == "raise" and reason is not FallbackReason.GRAD:
        raise SkipcError(reason)
    log.warning("running plain Inductor: %s", reason)
    return Fallback(compile_whole(copy_graph(gm), example_inputs, config), reason, parameters)


def preset_plan(program: Program, gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Plan | None:
    """What a preset has calls run under.

    Raises:
        ProfileError: if the profile cannot be read, or is for another checkpoint.
    """
    if config.preset not in BUDGETS:
        return None
    if program.partial:
        log.warning("preset %r does nothing: the model has a graph break (%s)", config.preset, program.partial)
        return None
    from skipc.calibration.profile import plan_for

    named = {}
    for node, value in zip(_placeholders(gm), example_inputs, strict=True):
        if (name := weight_name(node)) is not None:
            named[name] = value
    assert config.profile is not None
    return plan_for(config.profile, BUDGETS[config.preset], named)


def build_program(gm: fx.GraphModule, config: Config, replaced: Replaced = _NONE_REPLACED) -> Program:
    """Run the passes over ``gm``, and lower and compile the result, with some sites replaced."""
    partial = graph_break_of(gm)
    if config.lowering == "outline":
        outline, _ = build_outline(gm, config, replaced=replaced)
        functions = outline.compile(config)
        kept = copy_graph(gm)  # Dynamo strips its own

        def compile_for(shapes: Mapping[str, tuple[int, ...]], replaced: Replaced) -> tuple[Program, SizeGuards]:
            with late_guards(kept) as guards:
                program = build_program(substitute_weights(kept, shapes), config, replaced)
            values = [n.meta.get("example_value") for n in _placeholders(kept)]
            symbols = {v.node.expr: i for i, v in enumerate(values) if isinstance(v, torch.SymInt)}
            return program, SizeGuards(tuple(guards), symbols)

        return Program(
            outline.spec,
            functions,
            config.kv,
            partial,
            config.huge_pages,
            compile_for,
            config.adapters,
            outline.constants,
            config.graphs,
        )
    # What stays with Inductor as a whole keeps to torch's own operations: no kernels for regions.
    outline, manager = build_outline(gm, config, region_passes=())
    assert manager.ctx.streams is not None
    if config.lowering == "static":
        function = lower_static(outline.gm, manager.ctx.streams, config)
        return StaticProgram(outline.spec, function, config.kv, partial, frozenset(config.plan))
    function, gated = lower_cond(outline.gm, manager.ctx.streams, config)
    return CondProgram(outline.spec, function, config.kv, partial, gated.layers, gated.measured)


def build_outline(
    gm: fx.GraphModule,
    config: Config,
    region_passes: tuple[type[Pass], ...] = REGION_PIPELINE,
    replaced: Replaced = _NONE_REPLACED,
) -> tuple[Outline, PassManager]:
    """Run the passes over ``gm`` and outline the result, without compiling anything.

    Raises:
        NoResidualStreamError: if the graph has no site.
    """
    manager = PassManager(PassContext(config), region_passes=region_passes)
    transformed = manager.run(gm)
    streams = manager.ctx.streams
    assert streams is not None
    given = len(_placeholders(transformed)) - len(constants_of(transformed.graph))
    bank = config.adapters
    attached = attach_adapters(transformed, streams, bank) if bank is not None else Attached()
    if replaced.sites:
        replace_sites(transformed, streams, replaced)
    if not streams.junctions:
        raise NoResidualStreamError(FallbackReason.NO_STREAM)
    outline = Outline(transformed, streams, manager)
    outline.spec = dataclasses.replace(
        outline.spec,
        given=given,
        adapted=attached.paths,
        left=attached.left,
        routed=attached.routed,
        routed_width=attached.width,
        mirrored=tuple(manager.ctx.mirrored),
    )
    return outline, manager


def refusal(gm: fx.GraphModule) -> FallbackReason | None:
    """Why skipc will not touch ``gm``, if so."""
    nodes = list(gm.graph.nodes)
    made = [t for n in nodes for t in tensors(n)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in made):
        return FallbackReason.GRAD
    if any(is_random(n) for n in nodes):
        return FallbackReason.TRAINING
    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, torch._subclasses.FakeTensor)
    if any(type(t) not in plain for t in made if not torch._C._functorch.is_functorch_wrapped_tensor(t)):
        return FallbackReason.SUBCLASS
    if any(
        op_name(n) == "_enter_inference_mode" or (op_name(n) == "_set_grad_enabled" and n.args != (False,))
        for n in nodes
    ):
        return FallbackReason.MODES
    if any(isinstance(getattr(gm, str(n.target), None), torch.nn.Parameter) for n in nodes if n.op == "get_attr"):
        return FallbackReason.FROZEN
    enters = [n for n in nodes if op_name(n) == "_enter_autocast"]
    ambient = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    if any(ambient or not switches_autocast_off(n) for n in enters):
        return FallbackReason.AUTOCAST
    return None


def graph_break_of(gm: fx.GraphModule) -> str | None:
    """Why ``gm`` ends before the model does, if it does."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return str(reason.reason) if reason is not None and reason.graph_break else None


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
