"""Samples with pictures and clips, asked and answered in writing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from omni_ray.data.image import encode_png
from omni_ray.data.tiny_world import corpus
from omni_ray.data.tiny_world.clips import CLIP_RATE_HZ
from omni_ray.data.tiny_world.pictures import draw_scene, draw_video
from omni_ray.data.tiny_world.words import DIGITS, DIRECTIONS, is_held_out, phrase
from omni_ray.data.tiny_world.world import (
    Album,
    Draft,
    Seen,
    World,
    assistant,
    kinds_by_share,
    part,
    pick,
    text,
    user,
)
from omni_ray.data.video import encode_mp4

VIDEO_FPS = 4
_FRAMES = 8
_PICTURE_SHARES = {"digit": 0.45, "colour": 0.15, "both": 0.25, "caption": 0.15}
_HELD_OUT_PICTURE_SHARES = {"digit": 0.5, "colour": 0.25, "both": 0.25}
_VIDEO_SHARES = {"direction": 0.5, "digit": 0.2, "all": 0.2, "colour": 0.1}
_SCENE_SHARES = {"list": 0.4, "by_colour": 0.3, "by_digit": 0.2, "count": 0.1}
_PLACES = ("first", "second")


def picture_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """One picture and a question about it, or its caption without a question."""
    album = Album(world, rng)
    for question in kinds_by_share(rng, _HELD_OUT_PICTURE_SHARES if world.held_out else _PICTURE_SHARES, count):
        seen = album.picture()
        asked = () if question == "caption" else (text(pick(rng, corpus.QUESTIONS[question])),)
        answer = corpus.answer("both" if question == "caption" else question, seen.colour, seen.digit)
        kind = "image_caption" if question == "caption" else "image_question"
        yield Draft(
            kind=kind,
            messages=(user(part("image", "image.png"), *asked), assistant(answer)),
            media={"image.png": seen.png},
            facts={"task": f"image_{question}", "answer": answer, **seen.facts},
        )


def scene_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Two or three digits side by side in one wide picture."""
    album = Album(world, rng)
    for question in kinds_by_share(rng, _SCENE_SHARES, count):
        things: list[tuple[str, int]] = []
        images = []
        wanted = int(rng.integers(2, 4))
        while len(things) < wanted:
            image, digit, _ = album.glyph()
            colour = album.colour(digit)
            if all(colour != other[0] and digit != other[1] for other in things):
                things.append((colour, digit))
                images.append(image)
        asked, answer = _ask_scene(rng, question, things)
        png = encode_png(draw_scene(rng, images, [colour for colour, _ in things]))
        yield Draft(
            kind="image_scene",
            messages=(user(part("image", "image.png"), text(asked)), assistant(answer)),
            media={"image.png": png},
            facts={"task": f"scene_{question}", "answer": answer},
        )


def _ask_scene(rng: np.random.Generator, question: str, things: list[tuple[str, int]]) -> tuple[str, str]:
    colour, digit = things[int(rng.integers(len(things)))]
    return {
        "list": (pick(rng, corpus.QUESTIONS["both"]), " and ".join(phrase(*thing) for thing in things)),
        "by_colour": (f"which digit is {colour}", DIGITS[digit]),
        "by_digit": (f"which colour is the {DIGITS[digit]}", colour),
        "count": ("how many digits are there", DIGITS[len(things)]),
    }[question]


def dialogue_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """Two pictures, a later question about either: in one message, or over turns of which the last looks back."""
    album = Album(world, rng)
    shares = {"dialogue": 1.0} if world.held_out else {"two_pictures": 0.5, "dialogue": 0.5}
    for kind in kinds_by_share(rng, shares, count):
        first, second = album.picture(), album.picture()
        while second.digit == first.digit or second.colour == first.colour:
            second = album.picture()
        media = {"first.png": first.png, "second.png": second.png}
        make = _two_pictures if kind == "two_pictures" else _looking_back
        messages, answer = make(rng, first, second)
        facts = {"task": f"{kind}_memory", "answer": answer, "glyphs": [first.facts["glyph"], second.facts["glyph"]]}
        yield Draft(kind=kind, messages=messages, media=media, facts=facts)


def _two_pictures(rng: np.random.Generator, first: Seen, second: Seen) -> tuple[tuple[dict[str, Any], ...], str]:
    place = int(rng.integers(2))
    question = pick(rng, ("digit", "colour", "both"))
    answer = corpus.answer(question, (first, second)[place].colour, (first, second)[place].digit)
    asked = text(_about(question, _PLACES[place]))
    return (user(part("image", "first.png"), part("image", "second.png"), asked), assistant(answer)), answer


def _looking_back(rng: np.random.Generator, first: Seen, second: Seen) -> tuple[tuple[dict[str, Any], ...], str]:
    """Both pictures are asked for one thing; the last turn asks the other thing of the first, mostly."""
    early, late = (("colour", "digit"), ("digit", "colour"))[int(rng.random() < 0.35)]
    place = int(rng.random() < 0.3)
    turns: list[dict[str, Any]] = []
    for name, seen in (("first.png", first), ("second.png", second)):
        turns.append(user(part("image", name), text(pick(rng, corpus.QUESTIONS[early]))))
        turns.append(assistant(corpus.answer(early, seen.colour, seen.digit)))
    answer = corpus.answer(late, (first, second)[place].colour, (first, second)[place].digit)
    return (*turns, user(text(_about(late, _PLACES[place]))), assistant(answer)), answer


def _about(question: str, place: str) -> str:
    asked = {"digit": "which digit was", "colour": "which colour was", "both": "what was"}[question]
    return f"{asked} {'in the ' if question == 'both' else ''}{place}{' picture' if question == 'both' else ''}"


def video_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """A clip of one moving digit; the held-out split shows held-out combinations only."""
    album = Album(world, rng)
    for question in kinds_by_share(rng, _VIDEO_SHARES, count):
        pair = world.pairs[int(rng.integers(len(world.pairs)))] if world.held_out else None
        image, digit, facts = album.glyph(None if pair is None else pair[1])
        colour = album.colour(digit) if pair is None else pair[0]
        direction = pick(rng, tuple(DIRECTIONS))
        clip = encode_mp4(draw_video(rng, image, colour, direction, _FRAMES), VIDEO_FPS)
        answer = corpus.answer(question, colour, digit, direction)
        yield Draft(
            kind="video_question",
            messages=(user(part("video", "clip.mp4"), text(pick(rng, corpus.QUESTIONS[question]))), assistant(answer)),
            media={"clip.mp4": clip},
            facts={
                "task": f"video_{question}",
                "answer": answer,
                "combination_held_out": is_held_out(colour, digit, direction),
                **facts,
            },
        )


def audio_visual_samples(world: World, rng: np.random.Generator, count: int) -> Iterator[Draft]:
    """A two-second clip with sound: the digit turns after one second, a word is said in each, one of them is asked."""
    album = Album(world, rng)
    ways = tuple(DIRECTIONS)
    for _ in range(count):
        image, digit, facts = album.glyph()
        colour, speaker = album.colour(digit), world.voices[int(rng.integers(len(world.voices)))]
        directions = [ways[int(i)] for i in rng.permutation(len(ways))[:2]]
        said = [int(i) for i in rng.permutation(len(DIGITS))[:2]]
        frames = [draw_video(rng, image, colour, direction, _FRAMES // 2) for direction in directions]
        sound = np.zeros(2 * CLIP_RATE_HZ, dtype=np.float32)
        for second, word in enumerate(said):
            wave = world.clips.wave(speaker, DIGITS[word])[: round(0.9 * CLIP_RATE_HZ)]
            start = second * CLIP_RATE_HZ + CLIP_RATE_HZ // 20
            sound[start : start + len(wave)] = wave
        place = int(rng.integers(2))
        asked, answer = f"what was said while it moved {directions[place]}", DIGITS[said[place]]
        yield Draft(
            kind="audio_visual",
            messages=(user(part("video", "clip.mp4"), part("audio", "clip.mp4"), text(asked)), assistant(answer)),
            media={"clip.mp4": encode_mp4(np.concatenate(frames), VIDEO_FPS, sound, CLIP_RATE_HZ)},
            facts={"task": "audio_visual", "answer": answer, "voice": speaker.name, **facts},
        )
