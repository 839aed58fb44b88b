"""Speech and film made ready to train on: Ray Data maps sample numbers to good stretches; one process can do the same.

Media are read, cut and written where they are decoded; what travels through Ray Data are numbers, words and times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.audio import decode_audio, encode_flac
from omni_ray.data.curation import Segment, agreement, clusters, colour_histograms, joined, ordinary, scene_starts
from omni_ray.data.inspect import open_places
from omni_ray.data.video import frames_at, plan_frames_at_rate
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

RATE_HZ = 16000
AGREE = 0.75
"""Least agreement of the two recognisers."""
SCENE_FPS, SCENE_SIZE = 4.0, (56, 56)
CLUSTERS = 8
Rows = list[dict[str, Any]]


class SileroSegmenter:
    """silero-vad's own cutter."""

    def __init__(self) -> None:
        """Raises DataError where silero-vad is not installed."""
        try:
            from silero_vad import load_silero_vad
        except ImportError as error:
            raise DataError("silero-vad is not installed; pip install 'omni-ray[eval]'") from error
        self._model = load_silero_vad(onnx=True)

    def segments(self, wave_S: NDArray[np.float32]) -> list[tuple[float, float]]:
        """See :class:`omni_ray.data.curation.Segmenter`."""
        import torch
        from silero_vad import get_speech_timestamps

        found = get_speech_timestamps(torch.from_numpy(np.array(wave_S)), self._model, sampling_rate=RATE_HZ)
        return [(piece["start"] / RATE_HZ, piece["end"] / RATE_HZ) for piece in found]


class SphinxAligner:
    """Pocketsphinx's forced alignment."""

    def __init__(self) -> None:
        from omni_ray.evaluation.judges import _sphinx

        self._decoder = _sphinx()(loglevel="FATAL", lm=None, samprate=RATE_HZ)
        self._start = self._decoder.get_cmn(False)

    def align(self, wave_S: NDArray[np.float32], words: list[str] | tuple[str, ...]) -> list[tuple[str, float, float]]:
        """See :class:`omni_ray.data.curation.Aligner`."""
        for word in words:
            spoken = self._decoder.lookup_word(word) or self._decoder.lookup_word(word.replace("our", "or"))
            if spoken is None:
                return []
            if self._decoder.lookup_word(word) is None:
                self._decoder.add_word(word, spoken, True)
        self._decoder.set_align_text(" ".join(words))
        self._decoder.set_cmn(self._start)
        self._decoder.start_utt()
        self._decoder.process_raw((wave_S * 32767).astype(np.int16).tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        if self._decoder.hyp() is None:
            return []
        pieces = [s for s in self._decoder.seg() if s.word.partition("(")[0] in words]
        return [(s.word.partition("(")[0], s.start_frame / 100, (s.end_frame + 1) / 100) for s in pieces]


class SphinxRecogniser:
    """Pocketsphinx with the language model of general English in its package: the second opinion."""

    name = "pocketsphinx"

    def __init__(self) -> None:
        from omni_ray.evaluation.judges import _sphinx

        self._decoder = _sphinx()(loglevel="FATAL", samprate=RATE_HZ)
        self._start = self._decoder.get_cmn(False)

    def hear(self, wave_S: NDArray[np.float32], sample_rate_hz: int) -> tuple[str, ...]:
        """See :class:`omni_ray.data.curation.Recogniser`."""
        from omni_ray.evaluation.judges import levelled, spelt_out

        pcm = (levelled(wave_S, sample_rate_hz) * 32767.0).astype(np.int16).tobytes()
        self._decoder.set_cmn(self._start)
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, no_search=False, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        return () if best is None else spelt_out(best.hypstr)


class CurateSpeech:
    """One sample number -> the stretches of its sound in which both recognisers agree."""

    def __init__(self, path: Path, split: str) -> None:
        from omni_ray.evaluation.judges import OpenJudge

        self.sources = _sources(path, split)
        self.vad, self.aligner = SileroSegmenter(), SphinxAligner()
        self.one, self.other = OpenJudge(), SphinxRecogniser()

    def __call__(self, row: Mapping[str, Any]) -> Rows:
        """Rows {recording, start_s, end_s, words, times_s}, or one with why there is none."""
        source = self.sources[row["source"]]
        try:
            sample = source[int(row["number"])]
            return [
                piece for name, raw in _media(sample, ("audio", "speech")) for piece in self._cut(sample, name, raw)
            ]
        except DataError as error:
            return [{"recording": source.key(int(row["number"])), "why": str(error)}]

    def _cut(self, sample: Sample, name: str, raw: bytes) -> Iterator[dict[str, Any]]:
        key = f"{sample.key}/{name}"
        wave_S = decode_audio(raw, key, RATE_HZ)
        for start_s, end_s in self.vad.segments(wave_S):
            piece_S = wave_S[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)]
            first, second = (judge.hear(piece_S, RATE_HZ) for judge in (self.one, self.other))
            if agreement(first, second) < AGREE:
                yield {"recording": key, "why": f"heard {' '.join(first)!r} and {' '.join(second)!r}"}
                continue
            times = self.aligner.align(piece_S, first)
            if len(times) != len(first):
                yield {"recording": key, "why": f"{' '.join(first)!r} cannot be aligned"}
                continue
            moved = [(word, start_s + a, start_s + b) for word, a, b in times]
            yield {"recording": key, "start_s": start_s, "end_s": end_s, "words": list(first), "times_s": moved}


class CurateFilm:
    """One sample number -> the scenes of its film with the mean colours of each."""

    def __init__(self, path: Path, split: str) -> None:
        self.sources = _sources(path, split)

    def __call__(self, row: Mapping[str, Any]) -> Rows:
        """Rows {recording, start_s, end_s, feature}, or one with why there is none."""
        source = self.sources[row["source"]]
        try:
            sample = source[int(row["number"])]
            return [scene for name, raw in _media(sample, ("video",)) for scene in self._cut(sample, name, raw)]
        except DataError as error:
            return [{"recording": source.key(int(row["number"])), "why": str(error)}]

    def _cut(self, sample: Sample, name: str, raw: bytes) -> Iterator[dict[str, Any]]:
        key = f"{sample.key}/{name}"
        numbers, times_s = plan_frames_at_rate(raw, key, SCENE_FPS)
        frames = frames_at(raw, key, numbers, SCENE_SIZE)
        histograms = colour_histograms(np.stack([frames[number] for number in numbers]))
        starts = scene_starts(histograms)
        for first, after in zip(starts, [*starts[1:], len(numbers)], strict=True):
            end_s = times_s[after] if after < len(times_s) else times_s[-1] + 1 / SCENE_FPS
            feature = histograms[first:after].mean(axis=0)
            yield {"recording": key, "start_s": times_s[first], "end_s": end_s, "feature": feature.tolist()}


def curate(
    kind: str, path: Path, out: Path, *, split: str = "train", limit: int | None = None, workers: int = 1
) -> Any:
    """Curate speech or film.

    Args:
        kind: ``speech`` or ``video``.  path: Samples of any form.  out: Folder for ``KIND.jsonl`` (and the cut sounds).
        workers: Ray Data tasks at a time; 0 runs in this process, to the same result.
    Returns:
        {samples, found, kept, left_out: [{recording, why}]}.
    Raises:
        DataError: no samples, or a recogniser that is not installed.
    """
    make: type = {"speech": CurateSpeech, "video": CurateFilm}[kind]
    numbers = [
        {"source": source.name, "number": number}
        for source in open_places(path, split)
        for number in range(len(source))[:limit]
    ]
    rows = _mapped(make, (path.resolve(), split), numbers, workers)
    found = [row for row in rows if "why" not in row]
    out.mkdir(parents=True, exist_ok=True)
    kept = _finish_speech(found, path, split, out) if kind == "speech" else _finish_film(found)
    _write_lines(out / f"{kind}.jsonl", kept)
    left = [row for row in rows if "why" in row]
    return {"samples": len(numbers), "found": len(found), "kept": len(kept), "left_out": left}


def _mapped(make: Callable[..., Any], arguments: tuple[Any, ...], numbers: Rows, workers: int) -> Rows:
    """Every number's rows, in order."""
    if not workers:
        work = make(*arguments)
        return [piece for row in numbers for piece in work(row)]
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    blocks = min(len(numbers), max(workers, len(numbers) // 8))
    rows = ray.data.from_items(numbers, override_num_blocks=blocks).map(
        _AsText,  # type: ignore[arg-type]  # Ray Data makes one per task
        fn_constructor_args=(make, arguments),
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
    )
    return [piece for row in rows.iter_rows() for piece in json.loads(row["rows"])]


class _AsText:
    """Rows of any form as one column of text, since Ray Data's blocks hold columns of one type."""

    def __init__(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.work = make(*arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        return {"rows": json.dumps(self.work(row))}


def _finish_speech(found: Rows, path: Path, split: str, out: Path) -> Rows:
    """Outliers fall out, neighbours are joined, stretches are cut and written beside their lines."""
    segments = [
        Segment(**{**row, "words": tuple(row["words"]), "times_s": tuple(tuple(t) for t in row["times_s"])})
        for row in found
    ]
    (out / "speech").mkdir(exist_ok=True)
    waves = _Waves(path, split)
    kept = []
    for number, segment in enumerate(joined(ordinary(segments))):
        wave_S = waves.of(segment.recording)
        name = f"speech/{number:06d}.flac"
        piece_S = wave_S[round(segment.start_s * RATE_HZ) : round(segment.end_s * RATE_HZ)]
        (out / name).write_bytes(encode_flac(piece_S, RATE_HZ))
        kept.append({"audio": name, "text": " ".join(segment.words), **asdict(segment)})
    return kept


def _finish_film(found: Rows) -> Rows:
    features = np.array([row["feature"] for row in found]) if found else np.zeros((0, 512))
    groups = clusters(features, CLUSTERS) if found else []
    lines = [{name: value for name, value in row.items() if name != "feature"} for row in found]
    return [line | {"cluster": group} for line, group in zip(lines, groups, strict=True)]


class _Waves:
    """Sounds by ``sample key/member``, the last one kept."""

    def __init__(self, path: Path, split: str) -> None:
        self._sources = _sources(path, split)
        self._places = {s.key(i): (s, i) for s in self._sources.values() for i in range(len(s))}
        self.of = lru_cache(maxsize=1)(self._read)

    def _read(self, recording: str) -> NDArray[np.float32]:
        key, _, name = recording.rpartition("/")
        source, index = self._places[key]
        return decode_audio(source[index].media[name], recording, RATE_HZ)


def _sources(path: Path, split: str) -> dict[str, Any]:
    return {source.name: source for source in open_places(path, split)}


def _media(sample: Sample, kinds: tuple[str, ...]) -> list[tuple[str, bytes]]:
    parts = [part for message in sample.messages for part in message["content"] if isinstance(part, Mapping)]
    names = dict.fromkeys(str(part["media"]) for part in parts if part.get("type") in kinds)
    return [(name, sample.media[name]) for name in names]


def _write_lines(path: Path, rows: Rows) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)
