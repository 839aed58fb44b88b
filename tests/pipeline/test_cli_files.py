"""Commands that read and write files, run on real small input: data, codec, checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from pipelines import cli


def run_json(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """The document of a command."""
    assert cli.main([*words, "--json"]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence of a command that fails."""
    assert cli.main(list(words)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.3 seconds at a rate that the codec does not have."""
    path = tmp_path_factory.mktemp("sound") / "in.wav"
    soundfile.write(path, np.sin(np.arange(28_665) * 0.05).astype(np.float32) * 0.3, 22_050)
    return path


def test_data_inspect_counts_rows_by_modality(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, "data", "inspect", str(base / "world"), "--limit", "5")
    assert {name: facts["samples"] for name, facts in document["sources"].items()} == {
        "audio": 40,
        "film": 4,
        "picture": 40,
        "speech": 20,
        "text": 60,
    }
    rows = document["sources"]["picture"]["rows"]
    assert rows["vision"] > 0
    assert rows["audio"] == rows["speech"] == 0
    assert cli.main(["data", "inspect", str(base / "world/audio")]) == 0
    assert "audio" in capsys.readouterr().out


def test_plan_shows_who_computes_what(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mini_world import mini_recipe

    from omni_ray.config.load import save_recipe
    from omni_ray.types.batch import StepPlan

    recipe = tmp_path / "mini.yaml"
    save_recipe(mini_recipe(base), recipe)
    words = ("plan", str(recipe), "--steps", "6", "--set", "pools.vision.actors=2", "--set", "pools.language.actors=2")
    plans = [StepPlan.from_json(json.dumps(step)) for step in run_json(capsys, *words)]
    assert [plan.step for plan in plans] == list(range(6))
    assert {batch.language_rank for plan in plans for batch in plan.micro_batches} == {0, 1}
    assert {item.encoder_rank for plan in plans for item in plan.items if item.modality == "vision"} == {0, 1}
    assert cli.main(["plan", str(recipe), "--steps", "5"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("micro-batch 0 -> language 0: ") == 5
    assert "vision: rank 0 -> language 0, micro-batch " in shown


def test_data_inspect_finds_a_sample_that_cannot_be_read(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mini_world import _write

    part = {"type": "image", "media": "0.png"}
    _write(tmp_path / "broken", [("q", [{"role": "user", "content": [part]}], {"0.png": b"not a picture"})])
    document = run_json(capsys, "data", "inspect", str(tmp_path / "broken"), code=1)
    (bad,) = document["sources"]["broken"]["bad"]
    assert "0.png" in bad


def test_data_preview_shows_the_next_samples_of_a_recipe(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mini_world import mini_recipe

    from omni_ray.config.load import save_recipe
    from omni_ray.training.prepare import StepBuilder

    made = mini_recipe(base)
    save_recipe(made, tmp_path / "mini.yaml")
    shown = run_json(capsys, "data", "preview", str(tmp_path / "mini.yaml"), "--step", "3", "--count", "24")["samples"]
    wanted = []
    for step in (3, 4, 5, 6):
        plan = StepBuilder(made, base / "world").build(step).plan
        wanted += [(step, name) for place in plan.order for name in plan.micro_batches[place].samples]
    assert [(record["step"], record["sample"]) for record in shown] == wanted[:24]
    text = next(record for record in shown if record["sample"].startswith("picture"))["text"]
    assert text == "USER:[vision 8]⏎what digit is it⏎ASSISTANT:« red seven</longcat_s>»⏎"
    speech = next(record for record in shown if record["sample"].startswith("speech"))
    assert f"[speech {speech['media'][0]['rows']}: « blue two</longcat_s>»]" in speech["text"]
    film = next((record for record in shown if record["sample"].startswith("film")), None)
    assert film is None or "<|audio|>[audio" in film["text"]
    assert sum(shown[0]["step_rows"].values()) == sum(r["rows"] for r in shown if r["step"] == 3)
    assert cli.main(["data", "preview", str(tmp_path / "mini.yaml"), "--step", "8", "--count", "1"]) == 0
    assert "of the sequences filled" in capsys.readouterr().out
    assert cli.main(["data", "preview", str(tmp_path / "mini.yaml"), "--step", "99"]) == 1
    assert "step 99 does not exist: the recipe has steps 0..9" in capsys.readouterr().err


def test_data_preview_shows_media_inside_one_page(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ("data", "preview", str(base / "world"), "--out", str(page), "--count", "2")
    assert run_json(capsys, *words)["samples"] == 10
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert text.count("<audio controls") == 4
    assert "http" not in text, "the page asks nobody for anything"
    assert list(tmp_path.iterdir()) == [page]
    assert "unknown ending" in refusal(capsys, "data", "inspect", str(page))
    assert "holds no train samples" in refusal(capsys, "data", "preview", str(tmp_path), "--out", str(page))


def test_preview_shows_words_as_words() -> None:
    from pipelines.data_preview import part_html

    assert part_html({"type": "text", "text": "<script>"}, {}) == "&lt;script&gt;"


def test_codec_encode_then_decode_is_reconstruct(
    base: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = ("--codec", str(base / "components/codec"))
    codes, out, again = tmp_path / "codes.npz", tmp_path / "out.wav", tmp_path / "again.wav"
    encoded = run_json(capsys, "codec", "encode", str(sound), str(codes), *codec)
    assert (encoded["frames"], encoded["codebooks"]) == (22, 4)  # 1.3 s, 60 ms each, the last one filled up
    decoded = run_json(capsys, "codec", "decode", str(codes), str(out), *codec)
    assert (decoded["frames"], decoded["sample_rate_hz"]) == (22, 24_000)
    run_json(capsys, "codec", "reconstruct", str(sound), str(again), *codec)
    assert out.read_bytes() == again.read_bytes()
    wave, rate = soundfile.read(out)
    assert (len(wave), rate) == (22 * 1440, 24_000)
    fewer = run_json(capsys, "codec", "decode", str(codes), str(again), "--codebooks", "2", *codec)
    assert fewer["bits_per_second"] < decoded["bits_per_second"]
    assert out.read_bytes() != again.read_bytes()


def test_codec_refusals(base: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec, codes = ("--codec", str(base / "components/codec")), tmp_path / "codes.npz"
    assert "IN 'nowhere.wav' is not a file" in refusal(capsys, "codec", "encode", "nowhere.wav", str(codes), *codec)
    assert "only .npz can be; rename OUT" in refusal(
        capsys, "codec", "encode", str(sound), str(tmp_path / "a.wav"), *codec
    )
    assert "name a file in a folder that exists" in refusal(
        capsys, "codec", "encode", str(sound), str(tmp_path / "no/codes.npz"), *codec
    )
    assert "is no file of codec ids" in refusal(capsys, "codec", "decode", str(sound), str(tmp_path / "a.wav"), *codec)
    garbage = tmp_path / "garbage.wav"
    garbage.write_bytes(b"RIFF and then nothing of use")
    assert "garbage.wav" in refusal(capsys, "codec", "encode", str(garbage), str(codes), *codec)
    assert "holds no codec (model.safetensors is missing)" in refusal(
        capsys, "codec", "encode", str(sound), str(codes), "--codec", str(tmp_path)
    )
    np.savez(codes, codes=np.zeros((3, 4), np.int32), codec=np.array("another"))
    assert "was made by codec another, this one is" in refusal(
        capsys, "codec", "decode", str(codes), str(tmp_path / "a.wav"), *codec
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.npz", "garbage.wav"]


def test_checkpoint_inspect_counts_parameters_without_torch_weights(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from omni_ray.models.llm import LanguageModel

    document = run_json(capsys, "checkpoint", "inspect", str(tiny_checkpoint))
    model = LanguageModel.from_pretrained(tiny_checkpoint / "model/language")
    stored = document["networks"]["language"]
    assert document["state"]["step"] == 3
    assert stored["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert cli.main(["checkpoint", "inspect", str(tiny_checkpoint)]) == 0
    assert "language: " in capsys.readouterr().out


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_weight_file_cut_short_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, keep: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "step-3"
    shutil.copytree(tiny_checkpoint, folder)
    (shard,) = (folder / "model/vision").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:keep])
    named = refusal(capsys, "checkpoint", "inspect", str(folder))
    assert f"(model/vision/{shard.name} has {shard.stat().st_size} bytes, written were " in named
    (folder / "sizes.json").unlink()  # checkpoints of before this file
    assert f"{shard} " in refusal(capsys, "checkpoint", "inspect", str(folder))
