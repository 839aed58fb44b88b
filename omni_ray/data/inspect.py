"""What lies in a folder of shards: counts, rows per modality, durations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from omni_ray.config.model import OmniConfig
from omni_ray.data.chat import encode_sample, loss_counts
from omni_ray.data.sources import WebDatasetSource
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality

_ROW_S = {Modality.AUDIO: 0.08, Modality.SPEECH: 0.06}
"""Seconds a row of sound lasts (models.md sections 2 and 3)."""


def inspect(
    folder: Path, tokenizer: Tokenizer, model: OmniConfig, *, split: str = "train", limit: int | None = None
) -> dict[str, Any]:
    """Read the sources below a folder (or the folder itself, where it holds tars) and count.

    Args:
        limit: Most samples looked at in each source, evenly spread; None = all.
    Returns:
        source -> {samples, looked_at, kinds, bad, rows: {text, vision, audio, speech}, longest, media_s, loss_rows},
        figures of the samples looked at.
    Raises:
        DataError: no shards there.
    """
    folder = Path(folder)
    places = [folder] if any(folder.glob("*.tar")) else sorted(p.parent for p in folder.glob(f"*/{split}*00000.tar"))
    if not places:
        raise DataError(f"{folder} holds no {split} shards; name a folder of WebDataset tars or of such folders")
    return {place.name: _inspect_source(place, tokenizer, model, split, limit) for place in dict.fromkeys(places)}


def _inspect_source(
    place: Path, tokenizer: Tokenizer, model: OmniConfig, split: str, limit: int | None
) -> dict[str, Any]:
    source = WebDatasetSource(place, place.name, split=split)
    step = 1 if limit is None else max(1, len(source) // max(1, limit))
    numbers = range(0, len(source), step)[:limit]
    kinds: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    losses: Counter[str] = Counter()
    bad, longest = [], 0
    for number in numbers:
        try:
            sample = source[number]
            encoded = encode_sample(sample, tokenizer, model)
        except DataError as error:
            bad.append(str(error))
            continue
        kinds[sample.kind] += 1
        longest = max(longest, len(encoded))
        media = sum(span.length for span in encoded.spans)
        rows["text"] += len(encoded) - media
        for span in encoded.spans:
            rows[span.modality.value] += span.length
        losses.update(loss_counts(encoded))
    return {
        "samples": len(source),
        "looked_at": len(numbers),
        "kinds": dict(sorted(kinds.items())),
        "bad": bad,
        "rows": {name: rows[name] for name in ("text", *(m.value for m in Modality))},
        "longest": longest,
        "media_s": {m.value: round(rows[m.value] * row_s, 1) for m, row_s in _ROW_S.items()},
        "loss_rows": dict(losses),
    }
