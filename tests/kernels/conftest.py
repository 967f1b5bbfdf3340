"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from skipc.kernels import native


@pytest.fixture(params=["as here", "vectors"])
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products with bf16 weights as on this CPU and, if that has tile registers, as on one without."""
    if request.param == "as here":
        yield
        return
    if not native.tiles():
        pytest.skip("vectors are all that there is here")
    with native.without_tiles():
        yield
