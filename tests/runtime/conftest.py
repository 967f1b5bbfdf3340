"""What several of these tests run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import skipc
from skipc.ir.site import Site
from tests.harness import STRICT
from tests.models.zoo import ZOO, ids


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any, list[Site]]:
    """A small decoder, compiled, and its sites."""
    torch._dynamo.reset()
    model = ZOO["llama"].build()
    sites = list(skipc.find_sites(model, ids(), use_cache=False).sites)
    return model, skipc.compile(model, fullgraph=True, **STRICT), sites
