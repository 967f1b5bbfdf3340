"""skipc as a plain torch.compile backend, on a hand-written model, without importing it to compile.

Run: python examples/backend_by_name.py
"""

import torch
from torch import nn


class Block(nn.Module):
    """A pre-norm MLP block."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


@torch.no_grad()
def main() -> None:
    model = nn.Sequential(*(Block() for _ in range(4))).eval()
    fast = torch.compile(model, backend="skipc", options={"preset": "exact"})
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(fast(x), model(x))

    import skipc

    with skipc.session(fast, skip={"2.mlp"}) as session:
        torch.testing.assert_close(fast(x), model[3](model[1](model[0](x))))
    print(session.stats())


if __name__ == "__main__":
    main()
