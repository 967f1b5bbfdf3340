"""``skipc.package``: a gated model as an AOTInductor package, which runs without Python passes, without Dynamo, and
without skipc."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from skipc.backend import build_outline, config_from, refusal
from skipc.dynamo import compile_isolated
from skipc.ir.config import Config
from skipc.ir.errors import SkipcError
from skipc.kernels.attention import attend
from skipc.passes.fx_edit import copy_graph
from skipc.passes.insert_gates import GATE_INPUTS, insert_gates
from skipc.passes.lowering.inductor import check_torch_version, config_patches


@torch.no_grad()
def package(
    model: torch.nn.Module, *args: Any, path: str | Path, config: Config | None = None, **kwargs: Any
) -> list[str]:
    """Compile one call of ``model``, with a gate at every site, into a package for
    ``torch._inductor.aoti_load_package``.

    The package holds the weights, and takes what the call's graph takes, in the order that is returned: tensors among
    the arguments (caches, which it writes in place, too), then the gates of :class:`skipc.GateTable`, with ``rule`` as
    an int64 scalar and ``valid`` as bool ``[batch, tokens]``. It returns the call's tensors, then ``skipped``, bool
    ``[sites]``, and the moments of each site. Sizes are those of the call. The metadata of the package, JSON under
    ``skipc``, names its inputs and sites.

    Args:
        model: in evaluation mode.
        *args, **kwargs: of the call, which is run once, in eager.
        path: of the package to write; ends with ``.pt2``.
        config: ``kv``, ``disable_passes`` and Inductor's options are used.

    Raises:
        SkipcError: if the call is not one graph, or one that skipc does not compile.
    """
    check_torch_version()
    config = config or config_from(None)
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((copy_graph(gm), list(example_inputs)))
        return gm.forward

    compile_isolated(model, backend=capture, fullgraph=True, dynamic=False)(*args, **kwargs)
    if len(graphs) != 1:
        raise SkipcError(f"a package holds one graph, and this call has {len(graphs)}")
    gm, inputs = graphs[0]
    reason = refusal(gm)
    if reason is not None:
        raise SkipcError(f"cannot be packaged: {reason}")
    outline, manager = build_outline(gm, config, region_passes=())
    assert manager.ctx.streams is not None
    gated = insert_gates(outline.gm, manager.ctx.streams, config.kv)
    _only_torch(gated.gm)
    names = _weights_inside(gated.gm, outline.spec.inputs, outline.spec.parameters, inputs)
    n = len(gated.sites)
    extent = tuple(
        next(reversed([v for v in gated.gm.graph.nodes if v.op == "placeholder"])).meta["example_value"].shape
    )
    gates = (
        torch.zeros(n, dtype=torch.bool), torch.full((n,), torch.inf), torch.zeros(n, n, dtype=torch.bool),
        torch.ones(n), torch.arange(n), torch.tensor(0), torch.ones(extent, dtype=torch.bool),
    )  # fmt: skip
    given = [value for value, name in zip(inputs, names, strict=True) if name is not None]
    kept = [name for name in names if name is not None]
    exported = torch.export.export(gated.gm, (*given, *gates), strict=False)
    about = {
        "inputs": [*kept, *GATE_INPUTS],
        "sites": gated.sites,
        "outputs": gated.outputs,
        "measured": gated.measured,
    }
    options = {**config_patches(config), "aot_inductor.metadata": {"skipc": json.dumps(about)}}
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
    return [*kept, *GATE_INPUTS]


def _only_torch(gm: fx.GraphModule) -> None:
    """Replace skipc's own operations in ``gm`` and its branches: where a package runs, nobody has loaded them."""
    for graph in (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)):
        for node in graph.nodes:
            if node.target is torch.ops.skipc.grouped_attention.default:
                node.target = _attention
    gm.recompile()


def _attention(
    q: Any, k: Any, v: Any, mask: Any, live: Any, causal: bool, scale: float, softcap: float
) -> torch.Tensor:
    """``grouped_attention`` over all keys; the mask leaves out those that are not live."""
    return attend(q, k, v, mask, causal, scale, softcap)


def _weights_inside(
    gm: fx.GraphModule, names: Sequence[str], parameters: Sequence[int], inputs: Sequence[Any]
) -> list[str | None]:
    """Make the parameters that ``gm`` takes its own. Returns the names of the inputs that are left, None for others."""
    left: list[str | None] = []
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for i, (name, value) in enumerate(zip(names, inputs, strict=True)):
        node = placeholders[i]
        if i not in parameters:
            left.append(name)
            continue
        left.append(None)
        gm.register_buffer(f"weight_{i}", value.detach())
        with gm.graph.inserting_before(node):
            made = gm.graph.get_attr(f"weight_{i}")
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.recompile()
    return left
