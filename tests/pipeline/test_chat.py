"""Asking a checkpoint: every medium, a spoken answer, a conversation, and refusals in one sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from held_out_world import flac, png

from omni_ray.data.video import encode_mp4
from omni_ray.types.errors import CheckpointError, DataError, MediaError, RequestError
from pipelines.chat import chat, converse


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    (folder / "digit.png").write_bytes(png(rng))
    (folder / "question.flac").write_bytes(flac(rng))
    (folder / "clip.mp4").write_bytes(encode_mp4(rng.integers(0, 255, (8, 56, 56, 3), dtype=np.uint8), 4))
    (folder / "broken.png").write_bytes((folder / "digit.png").read_bytes()[:400])
    (folder / "notes.txt").write_text("no medium")
    (folder / "empty.wav").write_bytes(b"")
    return folder


def test_every_medium_changes_the_answer_and_equal_questions_do_not(tiny_checkpoint: Path, media: Path) -> None:
    files = {"image": media / "digit.png", "audio": media / "question.flac", "video": media / "clip.mp4"}
    said = {kind: chat(tiny_checkpoint, text="which", max_tokens=8, **{kind: path}) for kind, path in files.items()}
    said["words"] = chat(tiny_checkpoint, text="which", max_tokens=8)
    assert len(set(said.values())) == len(said)
    assert chat(tiny_checkpoint, text="which", image=files["image"], max_tokens=8) == said["image"]


def test_draws_follow_the_seed(tiny_checkpoint: Path) -> None:
    drawn = [chat(tiny_checkpoint, text="which", max_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_spoken_answer_is_a_wav_of_60_ms_a_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    chat(tiny_checkpoint, text="say blue two", speak=tmp_path / "answer.wav", max_tokens=6)
    info = soundfile.info(tmp_path / "answer.wav")
    assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
    assert info.frames % 1440 == 0
    assert 0 < info.frames <= 6 * 1440


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        ("image", "missing.png", "missing.png cannot be read"),
        ("image", "notes.txt", "notes.txt is not a picture"),
        ("image", "broken.png", "broken.png cannot be decoded"),
        ("audio", "notes.txt", "notes.txt cannot be decoded as sound"),
        ("audio", "empty.wav", "empty.wav is empty"),
        ("video", "notes.txt", "notes.txt cannot be read as video"),
    ],
)
def test_refuses_media_by_name(tiny_checkpoint: Path, media: Path, kind: str, name: str, error: str) -> None:
    with pytest.raises(MediaError, match=error) as raised:
        chat(tiny_checkpoint, **{kind: media / name})
    assert "\n" not in str(raised.value)


def test_refuses_an_empty_question_and_what_is_no_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing was asked"):
        chat(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        chat(tmp_path, text="which")


def test_a_wav_that_cannot_be_written_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        chat(tiny_checkpoint, text="say blue two", speak=tmp_path / "no" / "a.wav", max_tokens=6)


def scripted(lines: list[str]) -> Callable[[str], str]:
    waiting = io.StringIO("\n".join(lines) + "\n")

    def read(_prompt: str) -> str:
        line = waiting.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read


def test_a_conversation_remembers_and_survives_mistakes(tiny_checkpoint: Path, media: Path) -> None:
    shown: list[str] = []
    lines = [f"/image {media / 'digit.png'}", "which", "/image nowhere.png", "/dance", "", "which", "/new", "which"]
    converse(tiny_checkpoint, read=scripted(lines), write=shown.append, max_tokens=8)
    answers = [line for line in shown if line.startswith("model:")]
    assert len(answers) == 3
    assert answers[0] == f"model: {chat(tiny_checkpoint, text='which', image=media / 'digit.png', max_tokens=8)}"
    assert answers[2] == f"model: {chat(tiny_checkpoint, text='which', max_tokens=8)}"
    assert any("nowhere.png cannot be read" in line for line in shown)
    assert any("there is no command '/dance'" in line for line in shown)
