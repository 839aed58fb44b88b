"""Which rows of a packed micro-batch belong to which encoder rank: the routes of the modality bridge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from omni_ray.types.batch import ItemRoute, StepPlan
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import Modality


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """The items of one step, looked up by micro-batch, modality and encoder rank."""

    items: tuple[ItemRoute, ...]
    """In id order."""
    by_place: Mapping[tuple[int, Modality], tuple[ItemRoute, ...]]
    """Items of a micro-batch and modality, in id order."""

    @staticmethod
    def of(plan: StepPlan) -> RouteTable:
        """Routes of a plan.

        Raises:
            PlanError: two items claim the same row.
        """
        return route_items(plan.items)

    def select(self, micro_batch: int, modality: Modality, rank: int | None = None) -> tuple[ItemRoute, ...]:
        """Items of a micro-batch and modality (of one encoder rank, or of all), in id order."""
        found = self.by_place.get((micro_batch, modality), ())
        return found if rank is None else tuple(item for item in found if item.encoder_rank == rank)

    def ranks(self, micro_batch: int, modality: Modality) -> tuple[int, ...]:
        """Encoder ranks that hold items of a micro-batch; a micro-batch without images makes no vision call."""
        return tuple(sorted({item.encoder_rank for item in self.select(micro_batch, modality)}))


def route_items(items: Iterable[ItemRoute]) -> RouteTable:
    """Index routes and check that no two claim the same row.

    Raises:
        PlanError: names both items, the micro-batch and the rows.
    """
    by_place: dict[tuple[int, Modality], list[ItemRoute]] = {}
    by_micro_batch: dict[int, list[ItemRoute]] = {}
    items = tuple(items)
    for item in items:
        by_place.setdefault((item.micro_batch, item.modality), []).append(item)
        by_micro_batch.setdefault(item.micro_batch, []).append(item)
    for micro_batch, members in by_micro_batch.items():
        members.sort(key=lambda item: (item.offset, item.id))
        for before, after in pairwise(members):
            end = before.offset + before.length
            if after.offset < end:
                raise PlanError(
                    f"items {before.id} and {after.id} of micro-batch {micro_batch} both claim rows "
                    f"{after.offset}..{min(end, after.offset + after.length) - 1}; routes must be disjoint"
                )
    return RouteTable(items=items, by_place={place: tuple(found) for place, found in by_place.items()})


def tiles_of(items: Sequence[ItemRoute]) -> list[tuple[int, list[ItemRoute]]]:
    """Items grouped by tile, tiles and items in id order."""
    tiles: dict[int, list[ItemRoute]] = {}
    for item in items:
        tiles.setdefault(item.tile, []).append(item)
    return sorted(tiles.items())
