"""Text to speech through the language model over the codec's own ceiling, on phrases that training never held.

Both sides say the same unseen pairs of words, and the same recognisers hear them: the model asked in every wording of
"say ...", and the assistant's own recording of the phrase through the codec and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omni_ray.types.errors import DataError, OmniError
from pipelines.bench.writer import Figure, not_run

NAME, GOAL = "tts_over_codec_ceiling", 0.8
DEFAULT = Path("runs/quickstart/checkpoint")
"""What ``make quickstart`` leaves; used where no checkpoint is named."""
SPEECH_TOKENS = 48
Sound = tuple[NDArray[np.float32], int]


def tts_figures(checkpoint: Path | None) -> list[Figure]:
    """The ratio by the grammar judge (the goal's), and by the open-vocabulary one where it is installed.

    Args:
        checkpoint: A trained checkpoint; None: the quickstart's, where there is one.
    """
    folder = checkpoint or DEFAULT
    if checkpoint is None and not folder.is_dir():
        why = f"no trained checkpoint at {DEFAULT}; run omni-ray quickstart, or name one with --checkpoint"
        return [not_run(NAME, why, unit="ratio", better="higher", goal=GOAL)]
    from omni_ray.evaluation.judges import GrammarJudge, OpenJudge
    from omni_ray.evaluation.spoken import PHRASE, SLOT_CHANCE

    try:
        judges = [(NAME, GOAL, GrammarJudge(PHRASE))]
    except DataError as missing:
        return [not_run(NAME, str(missing), unit="ratio", better="higher", goal=GOAL)]
    spoken, ceiling, said = both_sides(folder)
    figures = [_ratio(*judges[0], spoken, ceiling, said, chance=SLOT_CHANCE)]
    try:
        figures.append(_ratio(f"{NAME}_open", None, OpenJudge(), spoken, ceiling, said, chance=0.0))
    except DataError as missing:
        figures.append(not_run(f"{NAME}_open", str(missing), unit="ratio", better="higher"))
    return figures


def both_sides(folder: Path) -> tuple[list[Sound], list[Sound], list[tuple[str, ...]]]:
    """What the model says, what the codec makes of the assistant's recording, and the words, in one order."""
    from omni_ray.data.tiny_world.corpus import SAY
    from omni_ray.inference.omni_model import load_model
    from omni_ray.inference.prompt import Conversation
    from pipelines.components.codec_material import held_out_clips

    model = load_model(folder)
    clips = held_out_clips(None)["assistant_pairs"]
    rate_hz = model.config.codec.output_rate_hz
    asked = [(clip, wording.format(" ".join(clip.words))) for wording in SAY for clip in clips]
    talks = [Conversation(messages=({"role": "user", "content": text},), media={}) for _, text in asked]
    answers = model.generate(talks, voice=True, max_tokens=SPEECH_TOKENS)
    rebuilt = {
        clip.id: model.codec.decode(model.codec.encode(clip.input_S, model.config.codec.sample_rate_hz)).numpy()
        for clip in clips
    }
    nothing = np.zeros(0, dtype=np.float32)
    spoken = [(nothing if answer.wave_S is None else answer.wave_S, rate_hz) for answer in answers]
    return spoken, [(rebuilt[clip.id], rate_hz) for clip, _ in asked], [clip.words for clip, _ in asked]


def _ratio(
    name: str,
    goal: float | None,
    judge: object,
    spoken: Sequence[Sound],
    ceiling: Sequence[Sound],
    said: Sequence[Sequence[str]],
    *,
    chance: float,
) -> Figure:
    right, most = (_heard(judge, side, said) for side in (spoken, ceiling))
    words = sum(map(len, said))
    if not most:
        raise OmniError(f"the judge of {name} hears no word through the codec; there is no ceiling to stand under")
    told = f"{right} of {words} words heard in the model's speech over {most} in the codec's, unseen pairs"
    return Figure(
        name=name,
        value=right / most,
        unit="ratio",
        better="higher",
        goal=goal,
        against=f"{told}, {getattr(judge, 'name', judge)}",
        n=words,
        runs=(right / most,),
        # Greedy speech of one phrase is often the same sound for every wording; these many are really different.
        extra={"chance": chance, "model_words": right, "codec_words": most, "distinct_sounds": _distinct(spoken)},
    )


def _distinct(clips: Sequence[Sound]) -> int:
    return len({wave_S.tobytes() for wave_S, _ in clips})


def _heard(judge: object, clips: Sequence[Sound], said: Sequence[Sequence[str]]) -> int:
    from omni_ray.evaluation.judges import words_right

    # The same recording stands in the ceiling once a wording; a judge need hear it once.
    known: dict[bytes, tuple[str, ...]] = {}
    right = 0
    for (wave_S, rate_hz), words in zip(clips, said, strict=True):
        key = wave_S.tobytes()
        if key not in known:
            known[key] = judge.hear(wave_S, rate_hz) if wave_S.size else ()  # type: ignore[attr-defined]
        right += words_right(words, known[key])
    return right
