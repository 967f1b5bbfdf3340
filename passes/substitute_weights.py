"""A graph for weights of other shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from skipc.passes.fx_edit import copy_graph, fake_mode_of, infer, labels_of, last_input, positions
from skipc.passes.ops import in_model, is_parameter_like, op_name, path_of, same_sizes, tensor, tensors
from torch import fx

from skipc.ir.errors import PlanError

_SIZED = frozenset(["view", "reshape", "expand"])  # whose arguments may be sizes


def weight_name(node: fx.Node) -> str | None:
    """The name in the model of the parameter that an input of a graph is; None for other inputs."""
    if node.op != "placeholder" or not is_parameter_like(node):
        return None
    path = in_model(path_of(node))
    return path[1:] if path is not None and path[:1] == "." and len(path) > 1 else None


def substitute_weights(gm: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> fx.GraphModule:
    """A copy of ``gm``, as Dynamo made it, in which the parameters of these names have these shapes.

    Numbers in the graph that are sizes of what has another size now are changed along. Caches of keys and values keep
    their shape: of one that is written in place, only the first heads are written and read; one that grows gets zeros
    for heads that are not there.

    Raises:
        PlanError: if the graph cannot run with them, or if they change the shape of something that the caller sees.
    """
    gm = copy_graph(gm)
    _Substitution(gm.graph, shapes).run()
    gm.graph.lint()
    gm.recompile()
    return gm


class _Substitution:
    def __init__(self, graph: fx.Graph, shapes: Mapping[str, tuple[int, ...]]):
        self.graph, self.shapes = graph, shapes
        self.changed: dict[fx.Node, str] = {}  # nodes of another shape, and the parameter that is why
        self.before: dict[fx.Node, torch.Tensor] = {}  # what these were

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self._substitute(node)
                continue
            why = next((self.changed[n] for n in node.all_input_nodes if n in self.changed), None)
            if why is None:
                continue
            if node.op == "output":
                self._return(node)
                continue
            try:
                self._follow(node, why)
            except PlanError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise PlanError(
                    f"a weight of shape {list(self.shapes[why])} does not fit {why}: {node.format_node()}: {reason}"
                ) from error

    def _substitute(self, node: fx.Node) -> None:
        name, old = weight_name(node), tensor(node)
        if name is None or old is None or name not in self.shapes or tuple(old.shape) == tuple(self.shapes[name]):
            return
        mode = fake_mode_of(self.graph)
        assert mode is not None
        with mode:
            node.meta["example_value"] = torch.empty(self.shapes[name], dtype=old.dtype, device=old.device)
        self.changed[node], self.before[node] = name, old

    def _follow(self, node: fx.Node, why: str) -> None:
        """Have ``node`` run on what its arguments are now."""
        name = op_name(node)
        if name == "index_copy_" and len(node.args) == 4 and node.args[3] in self.changed:
            self._narrow_cache(node, why)
        elif name == "cat":
            self._pad_for_cache(node, why)
        elif name in _SIZED and node.args[0] in self.changed:
            self._resize(node)
        self._infer(node, why)

    def _infer(self, node: fx.Node, why: str) -> None:
        before, value = tensors(node), node.meta.get("example_value")
        infer(node)
        after = tensors(node)
        if len(before) == len(after) and all(_alike(a, b) for a, b in zip(before, after, strict=True)):
            node.meta["example_value"] = value  # whose storage later values share
            return
        self.changed[node] = why
        if isinstance(value, torch.Tensor):
            self.before[node] = value

    # -- caches -------------------------------------------------------------------------------------------------------

    def _narrow_cache(self, write: fx.Node, why: str) -> None:
        """Write to, and read, the first heads of a cache: all of it that is used from here on."""
        cache, heads = write.args[0], tensor(write.args[3])
        whole = tensor(cache)
        if not isinstance(cache, fx.Node) or whole is None or heads is None or whole.dim() != 4 or heads.dim() != 4:
            return
        if same_sizes(whole.shape[1:2], heads.shape[1:2]):
            return
        order = positions(self.graph.nodes)
        after = last_input(self.graph) if cache.op == "placeholder" else cache  # no part of the sublayer, but its cache
        self._read_first(cache, heads.shape[1], after, write, [u for u in cache.users if order[u] >= order[write]], why)

    def _pad_for_cache(self, join: fx.Node, why: str) -> None:
        """Append heads that are zero to what is appended to a cache of more heads, of which only the first are read."""
        parts, dim = join.args[0], join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
        if not isinstance(parts, list | tuple) or dim not in (2, -2):  # not tokens behind tokens
            return
        values = [tensor(p) for p in parts]
        if any(v is None or v.dim() != 4 for v in values):
            return
        most = max(v.shape[1] for v in values)  # type: ignore[union-attr]
        fewest = min(v.shape[1] for v in values)  # type: ignore[union-attr]
        if most == fewest:
            return
        join.update_arg(0, [self._padded(p, most, join) for p in parts])
        self._read_first(join, fewest, join, join, list(join.users), why)

    def _read_first(
        self, cache: fx.Node, heads: int, after: fx.Node, like: fx.Node, users: list[fx.Node], why: str
    ) -> None:
        """Let ``users`` have the first heads of ``cache``; the caller keeps all of it."""
        with self.graph.inserting_after(after):
            part = self.graph.call_method("narrow", (cache, 1, 0, heads))
        part.meta = labels_of(like)
        infer(part)
        self.changed[part], self.before[part] = why, cache.meta["example_value"]
        for user in users:
            if user.op != "output":
                user.replace_input_with(cache, part)

    def _return(self, output: fx.Node) -> None:
        """Return keys and values of as many heads as before."""

        def padded(node: fx.Node) -> fx.Node:
            if node not in self.changed:
                return node
            old, new = self.before.get(node), tensor(node)
            heads = old is not None and new is not None and old.dim() == new.dim() == 4
            if not heads or not same_sizes((old.shape[0], *old.shape[2:]), (new.shape[0], *new.shape[2:])):  # type: ignore[union-attr]
                raise PlanError(f"the weight for {self.changed[node]} changes the shape of what the model returns")
            return self._padded(node, old.shape[1], output)  # type: ignore[union-attr]

        output.args = fx.map_arg(output.args, padded)

    def _padded(self, node: Any, heads: int, user: fx.Node) -> fx.Node:
        value = tensor(node)
        assert value is not None
        if value.shape[1] == heads:
            return node
        with self.graph.inserting_before(user):  # by `cat`: `pad` would fix the number of tokens
            one = self.graph.call_method("narrow", (node, 1, 0, 1))
            zeros = self.graph.call_function(torch.zeros_like, (one,))
            missing = self.graph.call_method("expand", (zeros, -1, heads - value.shape[1], -1, -1))
            made = self.graph.call_function(torch.cat, ((node, missing), 1))
        for new in (one, zeros, missing, made):
            new.meta = labels_of(node)
            infer(new)
        return made

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _resize(self, node: fx.Node) -> None:
        """Change the number among the sizes in ``node`` that is due to the changed size of what it reads."""
        source = node.args[0]
        old, new, made = self.before.get(source), tensor(source), tensor(node)  # type: ignore[arg-type]
        if old is None or new is None or made is None or old.dim() != new.dim():
            return
        at = next(i for i in range(old.dim()) if not same_sizes(old.shape[i : i + 1], new.shape[i : i + 1]))
        was, now = old.shape[at], new.shape[at]
        nested = len(node.args) == 2 and isinstance(node.args[1], list | tuple)
        sizes = list(node.args[1] if nested else node.args[1:])  # type: ignore[arg-type]
        if op_name(node) == "expand":
            at += len(sizes) - old.dim()
            place = at if sizes[at] == was else None
        elif any(s == -1 for s in sizes if isinstance(s, int)) or not same_sizes(old.shape[:at], made.shape[:at]):
            return
        else:  # the first that can: heads lie outside of their channels
            places = (i for i in range(at, len(sizes)) if isinstance(sizes[i], int) and sizes[i] * now % was == 0)
            place = next(places, None)
        if place is not None:
            sizes[place] = sizes[place] * now // was
            node.args = (source, sizes) if nested else (source, *sizes)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return same_sizes(a.shape, b.shape) and same_sizes(a.stride(), b.stride())
