"""From encoded samples to a step plan: micro-batches, tiles, ranks, counts; no tensor moves here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from omni_ray.balance.cost import language_cost
from omni_ray.balance.dispatch import assign, deal, light_ends
from omni_ray.types.batch import ItemRoute, MicroBatchPlan, StepPlan
from omni_ray.types.errors import PlanError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRanks:
    """How many ranks each pool has."""

    vision: int = 1
    audio: int = 1
    speech: int = 1
    language: int = 1
    inner_dp: int = 0
    """Encoder ranks of one language replica, which encode its items alone (colocated); 0: any rank encodes any item."""

    def of(self, modality: Modality) -> int:
        """Ranks of an encoder pool."""
        return int(getattr(self, modality.value))


def pack(samples: Sequence[EncodedSample], micro_batches: int) -> list[list[int]]:
    """Sample numbers of every micro-batch, in submission order; equal language work, media-light ones at the ends.

    What lands in a micro-batch depends on the samples alone, never on pool sizes: the sums stay the same bits.
    """
    count = max(1, min(micro_batches, len(samples)))
    bins = assign([language_cost(len(sample)) for sample in samples], count)
    members = [[i for i, b in enumerate(bins) if b == wanted] for wanted in range(count)]
    media = [sum(span.cost for i in group for span in samples[i].spans) for group in members]
    return [members[place] for place in light_ends(media)]


def make_plan(
    *,
    step: int,
    stage: str,
    names: Sequence[str],
    samples: Sequence[EncodedSample],
    groups: Sequence[Sequence[int]],
    ranks: PoolRanks,
    tile_items: int,
    counts: Mapping[str, int],
) -> StepPlan:
    """The plan of one step.

    Args:
        step: Global step.  stage: Stage name.  names: Reference of every sample (``source:index``).
        samples: Encoded samples.  groups: Output of :func:`pack`.  ranks: Pool sizes.
        tile_items: Items of one modality that run as one fixed batch.  counts: Rows per loss term over the step.
    """
    rows = [sum(language_cost(len(samples[i])) for i in group) for group in groups]
    language_ranks = deal(rows, ranks.language)
    micro_batches = tuple(
        MicroBatchPlan(
            index=index,
            language_rank=language_ranks[index],
            samples=tuple(names[i] for i in group),
            lengths=tuple(len(samples[i]) for i in group),
        )
        for index, group in enumerate(groups)
    )
    items = _items(samples, groups, language_ranks, tile_items)
    return StepPlan(
        step=step,
        stage=stage,
        micro_batches=micro_batches,
        order=tuple(range(len(groups))),
        items=dispatch_items(items, ranks),
        counts=dict(counts),
    )


def _items(
    samples: Sequence[EncodedSample], groups: Sequence[Sequence[int]], language_ranks: Sequence[int], tile_items: int
) -> list[ItemRoute]:
    items: list[ItemRoute] = []
    tile = -1
    for index, group in enumerate(groups):
        filled: dict[Modality, tuple[int, int]] = {}  # modality -> (open tile, items in it)
        start = 0
        for number in group:
            for span in samples[number].spans:
                open_tile, inside = filled.get(span.modality, (-1, tile_items))
                if inside >= tile_items:
                    tile += 1
                    open_tile, inside = tile, 0
                filled[span.modality] = (open_tile, inside + 1)
                items.append(
                    ItemRoute(
                        id=len(items),
                        modality=span.modality,
                        cost=span.cost,
                        encoder_rank=0,
                        language_rank=language_ranks[index],
                        micro_batch=index,
                        offset=start + span.offset,
                        length=span.length,
                        tile=open_tile,
                    )
                )
            start += len(samples[number])
    return items


def dispatch_items(items: Sequence[ItemRoute], ranks: PoolRanks) -> tuple[ItemRoute, ...]:
    """Give every tile a rank of its pool, by cost; colocated, a rank of its own language replica's inner group."""
    rank_of_tile: dict[int, int] = {}
    for modality in Modality:
        groups: dict[int, dict[int, float]] = {}
        for item in items:
            if item.modality == modality:
                colocated = ranks.inner_dp and modality != Modality.SPEECH
                tiles = groups.setdefault(item.language_rank if colocated else -1, {})
                tiles[item.tile] = tiles.get(item.tile, 0.0) + item.cost
        for group, tiles in groups.items():
            first = 0 if group < 0 else group * ranks.inner_dp
            size = ranks.of(modality) if group < 0 else ranks.inner_dp
            chosen = assign(list(tiles.values()), size)
            rank_of_tile.update({tile: first + rank for tile, rank in zip(tiles, chosen, strict=True)})
    return tuple(replace(item, encoder_rank=rank_of_tile[item.tile]) for item in items)


def check_plan(plan: StepPlan, ranks: PoolRanks) -> None:
    """Refuse a plan that contradicts itself.

    Raises:
        PlanError: overlapping routes, rows outside their micro-batch, unknown ranks, ids out of order.
    """
    sizes = {batch.index: sum(batch.lengths) for batch in plan.micro_batches}
    ends: dict[int, int] = {}
    for place, item in enumerate(plan.items):
        if item.id != place:
            raise PlanError(f"step {plan.step}: item {item.id} stands at place {place}; ids must count up from 0")
        if not 0 <= item.encoder_rank < ranks.of(item.modality):
            raise PlanError(
                f"step {plan.step}: item {item.id} names {item.modality} rank {item.encoder_rank}, "
                f"yet the pool has {ranks.of(item.modality)}"
            )
        if item.micro_batch not in sizes or item.offset + item.length > sizes[item.micro_batch]:
            raise PlanError(f"step {plan.step}: item {item.id} ends outside micro-batch {item.micro_batch}")
        if item.offset < ends.get(item.micro_batch, 0):
            raise PlanError(f"step {plan.step}: item {item.id} overlaps the item before it; routes must be disjoint")
        ends[item.micro_batch] = item.offset + item.length
