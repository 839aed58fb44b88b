"""Held-out figures: shares with their chance and a Wilson interval, and what they must reach.

A figure is reached when its value meets the goal and its lower bound lies above chance: a small sample that got lucky
does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_ray.types.errors import ConfigError

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One row of the held-out targets."""

    name: str
    """Name of the figure."""
    chance: float
    """What guessing gets."""
    first: float | None
    """The least that the first whole path must reach; None: only reported."""
    task: str
    """What is asked of what, in words."""


TARGETS: tuple[Target, ...] = (
    Target(name="image_digit_accuracy", chance=0.10, first=0.80, task="picture → digit, unseen writers or pictures"),
    Target(name="image_colour_accuracy", chance=1 / 6, first=0.95, task="picture → colour"),
    Target(name="video_direction_accuracy", chance=0.25, first=0.80, task="video → direction"),
    Target(name="audio_human_accuracy", chance=0.10, first=0.55, task="spoken digit, unseen person"),
    Target(name="audio_synthetic_accuracy", chance=0.10, first=0.90, task="spoken digit, unseen synthetic voice"),
    Target(
        name="cross_modal_accuracy", chance=1 / 60, first=0.60, task="spoken question about a picture, both words right"
    ),
    Target(name="text_accuracy", chance=1 / 4, first=0.95, task="text question, unseen combination"),
    Target(
        name="codec_word_accuracy_ratio",
        chance=1 / 6,
        first=0.80,
        task="codec, unseen phrases: words over the original's",
    ),
    Target(
        name="spoken_answer_word_accuracy", chance=1 / 6, first=0.50, task="spoken answer, unseen combination, per word"
    ),
    Target(name="spoken_answer_exact", chance=1 / 60, first=None, task="spoken answer, unseen combination, all words"),
    Target(
        name="dialogue_memory_accuracy",
        chance=1 / 6,
        first=None,
        task="later question about an earlier of two pictures",
    ),
)
"""Held-out targets in the order of reports. Where kinds of questions mix, chance is that of the easiest kind."""


def target(name: str) -> Target:
    """The row of a name.

    Raises:
        ConfigError: there is none.
    """
    for row in TARGETS:
        if row.name == name:
            return row
    raise ConfigError(f"there is no held-out target {name!r}; there are {', '.join(row.name for row in TARGETS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutFigure:
    """One measured share."""

    name: str
    """Name of the figure."""
    value: float | None
    """The share; None where it was left out."""
    n: int
    """Samples behind it (words, for word accuracies)."""
    low: float = 0.0
    """Lower end of the 95 % interval."""
    high: float = 1.0
    """Upper end."""
    chance: float = 0.0
    """What guessing gets."""
    goal: float | None = None
    """The least that counts; None: only reported."""
    task: str = ""
    """What is asked of what."""
    left_out: str = ""
    """Why there is no value."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further facts: who judged, per-slot shares."""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is met and the lower bound lies above chance; None without a goal or a value."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal and self.low > self.chance


def share(
    name: str,
    right: int,
    n: int,
    *,
    chance: float | None = None,
    scale: float = 1.0,
    task: str = "",
    left_out: str = "there are no held-out samples",
    **extra: Any,
) -> HeldOutFigure:
    """A figure of ``right`` among ``n``; goal and chance come from :data:`TARGETS` where the name is there.

    Args:
        scale: Multiplies value and interval: 1 / the original's share, for a ratio of two shares on the same clips.
        left_out: Why there is nothing, should ``n`` be 0.
    """
    row = next((row for row in TARGETS if row.name == name), None)
    known: dict[str, Any] = {
        "chance": chance if chance is not None else (row.chance if row else 0.0),
        "goal": row.first if row else None,
        "task": task or (row.task if row else ""),
    }
    if n == 0:
        return HeldOutFigure(name=name, value=None, n=0, left_out=left_out, extra=extra, **known)
    low, high = wilson(right, n)
    return HeldOutFigure(
        name=name, value=right / n * scale, n=n, low=low * scale, high=high * scale, extra=extra, **known
    )


def wilson(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not 0 <= right <= n or n < 1:
        raise ConfigError(f"{right} right among {n} is no share; count right answers among at least one")
    p = right / n
    middle = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    bottom = 1 + z * z / n
    return max(0.0, (middle - reach) / bottom), min(1.0, (middle + reach) / bottom)


def same_words(answer: str, expected: str) -> bool:
    """Whether an answer is the expected words in order; case, punctuation and space do not count."""
    return plain_words(answer) == plain_words(expected)


def plain_words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation."""
    return tuple("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


def slots_right(expected: Sequence[str], heard: Sequence[str]) -> tuple[bool, ...]:
    """For each place of the expected words: whether that word was heard at that place."""
    return tuple(place < len(heard) and heard[place] == word for place, word in enumerate(expected))
