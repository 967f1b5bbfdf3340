"""The ``torch.ops.skipc`` namespace. An op has its plain-torch reference as the default implementation, which the
native one overrides on its device once :mod:`skipc.kernels.native` has loaded it."""

from __future__ import annotations

import torch

NATIVE = (torch.float32, torch.bfloat16)  # dtypes that the native ones take

library = torch.library.Library("skipc", "DEF")
