"""What judges make of the codec's reconstructions, for 2, 3 and 4 codebooks: words, STOI, PESQ, mel distance."""

from __future__ import annotations

from typing import Any

from omni_ray.models.codec import Codec
from omni_ray.types.errors import DataError
from pipelines.bench.writer import Better, Figure, not_run
from pipelines.components.codec_figures import RATIO_SETS, codec_figures
from pipelines.components.codec_material import held_out_clips

WORDS, GOAL = "codec_word_accuracy_ratio", 0.9
LEVELS = (2, 3, 4)
JUDGED_SETS = RATIO_SETS
"""Sets of every figure here: the assistant's unseen pairs and triples."""
SIGNALS: tuple[tuple[str, str, Better, str], ...] = (
    ("stoi", "STOI", "higher", "1 = equal"),
    ("pesq", "wide-band PESQ", "higher", "1 to 4.6"),
    ("mel_distance", "multi-resolution log mel and magnitude distance", "lower", "0 = equal"),
)
"""Key in the figures, what it is, which way is better, its scale."""


def judged_figures(codec: Codec) -> list[Figure]:
    """Words understood over words understood in the originals, then the signal judges; each by number of codebooks."""
    try:
        held_out = {name: clips for name, clips in held_out_clips(None).items() if name in JUDGED_SETS}
        figures = codec_figures(codec, held_out, codebooks=LEVELS, signals=True)
    except DataError as missing:
        return [not_run(WORDS, str(missing), unit="ratio", better="higher", goal=GOAL)]
    return [_words(figures), *(_signal(figures, *signal) for signal in SIGNALS)]


def _words(figures: dict[str, Any]) -> Figure:
    ratios = figures["codec_word_accuracy_ratio_by_codebooks"]
    value = ratios[str(max(LEVELS))]
    return Figure(
        name=WORDS,
        value=value,
        unit="ratio",
        better="higher",
        goal=GOAL,
        against="words heard in reconstructions over words heard in originals, unseen pairs and triples, grammar judge",
        n=sum(figures[part]["pocketsphinx grammar"]["original"]["words"] for part in JUDGED_SETS),
        runs=(value,),
        extra={"chance": figures["assistant_triples"]["chance"], "by_codebooks": ratios},
    )


def _signal(figures: dict[str, Any], key: str, what: str, better: Better, scale: str) -> Figure:
    """A signal judge's mean over all clips; the value is that of all codebooks."""
    name = f"codec_{key}"
    parts = [(figures[part]["clips"], figures[part][f"{key}_by_codebooks"]) for part in JUDGED_SETS]
    missing = next((by["not_run"] for _, by in parts if "not_run" in by), None)
    if missing is not None:
        return not_run(name, missing, unit="score", better=better)
    clips = sum(count for count, _ in parts)
    means = {str(k): round(sum(count * by[str(k)] for count, by in parts) / clips, 4) for k in LEVELS}
    value = means[str(max(LEVELS))]
    told = f"{what} ({scale}) of {max(LEVELS)} codebooks; by codebooks: " + ", ".join(
        f"{count} {mean:g}" for count, mean in means.items()
    )
    extra = {"by_codebooks": means}
    return Figure(
        name=name, value=value, unit="score", better=better, against=told, n=clips, runs=(value,), extra=extra
    )
