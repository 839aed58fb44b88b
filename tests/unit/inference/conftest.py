"""Both forms of the forward over the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from omni_ray.inference.native import forward
from omni_ray.models.native.library import library


@pytest.fixture(scope="module", params=["torch", "native"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Engines made under this fixture run torch's operations, or the compiled function."""
    if request.param == "native" and library() is None:
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(forward, "library", lambda: None)
        yield request.param
