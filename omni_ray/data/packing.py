"""Samples into packed sequences of a token budget: whole ones that fit best, or cut where the budget ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omni_ray.data.mixture import SampleRows
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample


def best_fit(lengths: Sequence[int], budget: int) -> list[int]:
    """Which of the waiting samples fill one sequence best.

    The oldest always goes first, so nothing waits longer than there are samples waiting; then the exact subset of the
    others whose rows come nearest to the budget, by dynamic programming over sets of reachable sums (bits of a whole
    number: bit s is set where some subset has s rows). Earlier samples are preferred where several subsets do.

    Args:
        lengths: Rows of the waiting samples, oldest first; the oldest must fit.  budget: Rows of the sequence.
    Returns:
        Places in ``lengths``, ascending, the oldest among them.
    """
    room = budget - lengths[0]
    mask = (1 << (room + 1)) - 1
    reachable = [1]
    for length in lengths[1:]:
        before = reachable[-1]
        reachable.append((before | (before << length)) & mask if length <= room else before)
    rest = reachable[-1].bit_length() - 1
    chosen = [0]
    for place in range(len(lengths) - 1, 0, -1):
        # Where the sum is reachable without this sample, it stays: the earlier ones are taken first.
        if not reachable[place - 1] >> rest & 1:
            chosen.append(place)
            rest -= lengths[place]
    return sorted(chosen)


def cut_row(length: int, start: int, room: int, held: Sequence[tuple[int, int]]) -> int:
    """Where a sample is cut so that the rows from ``start`` fill at most ``room``.

    Args:
        length: Rows of the sample.  start: First row still to place.  room: Rows left in the sequence.
        held: Stretches (first, after the last) that cannot be cut, ascending.
    Returns:
        The row after the last one placed: ``length`` where all fits, ``start`` where nothing can be placed.
    """
    stop = start + room
    if stop >= length:
        return length
    for first, after in reversed(held):
        # A row is a cut when neither side of it lies in one stretch; stretches may touch.
        if first < stop < after:
            stop = first
    return max(stop, start)


def fill(rows: Sequence[int], budget: int) -> float:
    """Share of the budget that sequences of these rows fill."""
    return sum(rows) / (budget * len(rows)) if rows else 0.0


def slice_sample(encoded: EncodedSample, start: int, stop: int | None) -> EncodedSample:
    """A stretch of a sample's rows as a sample of its own; its last row still predicts the row that was cut off.

    Raises:
        DataError: a media item would be cut.
    """
    stop = len(encoded) if stop is None else stop
    if (start, stop) == (0, len(encoded)):
        return encoded
    inside = [span for span in encoded.spans if start < span.offset + span.length and span.offset < stop]
    for span in inside:
        if span.offset < start or span.offset + span.length > stop:
            raise DataError(f"rows {start}..{stop} of {encoded.key} cut {span.name} at rows {span.offset}..")
    return replace(
        encoded,
        ids_T5=encoded.ids_T5[start:stop],
        labels_T5=encoded.labels_T5[start:stop],
        loss_kind_T=encoded.loss_kind_T[start:stop],
        spans=tuple(replace(span, offset=span.offset - start) for span in inside),
    )


def sample_rows(encoded: EncodedSample, cost: float) -> SampleRows:
    """What order and packing know of a sample.

    A row with a codec id and an audio placeholder count as speech, picture and video placeholders as vision, the rest
    as text (networks.md section 6).
    """
    rows = {modality: 0 for modality in Modality}
    for span in encoded.spans:
        rows[span.modality] += span.length
    vision, speech = rows[Modality.VISION], rows[Modality.AUDIO] + rows[Modality.SPEECH]
    # The row before an answer's first codec row predicts it, so the two stay together.
    held = tuple((span.offset - (1 if span.target else 0), span.offset + span.length) for span in encoded.spans)
    return SampleRows(text=len(encoded) - vision - speech, vision=vision, speech=speech, cost=cost, held=held)
