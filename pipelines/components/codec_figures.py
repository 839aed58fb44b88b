"""Figures of a codec: words that independent recognisers hear in reconstructions, beside the originals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from omni_ray.data.tiny_world.words import COLOURS, DIGITS, all_words
from omni_ray.evaluation.judges import Grammar, GrammarJudge, Judge, OpenJudge, WordScore, judge_clips
from omni_ray.evaluation.signals import Wave, pesq, stoi
from omni_ray.models.codec import Codec
from omni_ray.types.errors import DataError
from pipelines.components.codec_losses import FULL_BAND, SpectralLoss
from pipelines.components.codec_material import Clip

PAIR = Grammar(slots=(tuple(COLOURS), DIGITS))
TRIPLE = Grammar(slots=(tuple(COLOURS), DIGITS, ("left", "right", "up", "down")))
DIGIT = Grammar(slots=(DIGITS,))
LOOSE = Grammar(slots=(("a", "i", "is", "it", "say", "see", "hear", "the", *all_words()),), loop=True)
GRAMMARS = {
    "assistant_pairs": PAIR,
    "assistant_carried": LOOSE,
    "assistant_triples": TRIPLE,
    "synthetic_pairs": PAIR,
    "human_digits": DIGIT,
}
"""What the grammar judge may answer for each set of clips."""
RATIO_SETS = ("assistant_pairs", "assistant_triples")
"""Sets of ``codec_word_accuracy_ratio``."""


def codec_figures(
    codec: Codec,
    held_out: dict[str, list[Clip]],
    *,
    open_judge: bool = False,
    codebooks: Sequence[int] = (4,),
    signals: bool = False,
) -> dict[str, Any]:
    """Word accuracy of originals and reconstructions by set, judge and number of codebooks, and the mel distance.

    ``codec_word_accuracy_ratio``, and the same ``_by_codebooks``: grammar judge over the assistant's unseen pairs and
    triples, rebuilt / original. With ``signals`` each set has STOI, PESQ and mel distance by codebooks as well.
    """
    figures: dict[str, Any] = {}
    for name, clips in held_out.items():
        if not clips:
            continue
        made = {count: [rebuilt(codec, clip, count) for clip in clips] for count in codebooks}
        judges: list[Judge] = [GrammarJudge(GRAMMARS[name])]
        if open_judge:
            judges.append(OpenJudge())
        entry: dict[str, Any] = {"clips": len(clips), "chance": round(GRAMMARS[name].chance(), 3)}
        entry["spectral_loss"] = round(spectral_distance(clips, made[max(codebooks)]), 4)
        entry["spectral_loss_by_codebooks"] = {
            str(count): round(spectral_distance(clips, made[count]), 4) for count in codebooks
        }
        if signals:
            entry |= signal_figures(clips, made)
        for judge in judges:
            entry[judge.name] = {"original": _told(_heard(judge, clips, [clip.output_S for clip in clips]))}
            for count in codebooks:
                entry[judge.name][f"codebooks_{count}"] = _told(_heard(judge, clips, made[count]))
        figures[name] = entry
    ratios = {str(count): word_ratio(figures, RATIO_SETS, count) for count in codebooks}
    figures["codec_word_accuracy_ratio"] = ratios[str(max(codebooks))]
    figures["codec_word_accuracy_ratio_by_codebooks"] = ratios
    return figures


def signal_figures(clips: Sequence[Clip], made: Mapping[int, Sequence[torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Means over clips by number of codebooks; a judge that cannot be asked says why under ``not_run``.

    Args:
        made: Number of codebooks -> the clips' reconstructions.
    """
    judges: dict[str, Callable[[Wave, Wave, int], float | None]] = {"stoi": stoi, "pesq": pesq}
    told: dict[str, dict[str, Any]] = {
        "mel_distance_by_codebooks": {str(k): round(spectral_distance(clips, waves), 4) for k, waves in made.items()}
    }
    for name, judge in judges.items():
        by: dict[str, Any] = {}
        try:
            for count, waves in made.items():
                pairs = zip(clips, waves, strict=True)
                scores = [judge(clip.output_S.numpy(), wave_S.numpy(), 24000) for clip, wave_S in pairs]
                known = [score for score in scores if score is not None]
                by[str(count)] = round(sum(known) / len(known), 4) if known else None
        except DataError as missing:
            by = {"not_run": str(missing)}
        told[f"{name}_by_codebooks"] = by
    return told


def rebuilt(codec: Codec, clip: Clip, codebooks: int) -> torch.Tensor:
    """The clip through the codec; 24 kHz."""
    return codec.decode(codec.encode(clip.input_S, codec.config.sample_rate_hz)[:, :codebooks])


def spectral_distance(clips: Sequence[Clip], made: Sequence[torch.Tensor]) -> float:
    """Mean of the training loss of the last stage over whole clips."""
    loss = SpectralLoss(FULL_BAND, 24000)
    values = []
    for clip, wave_S in zip(clips, made, strict=True):
        length = min(len(clip.output_S), len(wave_S))
        values.append(float(loss(wave_S[None, :length], clip.output_S[None, :length])))
    return sum(values) / len(values)


def word_ratio(figures: dict[str, Any], names: Sequence[str], codebooks: int) -> float:
    """Words heard in reconstructions / words heard in originals, by the grammar judge."""
    entries = [figures[name]["pocketsphinx grammar"] for name in names if name in figures]
    original = sum(entry["original"]["heard"] for entry in entries)
    return round(sum(entry[f"codebooks_{codebooks}"]["heard"] for entry in entries) / max(1, original), 4)


def _heard(judge: Judge, clips: Sequence[Clip], waves: Sequence[torch.Tensor]) -> WordScore:
    return judge_clips(judge, [(wave_S.numpy(), 24000) for wave_S in waves], [clip.words for clip in clips])


def _told(score: WordScore) -> dict[str, Any]:
    return {
        "words": score.words,
        "heard": score.heard,
        "word_accuracy": round(score.accuracy, 4),
        "exact": round(score.exact_share, 4),
    }
