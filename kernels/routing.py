"""One decision for each token which adapters it wants, the same in every layer (AdaFuse, arXiv 2603.11873, "token-level
pre-gating").

A router is one flat fp32 tensor, so that another one can be put in its place: how many experts there are (0 for no
router, and then all that follows is of no account), their width, how many a token gets, and whether the amounts of
these add up to one; then for each expert the slot that its adapter lies in (-1 for none), its bias, and its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skipc.kernels.library import library

HEADER = 4
MOST_EXPERTS = 64

library.define("route_tokens(Tensor x, Tensor router, Tensor(a!) table, Tensor(b!) gates) -> ()")


def places(experts: int, width: int) -> int:
    """How many numbers a router is."""
    return HEADER + experts * (2 + width)


def route_tokens(x: torch.Tensor, router: torch.Tensor, table: torch.Tensor, gates: torch.Tensor) -> None:
    """Write what each token wants: the experts of the largest ``x @ weight.T + bias``, each as much as the softmax says
    (over all experts, or over those that are chosen, if amounts add up to one). Of equal ones the first comes first.

    Args:
        x: ``[..., width]``, floating; the tokens.
        router: see above. Without experts, nothing is written.
        table, gates: of :mod:`skipc.kernels.lora`; afterwards each token is a group of its own
            (and layers that take other rows want nothing).

    Raises:
        RuntimeError: for tokens of another width, and if there is no room for what they want.
    """
    experts, width, most, whole = (int(n) for n in router[:HEADER].tolist())
    if not experts:
        return
    if x.shape[-1] != width:
        raise RuntimeError(f"a router for tokens of width {width} met some of {x.shape[-1]}")
    slots, bias, weight = router[HEADER : places(experts, width)].split([experts, experts, experts * width])
    logits = F.linear(x.reshape(-1, width).float(), weight.view(experts, width), bias)
    count = len(logits) * most
    if count > len(table) - 2:
        raise RuntimeError(f"{len(logits)} tokens that want {most} adapters each are more than {len(table) - 2}")
    found, chosen = (t[:, :most] for t in logits.sort(dim=1, descending=True, stable=True))
    amounts = found.softmax(1) if whole else logits.softmax(1).gather(1, chosen)
    table[:2] = torch.tensor([-len(logits), most])
    table[2 : 2 + count] = slots.long()[chosen].flatten()
    gates[2 : 2 + count] = amounts.flatten()


library.impl("route_tokens", route_tokens, "CompositeExplicitAutograd")


@torch.library.register_fake("skipc::route_tokens")
def _(*_: object) -> None:
    return None
