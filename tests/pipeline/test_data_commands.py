"""Commands that make, count and show data, on every form of samples."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from mini_world import mini_recipe, write_components, write_world
from PIL import Image
from source_files import COUNT, picture, tar_bytes, words, write_form

from omni_ray.config.load import save_recipe
from omni_ray.data.sources import open_path
from omni_ray.training.prepare import StepBuilder
from pipelines import cli


@pytest.mark.parametrize("form", ["llava", "arrow", "webdataset"])
def test_shards_are_made_of_any_form(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_form(tmp_path / form, form)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train.jsonl").write_text('{"image": "../x.png", "text": "t"}\n{"text": "whole"}\n')
    for turn in ("one", "two"):
        assert cli.main(["data", "build", "shards", "--from", str(tmp_path / form), "--out", str(tmp_path / turn)]) == 0
    first, second = (tmp_path / turn / "train-00000.tar" for turn in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    made = open_path(tmp_path / "one", "made")
    assert len(made) == COUNT
    for number in range(COUNT):
        assert list(made[number].media.values()) == [picture(number)]
        assert made[number].messages[1] == source[number].messages[1]
        assert made[number].messages[1]["content"][0]["text"] == words(number)
    capsys.readouterr()
    assert cli.main(["data", "build", "shards", "--from", str(bad), "--out", str(tmp_path / "good"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["sources"]["bad"]
    assert (facts["samples"], len(facts["bad"])) == (1, 1)
    assert "train.jsonl: sample train-00000000: ../x.png lies outside" in facts["bad"][0]


def test_inspect_counts_lengths_sizes_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    page = tmp_path / "page.html"
    assert cli.main(["data", "inspect", str(tmp_path / "world"), "--json", "--html", str(page)]) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert sources["picture"]["resolutions"] == {"56x56": 40}
    assert sum(sources["audio"]["durations"].values()) == 40
    assert set(sources["audio"]["durations"]) <= {"0.0", "0.5", "1.0"}
    for facts in sources.values():
        for bins in facts["lengths"].values():
            assert sum(bins.values()) == facts["looked_at"]
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4
    assert text.count("<audio controls") == 8
    assert "rows of vision a sample" in text
    assert cli.main(["data", "inspect", str(tmp_path / "world")]) == 0
    assert "  pictures and films, height x width: 56x56 (40)" in capsys.readouterr().out


def _jpeg() -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, format="JPEG")
    return out.getvalue()


def test_what_cannot_be_read_is_told_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose shards do not open, an empty shard, a sample outside its folder: named, never passed over."""
    places = {name: tmp_path / "all" / name for name in ("good", "torn")}
    for place in places.values():
        place.mkdir(parents=True)
    (places["torn"] / "train-0.tar").write_bytes(bytes(range(256)) * 20)
    whole = [("a.png", picture(1)), ("a.txt", b"one"), ("../b.png", picture(2)), ("../b.txt", b"two")]
    broken = [("c.png", b"\x89PNG garbage"), ("c.txt", b"three"), ("d.jpg", _jpeg()[:-900]), ("d.txt", b"four")]
    (places["good"] / "train-0.tar").write_bytes(tar_bytes(whole + broken))
    (places["good"] / "train-1.tar").write_bytes(b"")
    shard = places["good"] / "train-0.tar"
    torn = f"{places['torn'] / 'train-0.tar'} cannot be read as an uncompressed tar (invalid header); write it with"
    assert cli.main(["data", "inspect", str(tmp_path / "all")]) == 1
    printed = capsys.readouterr()
    for sentence in (
        f"left out: torn: {torn}",
        f"empty shard: {places['good'] / 'train-1.tar'}",
        f"bad: {shard}: sample ../b: member '../b.txt' points outside its folder; rename it",
        f"bad: {shard}: c/png is not a picture that can be read; send png, jpeg or webp",
    ):
        assert sentence in printed.out
    assert "source_left_out" in printed.err
    assert f"bad: {shard}: d/jpg" not in printed.out
    assert cli.main(["data", "inspect", str(tmp_path / "all"), "--decode"]) == 1
    assert f"bad: {shard}: d/jpg cannot be decoded as a picture (" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(tmp_path / "all"), "--json"]) == 1
    assert torn in json.loads(capsys.readouterr().out)["left_out"]["torn"]
    page = tmp_path / "page.html"
    assert cli.main(["data", "preview", str(tmp_path / "all"), "--out", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert "points outside its folder; rename it</div>" in page.read_text(encoding="utf-8")


def test_preview_shows_the_samples_of_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world")
    write_components(tmp_path / "components")
    recipe = mini_recipe(tmp_path)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    page = tmp_path / "page.html"
    words_ = ["data", "preview", str(tmp_path / "recipe.yaml"), "--step", "5", "--count", "9", "--out", str(page)]
    assert cli.main([*words_, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shown"] == 9
    plan = StepBuilder(recipe, tmp_path / "world").build(5).plan
    wanted = [name for batch in plan.micro_batches for name in batch.samples][:9]
    text = page.read_text(encoding="utf-8")
    places = [text.index(f"<b>{name}</b>") for name in wanted]
    assert places == sorted(places)
    assert 'class="learn"> red</span>' in text or 'class="learn">ASSISTANT:</span>' in text
    assert cli.main(["data", "build", "shards"]) == 1
    assert "needs --from PATH" in capsys.readouterr().err
