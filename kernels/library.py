"""The ``torch.ops.skipc`` namespace. An op has its plain-torch reference as the default implementation, which the
native one overrides on its device once :mod:`skipc.kernels.native` has loaded it."""

from __future__ import annotations

import torch

library = torch.library.Library("skipc", "DEF")
