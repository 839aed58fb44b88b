"""Components trained in one call: what is whole is kept, what fails is told, what was asked otherwise is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from omni_ray.types.errors import CheckpointError, OmniError
from pipelines import quickstart_components as module

WRITES_A_CARD = (
    "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'card.json').write_text(sys.argv[2])"
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that write a card and nothing else."""

    def command(name: str, out: Path, seed: int, scale: float = 1.0) -> list[str]:
        return [sys.executable, "-c", WRITES_A_CARD, str(out), f"{name} {seed} {scale:g}"]

    monkeypatch.setattr(module, "component_command", command)


def cards(folder: Path) -> dict[str, str]:
    return {name: (folder / name / module.CARD).read_text() for name in module.NAMES}


@pytest.mark.usefixtures("quick")
def test_all_three_are_trained_and_those_that_are_whole_are_kept(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / module.CARD).write_text("trained before")
    module.train_all(tmp_path, 3, None, said.append, scale=0.5)
    assert cards(tmp_path) == {"vision": "vision 3 0.5", "audio": "audio 3 0.5", "codec": "trained before"}
    assert said[0] == f"training components on one core each: vision, audio; logs in {tmp_path}"
    before = len(said)
    module.train_all(tmp_path, 3, None, said.append, scale=0.5)
    assert len(said) == before, "nothing is left to train"


@pytest.mark.usefixtures("quick")
def test_parts_asked_for_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    module.train_all(tmp_path, 3, None, lambda line: None)
    for seed, scale, real_data, told in (
        (4, 1.0, None, "seed 3, not 4"),
        (3, 0.1, None, "scale 1.0, not 0.1"),
        (3, 1.0, tmp_path, "real_data False, not True"),
    ):
        with pytest.raises(CheckpointError, match=f"holds components trained with {told}; choose another --out"):
            module.train_all(tmp_path, seed, real_data, lambda line: None, scale=scale)


def test_a_training_that_fails_is_told_with_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [sys.executable, "-c", "import sys; print('no speech package'); sys.exit(1)"]
    monkeypatch.setattr(module, "component_command", lambda *args: broken)
    with pytest.raises(OmniError, match=r"training the vision component failed \(no speech package\); its log is"):
        module.train_all(tmp_path, 0, None, lambda line: None)


def test_the_command_is_the_documented_one(tmp_path: Path) -> None:
    assert module.component_command("codec", tmp_path, 5)[2:] == [
        *("-m", "pipelines.components.codec", "--out", str(tmp_path), "--seed", "5")
    ]
    assert module.component_command("audio", tmp_path, 5, 0.25)[-2:] == ["--scale", "0.25"]
