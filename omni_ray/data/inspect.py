"""What lies in a folder of samples: counts, rows per modality, sizes, durations, lengths."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_ray.config.model import OmniConfig
from omni_ray.data.chat import encode_sample, loss_counts
from omni_ray.data.image import image_size
from omni_ray.data.media import decode_spans
from omni_ray.data.sources import FileSource, holds_shards, open_path
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.data.video import video_extent
from omni_ray.observability.events import emit
from omni_ray.types.errors import DataError
from omni_ray.types.modality import Modality
from omni_ray.types.sample import EncodedSample, Sample

_ROW_S = {Modality.AUDIO: 0.08, Modality.SPEECH: 0.06}
"""Seconds a row of sound lasts (networks.md sections 2 and 3)."""
EDGES: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lower ends of the bins of a length histogram, in rows a sample; the last is open."""
SECONDS: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 600.0)
"""Lower ends of the bins of a duration histogram; the last is open."""


def inspect(
    folder: Path | str,
    tokenizer: Tokenizer,
    model: OmniConfig,
    *,
    split: str = "train",
    limit: int | None = None,
    decode: bool = False,
    left_out: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Read the sources below a folder (or the folder itself, where it holds samples) and count.

    Args:
        limit: Most samples looked at in each source, evenly spread; None = all.
        decode: Decode the media as training does, so that damage behind a header is found, too.
        left_out: Gets the folders whose shards cannot be opened, and why.
    Returns:
        source -> {samples, looked_at, kinds, bad, empty_shards, rows: {text, vision, audio, speech}, longest, media_s,
        loss_rows, lengths: {modality: {lower end: samples}}, resolutions: {"HxW": media}, durations: {lower end:
        sounds}}, figures of the samples looked at.
    Raises:
        DataError: no samples there.
    """
    return {
        source.name: _Counts(tokenizer, model, decode).of(source, numbers_of(len(source), limit))
        for source in open_places(folder, split, left_out)
    }


def open_places(folder: Path | str, split: str, left_out: dict[str, str] | None = None) -> list[FileSource]:
    """The source that a folder or file is, or those of its folders that are one.

    Args:
        left_out: Gets the folders that hold shards which cannot be opened, and why; they are told in any case.
    Raises:
        DataError: there is none.
    """
    try:
        return [open_path(folder, Path(str(folder)).name, split=split)]
    except DataError as problem:
        found = []
        for place in sorted(Path(folder).glob("*/")) if Path(folder).is_dir() else []:
            try:
                found.append(open_path(place, place.name, split=split))
            except DataError as error:
                if holds_shards(place, split):
                    emit("source_left_out", folder=str(place), problem=str(error))
                    (left_out if left_out is not None else {})[place.name] = str(error)
        if not found:
            raise DataError(f"{folder} holds no {split} samples: {problem}") from problem
        return found


def numbers_of(count: int, limit: int | None) -> range:
    """Numbers of at most ``limit`` samples, evenly spread."""
    return range(0, count, 1 if limit is None else max(1, count // max(1, limit)))[:limit]


class _Counts:
    """What is counted over the samples of one source."""

    def __init__(self, tokenizer: Tokenizer, model: OmniConfig, decode: bool = False) -> None:
        self.tokenizer, self.model, self.decode = tokenizer, model, decode
        self.kinds: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.resolutions: Counter[str] = Counter()
        self.durations: Counter[float] = Counter()
        self.lengths: dict[str, Counter[int]] = {name: Counter() for name in ("text", *(m.value for m in Modality))}
        self.bad: list[str] = []
        self.longest = 0

    def of(self, source: FileSource, numbers: range) -> dict[str, Any]:
        """Read these samples."""
        for number in numbers:
            try:
                sample = source[number]
            except DataError as error:
                self.bad.append(str(error))
                continue
            try:
                encoded = encode_sample(sample, self.tokenizer, self.model)
                if self.decode:
                    decode_spans(sample, encoded.spans, self.model)
                self._add(sample, encoded)
            except DataError as error:
                self.bad.append(str(source.located(number, error)))
        return {
            "samples": len(source),
            "looked_at": len(numbers),
            "kinds": dict(sorted(self.kinds.items())),
            "bad": self.bad,
            "empty_shards": [shard.path for shard in source.shards if not shard.samples],
            "rows": {name: self.rows[name] for name in self.lengths},
            "longest": self.longest,
            "media_s": {m.value: round(self.rows[m.value] * row_s, 1) for m, row_s in _ROW_S.items()},
            "loss_rows": dict(self.losses),
            "lengths": {name: dict(sorted(bins.items())) for name, bins in self.lengths.items() if bins},
            "resolutions": dict(self.resolutions.most_common()),
            "durations": dict(sorted(self.durations.items())),
            "fingerprint": source.fingerprint,
        }

    def _add(self, sample: Sample, encoded: EncodedSample) -> None:
        seen: dict[str, str] = {}
        for span in encoded.spans:
            if span.modality == Modality.VISION:
                seen[span.name] = span.kind
        for name, kind in seen.items():
            raw = sample.media[name]
            size = image_size(raw, name) if kind == "image" else video_extent(raw, name)[1:]
            self.resolutions[f"{size[0]}x{size[1]}"] += 1
        of_sample: Counter[str] = Counter()
        for span in encoded.spans:
            of_sample[span.modality.value] += span.length
            if span.modality in _ROW_S:
                lasts_s = span.length * _ROW_S[span.modality]
                self.durations[SECONDS[bisect_right(SECONDS, lasts_s) - 1]] += 1
        of_sample["text"] = len(encoded) - sum(of_sample.values())
        for name, count in of_sample.items():
            if count > 0:
                self.lengths[name][EDGES[bisect_right(EDGES, count) - 1]] += 1
        self.rows.update(of_sample)
        self.kinds[sample.kind] += 1
        self.losses.update(loss_counts(encoded))
        self.longest = max(self.longest, len(encoded))


def histogram_lines(bins: Mapping[Any, int], unit: str, width: int = 32) -> list[str]:
    """A histogram in text: lower end, bar, count."""
    most = max(bins.values(), default=1)
    return [
        f"    {low:>6} {unit:4} {'#' * max(1, round(count * width / most)):<{width}} {count}"
        for low, count in bins.items()
    ]
