"""Which rows of a packed micro-batch belong to which encoder rank: the routes of the modality bridge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omni_ray.types.batch import ItemRoute, StepPlan
from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """The items of one step, looked up by micro-batch, modality and encoder rank."""

    items: tuple[ItemRoute, ...]
    """In id order."""

    @staticmethod
    def of(plan: StepPlan) -> RouteTable:
        """Routes of a plan."""
        return RouteTable(items=plan.items)

    def select(self, micro_batch: int, modality: Modality, rank: int | None = None) -> tuple[ItemRoute, ...]:
        """Items of a micro-batch and modality (of one encoder rank, or of all), in id order."""
        return tuple(
            item
            for item in self.items
            if item.micro_batch == micro_batch
            and item.modality == modality
            and (rank is None or item.encoder_rank == rank)
        )

    def ranks(self, micro_batch: int, modality: Modality) -> tuple[int, ...]:
        """Encoder ranks that hold items of a micro-batch; a micro-batch without images makes no vision call."""
        return tuple(sorted({item.encoder_rank for item in self.select(micro_batch, modality)}))


def tiles_of(items: Sequence[ItemRoute]) -> list[tuple[int, list[ItemRoute]]]:
    """Items grouped by tile, tiles and items in id order."""
    tiles: dict[int, list[ItemRoute]] = {}
    for item in items:
        tiles.setdefault(item.tile, []).append(item)
    return sorted(tiles.items())
