"""Training speech as one file that every worker maps: the tiny world's, or a folder of own recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from omni_ray.config.speech_training import SpeechDataConfig
from omni_ray.data.audio import decode_audio
from omni_ray.types.errors import DataError, MediaError
from pipelines.components.codec_material import INPUT_RATE_HZ, OUTPUT_RATE_HZ, Clip, held_out_clips, training_clips
from pipelines.components.speech.state_file import load_state, save_state

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
LONGEST_FILE_S = 1800.0
Log = Callable[[str], None]


def gather_material(
    config: SpeechDataConfig, real_data: Path | None, *, seed: int, log: Log
) -> tuple[list[Clip], list[Clip]]:
    """Clips to train on, and clips for the report that training never sees.

    Raises:
        DataError: no recording can be used, or a package that makes the tiny world's voices is missing.
    """
    if config.folder is None:
        held_out = held_out_clips(real_data, hold_out=config.hold_out)
        return (
            training_clips(real_data, seed=seed, hold_out=config.hold_out),
            [*held_out["assistant_pairs"], *held_out["synthetic_pairs"], *held_out["human_digits"]],
        )
    train: list[Clip] = []
    kept: list[Clip] = []
    bad = 0
    for number, path in enumerate(_sounds(config.folder)):
        try:
            clips = list(_own_clips(path, config))
        except MediaError as problem:
            bad += 1
            log(f"left out: {problem}")
            continue
        (kept if number % config.held_out_every == config.held_out_every - 1 else train).extend(clips)
    if not train:
        raise DataError(
            f"{config.folder} has no recording that can be used ({bad} could not be read); "
            f"put files ending in {', '.join(SOUNDS)} below it"
        )
    return train, kept


def _sounds(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"data.folder {str(folder)!r} is no folder; name one that holds recordings")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SOUNDS)


def _own_clips(path: Path, config: SpeechDataConfig) -> Iterator[Clip]:
    raw, name = path.read_bytes(), path.relative_to(config.folder or path.parent).as_posix()
    at_16 = torch.from_numpy(decode_audio(raw, name, INPUT_RATE_HZ, longest_s=LONGEST_FILE_S))
    at_24 = torch.from_numpy(decode_audio(raw, name, OUTPUT_RATE_HZ, longest_s=LONGEST_FILE_S))
    words = path.with_suffix(".txt")
    said = tuple(words.read_text(encoding="utf-8").lower().split()) if words.is_file() else ()
    seconds = config.longest_s
    pieces = max(1, -(-len(at_16) // round(seconds * INPUT_RATE_HZ)))
    for piece in range(pieces):
        cut_16, cut_24 = (
            wave_S[round(piece * seconds * rate) : round((piece + 1) * seconds * rate)].clamp(-1.0, 1.0)
            for wave_S, rate in ((at_16, INPUT_RATE_HZ), (at_24, OUTPUT_RATE_HZ))
        )
        yield Clip(
            id=name if pieces == 1 else f"{name}#{piece}",
            kind="own",
            source=path.parent.name,
            words=said if pieces == 1 else (),
            input_S=cut_16,
            output_S=cut_24,
        )


def save_material(path: Path, train: Sequence[Clip], held_out: Sequence[Clip]) -> None:
    """One file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    sides = {"train": train, "held_out": held_out}
    save_state(aside, {name: [asdict(clip) for clip in clips] for name, clips in sides.items()})
    aside.replace(path)


def load_material(path: Path) -> tuple[list[Clip], list[Clip]]:
    """Both sides; sounds are mapped, so that workers of one machine share their memory."""
    stored = load_state(path)
    train, held_out = ([Clip(**fields) for fields in stored[name]] for name in ("train", "held_out"))
    return train, held_out
