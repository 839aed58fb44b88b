"""Every source: numbered, the same sample at the same number, a state that does not grow with rows read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from mini_world import write_world
from pyarrow import fs
from source_files import COUNT, FORMS, picture, words, write_form

from omni_ray.data.sources import FileSource, WebDatasetSource, open_path
from omni_ray.data.sources.index import INDEX_SUFFIX
from omni_ray.types.seams import Source

KINDS = ("own-webdataset", *FORMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, FileSource]:
    (folder / "world").mkdir()
    write_world(folder / "world")
    own = {"own-webdataset": WebDatasetSource(folder / "world" / "picture", "picture")}
    return own | {form: write_form(folder / form, form) for form in FORMS}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_name_samples(sources: dict[str, FileSource], kind: str) -> None:
    source = sources[kind]
    assert isinstance(source, Source)
    before = json.dumps(source.state_dict())
    in_order = list(source)
    assert len(in_order) == len(source) > 10
    assert len({sample.key for sample in in_order}) == len(source)
    for index in (len(source) - 1, 0, 7):
        assert source[index] == in_order[index]
        assert source.key(index) == in_order[index].key
    assert json.dumps(source.state_dict()) == before
    for index in (len(source), -1):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_was_written(sources: dict[str, FileSource], form: str) -> None:
    source = sources[form]
    assert len(source) == COUNT
    for number in (22, 0, 11, 10, 3):
        sample = source[number]
        asked, answered = sample.messages
        part = asked["content"][0]
        assert (asked["role"], part["type"], answered["role"]) == ("user", "image", "assistant")
        assert sample.media[part["media"]] == picture(number)
        assert answered["content"] == [{"type": "text", "text": words(number)}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_travels_without_its_index(sources: dict[str, FileSource], kind: str, tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(sources[kind]))
    assert copy.fingerprint == sources[kind].fingerprint != ""
    assert copy[5] == sources[kind][5]
    copy._cache = tmp_path / "cache"
    copy.shards = [pickle.loads(pickle.dumps(shard)) for shard in copy.shards]
    for shard in copy.shards:
        object.__setattr__(shard, "index", str(tmp_path / "never-written"))
    assert copy[5] == sources[kind][5], "on another machine the index is made again"


@pytest.mark.parametrize("kind", KINDS)
def test_opening_again_scans_nothing(
    sources: dict[str, FileSource], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources[kind]
    indexes = [Path(shard.path + INDEX_SUFFIX) for shard in source.shards]
    stamps = [index.stat().st_mtime_ns for index in indexes]
    monkeypatch.setattr(type(source.form), "build", None)
    again = FileSource(source.name, source.storage, [shard.path for shard in source.shards], source.form)
    assert again.fingerprint == source.fingerprint
    assert [index.stat().st_mtime_ns for index in indexes] == stamps


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_shard_is_another_source(form: str, tmp_path: Path) -> None:
    before = write_form(tmp_path / form, form)
    shutil.rmtree(tmp_path / form)
    same = write_form(tmp_path / form, form)
    assert same.fingerprint == before.fingerprint or form == "webdataset"  # a tar holds the time of writing
    shard = Path(same.shards[-1].path)
    raw = bytearray(shard.read_bytes())
    place = raw.rindex(b"number 2")
    raw[place : place + 6] = b"NUMBER"
    shard.write_bytes(raw)
    changed = open_path(tmp_path / form, form)
    assert len(changed) == len(same)
    assert changed.fingerprint != same.fingerprint, "same size, same members, other bytes"


@pytest.mark.parametrize("form", FORMS)
def test_other_file_systems_are_read(sources: dict[str, FileSource], form: str, folder: Path, tmp_path: Path) -> None:
    """A file system that is not this machine's disk: no mapping, no index beside the shards."""
    elsewhere = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
    source = open_path(form, form, filesystem=elsewhere, cache=tmp_path / "cache")
    assert not source.storage.is_local
    assert source.fingerprint == sources[form].fingerprint
    assert list(source) == list(sources[form])
    assert len(list((tmp_path / "cache").iterdir())) == len(source.shards)
