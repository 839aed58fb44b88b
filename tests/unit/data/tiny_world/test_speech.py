"""Voices: equal arguments give equal sound, speakers differ, splits are apart."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_ray.data.tiny_world.clips import ClipBook, own_phrases, own_says
from omni_ray.data.tiny_world.speech import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICES,
    TRAIN_VOICES,
    Voice,
    load_human_digits,
    speak,
    speak_all,
    trim,
)
from omni_ray.data.tiny_world.words import pairs, phrase
from omni_ray.types.errors import DataError


def test_voices_of_the_splits_are_apart() -> None:
    variants = [{voice.name.split("+")[1] for voice in voices} for voices in (TRAIN_VOICES, HELD_OUT_VOICES)]
    assert not variants[0] & variants[1]
    assert len(variants[0]) >= 60
    assert len(variants[1]) >= 12


def test_what_was_said_before_does_not_matter() -> None:
    first, rate = speak("seven", TRAIN_VOICES[5])
    speak("red nine", TRAIN_VOICES[9])
    again, _ = speak("seven", TRAIN_VOICES[5])
    assert rate == 22050
    assert np.array_equal(first, again)
    assert 0.2 < len(first) / rate < 1.5
    lists = [speak_all(["one", "two"], TRAIN_VOICES[2])[0] for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*lists, strict=True))


def test_every_voice_speaks_and_no_two_are_equal() -> None:
    said = [speak("nine", voice)[0] for voice in TRAIN_VOICES + HELD_OUT_VOICES]
    assert len({wave.tobytes() for wave in said}) == len(said)
    assert min(float(np.abs(wave).max()) for wave in said) > 0.05


def test_the_assistant_has_one_voice_that_a_seed_fixes() -> None:
    first, rate = speak("red seven")
    assert rate == 24000
    assert first.dtype == np.float32
    assert np.array_equal(first, speak("red seven", ASSISTANT_VOICE, seed=0)[0])
    assert not np.array_equal(first, speak("red seven", seed=1)[0])


def test_an_unknown_voice_is_named() -> None:
    with pytest.raises(DataError, match=r"no voice 'en-us\+nobody'"):
        speak("one", Voice(engine="espeak", name="en-us+nobody"))


def test_trim_keeps_the_sound() -> None:
    wave = np.zeros(1000, dtype=np.float32)
    wave[400:600] = 0.5
    assert len(trim(wave, 1000, margin_s=0.01)) == 220
    assert len(trim(np.zeros(10, dtype=np.float32), 1000)) == 10


def test_clips_are_cut_and_level_and_phrases_are_of_training_pairs() -> None:
    clips, held = ClipBook(), {phrase(*pair) for pair in pairs(True)}
    wave = clips.wave(TRAIN_VOICES[0], "seven")
    assert np.abs(wave).max() == pytest.approx(0.6, abs=1e-3)
    assert soundfile.info(io.BytesIO(clips.flac(TRAIN_VOICES[0], "seven"))).frames == len(wave)
    for voice in TRAIN_VOICES:
        assert not held & {*own_phrases(voice), *(words.removeprefix("say ") for words in own_says(voice))}


def test_people_are_split_by_name(tmp_path: Path) -> None:
    _write_people(tmp_path, ["3_anna_0.wav", "five_bert_1.wav", "4_bert_0.wav", "notes.txt"])
    human = load_human_digits(tmp_path, hold_out="bert")
    assert [u.id for u in human.train] == ["3_anna_0"]
    assert [(u.digit, u.take) for u in human.held_out] == [(4, 0), (5, 1)]
    assert human.train[0].rate == 8000
    assert load_human_digits(None).train == ()
    with pytest.raises(DataError, match=r"no speaker 'carl' .* anna, bert"):
        load_human_digits(tmp_path, hold_out="carl")


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    _write_people(tmp_path, ["3_anna_0.wav"], raw=b"RIFFnothing")
    with pytest.raises(DataError, match=r"people.tar:3_anna_0.wav cannot be read as a wav"):
        load_human_digits(tmp_path, hold_out="anna")


def _write_people(root: Path, names: list[str], raw: bytes | None = None) -> None:
    (root / "human-digits").mkdir()
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(2000) / 9).astype(np.float32), 8000, format="WAV")
    with tarfile.open(root / "human-digits" / "people.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = raw or out.getvalue()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
