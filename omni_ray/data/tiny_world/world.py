"""What a maker of samples draws from: one split's digits, people, voices and combinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omni_ray.data.image import encode_png
from omni_ray.data.tiny_world.clips import ClipBook
from omni_ray.data.tiny_world.pictures import GlyphSet, draw_picture
from omni_ray.data.tiny_world.speech import Utterance, Voice
from omni_ray.data.tiny_world.words import COLOURS, is_held_out, pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample before it has a key."""

    kind: str
    """Task name for mixtures and statistics."""
    messages: tuple[Mapping[str, Any], ...]
    """The conversation."""
    media: Mapping[str, bytes] = field(default_factory=dict)
    """Encoded bytes by member name."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Task of the evaluation, answer, and where the media come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One split."""

    held_out: bool
    """Whether this is the split that training never sees."""
    glyph_sets: Mapping[str, GlyphSet]
    """Handwritten digits by origin (``train``; or ``sklearn`` and ``mnist``); none is empty."""
    people: tuple[Utterance, ...]
    """Human recordings of this split's speakers; empty without the real-data folder."""
    voices: tuple[Voice, ...]
    """Synthetic speakers of this split."""
    clips: ClipBook
    """Spoken clips, shared by both splits."""

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """Colour-digit pairs of this split."""
        return pairs(self.held_out)


Maker = Callable[[World, np.random.Generator, int], Iterator[Draft]]
"""Makes so many samples of one source for one split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One painted digit."""

    png: bytes
    """The picture."""
    colour: str
    """Its colour."""
    digit: int
    """Its digit."""
    facts: Mapping[str, Any]
    """glyph, writers, pair_held_out."""


class Album:
    """Paints digits: goes through the handwritten ones in shuffled rounds, so that each is used equally often."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world, self._rng = world, rng
        self._turn = 0
        self._rounds: dict[str, list[int]] = {name: [] for name in world.glyph_sets}

    def glyph(self, digit: int | None = None) -> tuple[NDArray[np.uint8], int, dict[str, Any]]:
        """(picture, digit, facts) of the next handwritten digit, of any or of one digit; origins take turns."""
        names = sorted(self._world.glyph_sets)
        name = names[self._turn % len(names)]
        self._turn += 1
        glyphs = self._world.glyph_sets[name]
        if digit is not None:
            place = int(self._rng.choice(glyphs.of_digit(digit)))
        else:
            if not self._rounds[name]:
                self._rounds[name] = [int(i) for i in self._rng.permutation(len(glyphs))]
            place = self._rounds[name].pop()
        facts = {"glyph": glyphs.ids[place], "writers": glyphs.ids[place].split("-")[0]}
        return glyphs.images[place], int(glyphs.labels[place]), facts

    def colour(self, digit: int) -> str:
        """A colour for a digit: in training only of training pairs, else any."""
        allowed = [c for c in COLOURS if self._world.held_out or not is_held_out(c, digit)]
        return allowed[int(self._rng.integers(len(allowed)))]

    def picture(self, pair: tuple[str, int] | None = None) -> Seen:
        """The next picture, of any pair of the split or of one."""
        image, digit, facts = self.glyph(None if pair is None else pair[1])
        colour = self.colour(digit) if pair is None else pair[0]
        png = encode_png(draw_picture(self._rng, image, colour))
        return Seen(png=png, colour=colour, digit=digit, facts={**facts, "pair_held_out": is_held_out(colour, digit)})


def text(words: str) -> dict[str, str]:
    """A text part."""
    return {"type": "text", "text": words}


def as_audio(words: str) -> dict[str, str]:
    """Text in the place of a sound."""
    return {"type": "text", "text": words, "as": "audio"}


def part(kind: str, media: str, **more: str) -> dict[str, str]:
    """A media part."""
    return {"type": kind, "media": media, **more}


def user(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the user sends."""
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict[str, Any]:
    """A written answer."""
    return {"role": "assistant", "content": [text(words)]}


def voice(words: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A spoken answer, each word a segment of its own: (message, word by member name ``{name}-{place}.flac``).

    A small model that speaks a phrase as one segment learns the sound of each pair of words as a whole; a segment a
    word ties every sound to the text beside it (networks.md section 3.1, segments joined by a pause).
    """
    said = {f"{name}-{place}.flac": word for place, word in enumerate(words.split())}
    parts = [
        part("speech", media, text=word if place == 0 else f" {word}")
        for place, (media, word) in enumerate(said.items())
    ]
    return {"role": "voice", "content": parts}, said


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of several."""
    return options[int(rng.integers(len(options)))]


def kinds_by_share(rng: np.random.Generator, shares: Mapping[str, float], count: int) -> list[str]:
    """``count`` names in these shares (met exactly but for rounding), shuffled."""
    names, total = list(shares), sum(shares.values())
    edges = np.round(np.cumsum([shares[name] / total for name in names]) * count).astype(int)
    listed = [names[int(np.searchsorted(edges, i, side="right"))] for i in range(count)]
    return [listed[int(i)] for i in rng.permutation(count)]
