"""Training on damaged samples, through the command line: each is named with its shard, and above the rate all stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from mini_world import mini_recipe, write_components, write_world
from source_files import picture, tar_bytes

from omni_ray.config.load import save_recipe
from pipelines import cli

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Data reads settings of its own that it deprecates
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole pictures and four broken ones in a shard."""
    base = tmp_path_factory.mktemp("bad")
    (base / "world").mkdir()
    write_world(base / "world")
    write_components(base / "components")
    members = [(f"{key}.png", picture(number)) for number, key in enumerate("abcdef")]
    members[2] = ("c.png", picture(2)[:60])
    members[3] = ("d.png", b"")
    texts = [(f"{key}.txt", b"one") for key in "abcdef"]
    texts[4] = ("e.txt", "für".encode("latin-1"))
    pairs = [member for pair in zip(members, texts, strict=True) for member in pair]
    pairs = [pair for pair in pairs if pair[0] != "f.txt"]
    (base / "poor").mkdir()
    (base / "poor" / "train-0.tar").write_bytes(tar_bytes(pairs))
    return base


def _train(base: Path, fraction: float, out: str) -> int:
    stage = {"name": "S", "steps": 6, "mixture": {"text": 3, "poor": 2}, "trainable": ["language"]}
    data = {
        "root": str(base / "world"),
        "max_bad_fraction": fraction,
        "sources": {"text": {"path": "{data}/text"}, "poor": {"path": str(base / "poor")}},
    }
    save_recipe(mini_recipe(base, stages=[stage], data=data), base / "recipe.yaml")
    return cli.main(["train", str(base / "recipe.yaml"), "--out", str(base / out)])


def test_every_bad_sample_is_named_and_counted(
    base: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(base, 1.0, "run") == 0
    printed = capsys.readouterr()
    shard = base / "poor" / "train-0.tar"
    for sentence in (
        f"poor:2: {shard}: c/png cannot be decoded as a picture (",
        f"poor:3: {shard}: d/png is not a picture that can be read; send png, jpeg or webp",
        f"poor:4: {shard}: sample e: its txt is not UTF-8 (byte 1); write it in UTF-8",
        f"poor:5: {shard}: sample f: members png hold neither messages nor a caption; add KEY.json",
    ):
        assert f'sample="{sentence}' in printed.err
    assert "  data S: text " in printed.out
    assert f"could not be used: {printed.err.count('bad_sample step=')} of poor" in printed.out


def test_above_the_rate_the_run_stops_with_the_list(
    base: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(base, 0.05, "stopped") == 1
    ended = capsys.readouterr().err
    assert "samples read from 'poor' could not be used, above data.max_bad_fraction 0.05; mend the source" in ended
    listed = [line for line in ended.splitlines() if line.startswith("  poor:")]
    assert len(listed) == len(set(listed)) == 4
