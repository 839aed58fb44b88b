"""What a run asks of whoever looks at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from actors.pool import Pool
from omni_ray.config.recipe import Recipe


class Onlooker(Protocol):
    """Whoever looks at the networks of a run while it trains."""

    def start(self, recipe: Recipe, root: Path, pools: Mapping[str, Pool]) -> None:
        """The pools are up; ``pools`` names those of any time, ``root`` the data."""
        ...

    def between(self, settle: Callable[[], None]) -> None:
        """Between two steps; ``settle`` ends those in flight, after which every rank 0 holds its whole network."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...
