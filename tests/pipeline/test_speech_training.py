"""The codec's stages on Ray Train: own recordings in, a codec and a page out; a lost worker changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
from speech_workers import short_recipe, tones

from omni_ray.models.codec import Codec
from omni_ray.types.errors import CheckpointError, ConfigError, DataError
from pipelines.components.speech.driver import SpeechRun, stages_named, train_speech
from pipelines.components.speech.group import Alone
from pipelines.components.speech.material import load_material
from pipelines.components.speech.stages import StageRun, run_stage


def recordings(folder: Path) -> Path:
    """Tones of two speakers, their words beside them, every third file kept for the report; one file is broken."""
    for number, clip in enumerate(tones(6)):
        (folder / clip.source).mkdir(parents=True, exist_ok=True)
        path = folder / clip.source / f"{number}.wav"
        soundfile.write(path, clip.output_S.numpy(), 24000)
        path.with_suffix(".txt").write_text("one\n")
    (folder / "voice-0" / "broken.wav").write_bytes(b"no sound")
    return folder


def asked(tmp_path: Path, stage: str, **further: object) -> SpeechRun:
    data = {"folder": str(recordings(tmp_path / "own")), "held_out_every": 3}
    run = {"recipe": short_recipe(data=data, samples=1), "out": tmp_path / "run", "workers": 1}
    return SpeechRun(stages=stages_named(stage), **(run | further))  # type: ignore[arg-type]


def start_codec(folder: Path) -> Path:
    from pipelines.components.speech.stages import new_codec

    new_codec(short_recipe()).save_pretrained(folder, dtype=torch.float32)
    return folder


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train copies settings of Ray Data that Ray deprecates
def test_a_lost_worker_of_two_changes_no_bit(tmp_path: Path) -> None:
    lines: list[str] = []
    run = asked(tmp_path, "2", workers=2, start=start_codec(tmp_path / "start"))
    document = train_speech(run, lines.append, fail_at=("polish", 3))
    clips, held_out = load_material(run.out / "material.safetensors")
    assert {clip.id for clip in held_out} == {"voice-0/4.wav", "voice-1/3.wav"}, "every third file"
    assert len(clips) == 4
    assert any("left out: voice-0/broken.wav" in line for line in lines)

    alone = Codec.from_pretrained(tmp_path / "start")
    run_stage(StageRun(stage="2", recipe=run.recipe, codec=alone, clips=clips, group=Alone()), None, lambda *_: None)
    made = Codec.from_pretrained(run.out / "2")
    for (name, value), other in zip(made.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(value, other), name

    steps = [json.loads(line)["step"] for line in (run.out / "2" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(9)), "every step once, though the last one was computed twice"
    (sample,) = document["stages"]["2"]["samples"]
    for name in ("original", "rebuilt", "picture"):
        assert (run.out / "2" / "samples" / sample[name]).stat().st_size > 1000
    assert (run.out / "2" / "discriminator.safetensors").is_file()
    assert "spectrograms" in (run.out / "2" / "index.html").read_text()
    again = train_speech(asked(tmp_path, "2", workers=2, resume=True), lines.append)
    assert again["stages"] == document["stages"]
    assert lines[-1] == "stage 2: done before, kept"


def test_what_cannot_be_trained_is_refused_before_anything_starts(tmp_path: Path) -> None:
    def refused(error: type[Exception], why: str, run: SpeechRun) -> None:
        with pytest.raises(error, match=why):
            train_speech(run, lambda line: None)

    with pytest.raises(ConfigError, match="there is no stage '4'; choose one of all, semantic-pretrain"):
        stages_named("4")
    refused(ConfigError, r"3 workers cannot share 2 parts evenly", asked(tmp_path, "2", workers=3))
    refused(CheckpointError, r"stage 2 needs a codec to begin with.*name one with --from", asked(tmp_path, "2"))
    refused(ConfigError, r"holds a run; go on with --resume, or choose another --out", asked(tmp_path, "2"))
    other = short_recipe(seed=7, data=asked(tmp_path, "2").recipe.data.model_dump())
    refused(ConfigError, "holds a run of another recipe", asked(tmp_path, "2", resume=True, recipe=other))
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = short_recipe(data={"folder": str(empty)})
    refused(DataError, "has no recording that can be used", asked(tmp_path, "2", recipe=nothing, out=tmp_path / "b"))
