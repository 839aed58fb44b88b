"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omni_ray.checkpoint import store
from omni_ray.types.errors import CheckpointError


def write(parent: Path, step: int) -> None:
    with store.writing(parent, step) as folder:
        store.write_state(folder, {"step": step})


def test_newest_and_prune(tmp_path: Path) -> None:
    for step in (1, 20, 3):
        write(tmp_path, step)
    assert store.newest(tmp_path) == tmp_path / "step-0000020"
    store.prune(tmp_path, 1)
    assert [folder.name for folder in store.whole(tmp_path)] == ["step-0000020"]
    assert store.read_state(tmp_path / "step-0000020") == {"step": 20}


def test_error_while_writing_leaves_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path, 1)
    message = r"step 2 could not be written .* earlier checkpoints are intact"
    with pytest.raises(CheckpointError, match=message), store.writing(tmp_path, 2):
        raise OSError(28, "No space left on device")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-0000001"]


def test_half_written_folder_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "step-0000004" / store.COMPLETE).unlink()
    assert store.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        store.check_whole(tmp_path / "step-0000004")
    with pytest.raises(CheckpointError, match="does not exist"):
        store.check_whole(tmp_path / "nothing")
    (tmp_path / "step-0000004" / store.COMPLETE).write_text("9\n")
    with pytest.raises(CheckpointError, match="layout '9'"):
        store.check_whole(tmp_path / "step-0000004")


def test_a_file_cut_short_makes_its_checkpoint_count_as_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut may leave the name of a file and not its end."""
    for step in (2, 4):
        with store.writing(tmp_path, step) as folder:
            store.write_state(folder, {"step": step})
            (folder / "model").mkdir()
            (folder / "model" / "model.safetensors").write_bytes(b"0" * 100)
    assert store.newest_to_resume(tmp_path) == tmp_path / "step-0000004"
    os.truncate(tmp_path / "step-0000004" / "model" / "model.safetensors", 60)
    assert store.newest_to_resume(tmp_path) == tmp_path / "step-0000002"
    assert "model/model.safetensors has 60 bytes, written were 100" in capsys.readouterr().err
    named = r"step-0000004 is not a whole checkpoint \(model/model.safetensors has 60 .*did you mean .*step-0000002"
    with pytest.raises(CheckpointError, match=named):
        store.check_whole(tmp_path / "step-0000004")
    (tmp_path / "step-0000002" / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds step-0000002, step-0000004, yet no whole checkpoint"):
        store.newest_to_resume(tmp_path)
