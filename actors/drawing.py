"""Steps drawn in one place: a Ray Data read task that walks the order and yields what every step is made of.

For nested mixtures and packing a draw follows from the one before it. One task walks them all and reads the headers of
every sample once; decode tasks get a step's draw and need no other. Plain mixtures need none of this: any task computes
any step from its number.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_ray.config.recipe import Recipe
from omni_ray.data.order_state import OrderState
from omni_ray.training.prepare import StepBuilder

DRAWS_PER_BLOCK = 4


def needs_drawing(recipe: Recipe, first: int, stop: int) -> bool:
    """Whether any step from ``first`` to ``stop`` follows from the one before it."""
    begin = 0
    for stage in recipe.stages:
        end = begin + stage.steps
        plain = stage.mixture.counts is not None and stage.packing.kind == "balance"
        if not plain and begin < stop and end > first:
            return True
        begin = end
    return False


def drawn_blocks(recipe: Recipe, root: Path, state: OrderState | None, first: int, stop: int) -> Iterator[Any]:
    """Arrow tables of a few steps each: their numbers, and their pickled draws."""
    import pyarrow as pa

    builder = StepBuilder(recipe, root, state=state)
    for start in range(first, stop, DRAWS_PER_BLOCK):
        steps = range(start, min(start + DRAWS_PER_BLOCK, stop))
        draws = [pickle.dumps(builder.draw(step), protocol=5) for step in steps]
        yield pa.table({"step": list(steps), "draw": pa.array(draws, pa.large_binary())})


def draw_dataset(recipe: Recipe, root: Path, state: OrderState | None, first: int, stop: int) -> Any:
    """The steps as a Ray Data dataset with one streaming read task; run again after a failure, it draws the same."""
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Draws(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=stop - first, size_bytes=None, exec_stats=None)
            return [ReadTask(lambda: drawn_blocks(recipe, root, state, first, stop), metadata)]

    return ray.data.read_datasource(Draws(), override_num_blocks=1, num_cpus=0.5)
