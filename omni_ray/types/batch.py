"""Plans and batches: the nouns that cross from the data side to the pools and between pools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from omni_ray.types.modality import Modality

if TYPE_CHECKING:  # plans and routes are read by processes that have no use for torch
    from torch import Tensor

IGNORE = -100
"""Label of a row that carries no loss."""
AUDIO_EOS = 2
"""Stored codec id that ends a speech segment (networks.md 3.1)."""
AUDIO_PAD = 3
"""Stored codec id of a row without a codec frame."""
AUDIO_RESERVED = 32
"""Stored codec id = code + 32."""
NUM_CODEBOOKS = 4


class LossKind(IntEnum):
    """Which term of the objective the text head's loss at a row belongs to (networks.md section 6)."""

    NONE = 0
    TEXT = 1
    AUDIO_TEXT = 2
    VISION = 3
    PAD_TEXT = 4
    """Text-pad target beside codec rows; joins AUDIO_TEXT with weight 0.1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRoute:
    """One media item's way from an encoder rank to its rows in a language micro-batch."""

    id: int
    """Position in the step's item order; sums run in this order."""
    modality: Modality
    """The pool that encodes it."""
    cost: float
    """Patches or frames."""
    encoder_rank: int
    """Rank in the encoder pool."""
    language_rank: int
    """Rank in the language pool that owns the micro-batch."""
    micro_batch: int
    """Index of the micro-batch in the step."""
    offset: int
    """First row in the packed micro-batch."""
    length: int
    """Rows."""
    tile: int
    """Items with the same tile run as one fixed batch (docs/decisions, 0004)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchPlan:
    """One packed sequence of one language rank."""

    index: int
    """Place in the step; language gradients are summed in this order."""
    language_rank: int
    """Who computes it."""
    samples: tuple[str, ...]
    """Sample references ``source:index`` in packing order."""
    lengths: tuple[int, ...]
    """Rows per sample; their running sum is cu_seqlens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Everything about a training step that can be known before a tensor moves; one JSON line in plans.jsonl."""

    step: int
    """Global step, counted over all stages."""
    stage: str
    """Curriculum stage name."""
    micro_batches: tuple[MicroBatchPlan, ...]
    """In index order."""
    order: tuple[int, ...]
    """Order in which micro-batches are submitted (media-light ones first and last)."""
    items: tuple[ItemRoute, ...]
    """In id order."""
    counts: Mapping[str, int]
    """Global number of rows per loss term: text, audio_text, pad_text, vision, audio_0..audio_3."""

    def to_json(self) -> str:
        """One line, keys sorted, so that equal plans are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> StepPlan:
        """The inverse of :meth:`to_json`."""
        raw: dict[str, Any] = json.loads(line)
        return StepPlan(
            step=raw["step"],
            stage=raw["stage"],
            micro_batches=tuple(
                MicroBatchPlan(
                    index=m["index"],
                    language_rank=m["language_rank"],
                    samples=tuple(m["samples"]),
                    lengths=tuple(m["lengths"]),
                )
                for m in raw["micro_batches"]
            ),
            order=tuple(raw["order"]),
            items=tuple(ItemRoute(**{**i, "modality": Modality(i["modality"])}) for i in raw["items"]),
            counts=dict(raw["counts"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingBatch:
    """Embeddings of one modality for one micro-batch, on their way to the language pool (or gradients, back)."""

    values_ID: Tensor
    """Rows [sum of lengths, model dim] (speech: codes [frames, 4]); concatenated in item order."""
    item_ids: tuple[int, ...]
    """Items whose rows follow each other; an empty tuple is a normal batch."""
    lengths: tuple[int, ...]
    """Rows per item, same order."""
    starts: tuple[int, ...] = ()
    """First row inside its item of every part, where an item travels in parts; empty: every item is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OmniBatch:
    """A packed micro-batch; column 0 text, 1..4 codec (networks.md section 3.1)."""

    ids_T5: Tensor
    """[T, 5] int64."""
    cu_seqlens: tuple[int, ...]
    """0, then the running sum of sample lengths."""
    labels_T5: Tensor
    """[T, 5] int64, IGNORE where no loss."""
    loss_kind_T: Tensor
    """[T] int64, LossKind of the text head."""
    positions: Tensor
    """[T] int64, restarting at 0 in every sample."""
    features: Mapping[Modality, EmbeddingBatch] = field(default_factory=dict)
    """Rows to place by the plan's routes."""
