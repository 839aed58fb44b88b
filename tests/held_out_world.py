"""A few held-out samples of every task, written as the tiny world writes them, without its voices."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_ray.data.audio import encode_flac
from omni_ray.data.image import encode_png
from omni_ray.data.tiny_world.words import COLOURS, DIGITS, pairs, phrase
from omni_ray.data.video import encode_mp4

RATE_HZ = 16000
COUNT = 6
"""Samples of most tasks."""

Made = tuple[str, list[Any], dict[str, bytes], dict[str, Any]]
"""(kind, messages, media, facts)."""


def write_held_out(root: Path, *, people: bool = True, mnist: bool = True) -> None:
    """Write ``root/SOURCE/held_out-00000.tar`` for every task of the held-out figures."""
    rng = np.random.default_rng(3)
    origins = ("mnist", "sklearn") if mnist else ("sklearn",)
    write_samples(root / "picture", [_picture(rng, i, origins) for i in range(4 * COUNT)])
    write_samples(root / "video", [_video(rng, i) for i in range(COUNT)])
    heard = ["audio_synthetic"] + (["audio_human"] if people else [])
    for task in heard:
        write_samples(root / task, [_heard(rng, task, i) for i in range(COUNT)])
    write_samples(root / "cross_modal", [_cross_modal(rng, i) for i in range(3 * COUNT)])
    write_samples(root / "text", [_text(i) for i in range(COUNT)])
    write_samples(
        root / "speech_text",
        [_phrase(rng, *pair) for pair in pairs(True)] + [_spoken(rng, *pair) for pair in pairs(True)],
    )
    write_samples(root / "dialogue", [_dialogue(rng, i) for i in range(COUNT)])
    if not (root / "manifest.json").is_file():
        (root / "manifest.json").write_text("{}")


def write_samples(folder: Path, samples: Sequence[Made]) -> None:
    """One held-out shard."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "held_out-00000.tar", "w") as tar:
        for number, (kind, messages, media, facts) in enumerate(samples):
            record = json.dumps({"kind": kind, "messages": messages, "facts": facts}).encode()
            for name, raw in {"json": record, **media}.items():
                member = tarfile.TarInfo(f"{folder.name}-{number:04d}.{name}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))


def words(text: str) -> dict[str, str]:
    """A text part."""
    return {"type": "text", "text": text}


def turn(role: str, *parts: Mapping[str, str]) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": list(parts)}


def png(rng: np.random.Generator) -> bytes:
    """A picture of noise."""
    return encode_png(rng.integers(0, 255, (56, 56, 3), dtype=np.uint8))


def flac(rng: np.random.Generator) -> bytes:
    """Half a second of noise."""
    return encode_flac((rng.standard_normal(RATE_HZ // 2) * 0.1).astype(np.float32), RATE_HZ)


def _pair(i: int) -> tuple[str, int]:
    return pairs(True)[i % len(pairs(True))]


def _picture(rng: np.random.Generator, i: int, origins: Sequence[str]) -> Made:
    colour, digit = _pair(i)
    task = ("image_digit", "image_digit", "image_colour", "image_both")[i % 4]
    answer = {"image_digit": DIGITS[digit], "image_colour": colour, "image_both": phrase(colour, digit)}[task]
    asked = turn("user", {"type": "image", "media": "image.png"}, words("what is it"))
    # Tasks go round by four, so that every task has pictures of every origin.
    facts = {"task": task, "answer": answer, "writers": origins[i // 4 % len(origins)]}
    return "image_question", [asked, turn("assistant", words(answer))], {"image.png": png(rng)}, facts


def _video(rng: np.random.Generator, i: int) -> Made:
    answer = ("left", "right", "up", "down")[i % 4]
    clip = encode_mp4(rng.integers(0, 255, (8, 56, 56, 3), dtype=np.uint8), 4)
    asked = turn("user", {"type": "video", "media": "clip.mp4"}, words("which way does it move"))
    facts = {"task": "video_direction", "answer": answer}
    return "video_question", [asked, turn("assistant", words(answer))], {"clip.mp4": clip}, facts


def _heard(rng: np.random.Generator, task: str, i: int) -> Made:
    answer = DIGITS[i % 10]
    asked = turn("user", {"type": "audio", "media": "heard.flac"}, words("what do you hear"))
    return task, [asked, turn("assistant", words(answer))], {"heard.flac": flac(rng)}, {"task": task, "answer": answer}


def _cross_modal(rng: np.random.Generator, i: int) -> Made:
    colour, digit = _pair(i)
    question = ("both", "digit", "colour")[i % 3]
    answer = {"both": phrase(colour, digit), "digit": DIGITS[digit], "colour": colour}[question]
    asked = turn("user", {"type": "image", "media": "image.png"}, {"type": "audio", "media": "question.flac"})
    media = {"image.png": png(rng), "question.flac": flac(rng)}
    facts = {"task": f"cross_modal_{question}", "answer": answer, "voice": "nobody"}
    return "cross_modal", [asked, turn("assistant", words(answer))], media, facts


def _text(i: int) -> Made:
    colour, digit = _pair(i)
    asked = turn("user", words(f"a {colour} {DIGITS[digit]}\nwhich colour is it"))
    return "text_question", [asked, turn("assistant", words(colour))], {}, {"task": "text", "answer": colour}


def _phrase(rng: np.random.Generator, colour: str, digit: int) -> Made:
    answer = phrase(colour, digit)
    asked = turn("user", {"type": "speech", "media": "heard.flac"}, words("what do you hear"))
    facts = {"task": "codec_phrase", "answer": answer}
    return "speech_hear", [asked, turn("assistant", words(answer))], {"heard.flac": flac(rng)}, facts


def _spoken(rng: np.random.Generator, colour: str, digit: int) -> Made:
    answer = phrase(colour, digit)
    said = turn("voice", {"type": "speech", "media": "answer.flac", "text": answer})
    facts = {"task": "spoken_answer", "answer": answer, "aloud": True}
    return "speech_say", [turn("user", words(f"say {answer}")), said], {"answer.flac": flac(rng)}, facts


def _dialogue(rng: np.random.Generator, i: int) -> Made:
    colour, other = sorted(COLOURS)[i % 6], sorted(COLOURS)[(i + 1) % 6]
    turns = []
    for name, answer in (("first.png", colour), ("second.png", other)):
        turns.append(turn("user", {"type": "image", "media": name}, words("which colour is it")))
        turns.append(turn("assistant", words(answer)))
    turns += [turn("user", words("which digit was first")), turn("assistant", words("seven"))]
    media = {"first.png": png(rng), "second.png": png(rng)}
    return "dialogue", turns, media, {"task": "dialogue_memory", "answer": "seven"}
