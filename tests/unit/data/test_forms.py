"""What a recipe makes of sounds with words and films with sound; chance that every process shares."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from omni_ray.config.training import SourceConfig
from omni_ray.data.forms import CHANCE_FORMS, DEFAULT_PROMPTS, FormName, chance_of, shaped
from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

SAID = {"role": "user", "content": [{"type": "audio", "media": "a.wav"}]}
WORDS = {"role": "assistant", "content": [{"type": "text", "text": " red seven"}]}
PAIR = Sample(key="k", kind="caption", messages=(SAID, WORDS), media={"a.wav": b""})


def test_names_are_those_of_the_recipe() -> None:
    assert get_args(SourceConfig.model_fields["form"].annotation) == get_args(FormName)
    assert set(get_args(FormName)) >= CHANCE_FORMS


def test_dictation_and_reading_aloud() -> None:
    asr = shaped(PAIR, "asr", 3, ["write it"])
    assert asr.messages == (
        {"role": "user", "content": [{"type": "speech", "media": "a.wav"}, {"type": "text", "text": "write it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red seven"}]},
    )
    tts = shaped(PAIR, "tts", 3, ["say "])
    spoken: dict[str, Any] = {"type": "speech", "media": "a.wav", "text": "red seven"}
    assert tts.messages == (
        {"role": "user", "content": [{"type": "text", "text": "say red seven"}]},
        {"role": "voice", "content": [spoken]},
    )
    heard = shaped(PAIR, "understand", 3, ["what is it"])
    assert heard.messages[0]["content"] == [
        {"type": "text", "text": "what is it"},
        {"type": "audio", "media": "a.wav"},
    ], "task prompt, then speech (Stage 5)"


def test_chance_differs_by_pass_and_is_shared_by_processes() -> None:
    forms = [shaped(PAIR, "asr_tts", chance_of(0, "pairs", 5, turn)).kind for turn in range(40)]
    assert 8 < forms.count("asr") < 32
    assert forms == [shaped(PAIR, "asr_tts", chance_of(0, "pairs", 5, turn)).kind for turn in range(40)]
    asked = {shaped(PAIR, "asr", chance_of(0, "pairs", n, 0)).messages[0]["content"][1]["text"] for n in range(40)}
    assert asked == set(DEFAULT_PROMPTS["asr"])
    assert len({chance_of(s, n, i, t) for s in (0, 1) for n in "ab" for i in (0, 1) for t in (0, 1)}) == 16


def test_film_and_sound_are_joined() -> None:
    content = [{"type": "video", "media": "c.mp4"}, {"type": "audio", "media": "c.mp4"}, {"type": "text", "text": "x"}]
    sample = Sample(key="k", kind="audio_visual", messages=({"role": "user", "content": content}, WORDS))
    joined = shaped(sample, "chunked", 0)
    assert joined.messages[0]["content"] == [{"type": "audio_visual", "media": "c.mp4", "sound": "c.mp4"}, content[2]]
    assert joined.messages[1]["content"] == WORDS["content"]
    assert shaped(sample, "as_is", 0) is sample


def test_sounds_with_words_interleave() -> None:
    parts = [{"type": "speech", "media": f"{n}.wav", "text": f"word {n}"} for n in range(3)]
    sample = Sample(key="k", kind="x", messages=({"role": "voice", "content": parts},))
    made = shaped(sample, "interleave", 0)
    assert made.kind == "interleave"
    assert [f["text"] for f in made.messages[0]["content"][0]["fragments"]] == ["word 0", "word 1", "word 2"]


def test_samples_without_what_a_form_needs_are_refused() -> None:
    silent = Sample(key="k", kind="x", messages=(WORDS,))
    for form in ("asr", "tts", "understand"):
        with pytest.raises(
            DataError, match="sample k has no sound with words beside it or in an answer; use form as_is"
        ):
            shaped(silent, form, 0)
    with pytest.raises(DataError, match="sample k has no sounds with their words to interleave"):
        shaped(silent, "interleave", 0)
    with pytest.raises(DataError, match="asr_tts asks in two ways"):
        shaped(PAIR, "asr_tts", 0, ["say "])
    with pytest.raises(DataError, match="there is no form 'asrr'; forms are as_is, asr"):
        shaped(PAIR, "asrr", 0)
