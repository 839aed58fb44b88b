"""WebDataset tars as numbered samples: ours, the library's, and damaged ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from omni_ray.data.sources import WebDatasetSource
from omni_ray.data.tiny_world.shards import write_shards
from omni_ray.data.tiny_world.world import Draft, assistant, part, text, user
from omni_ray.types.errors import DataError
from omni_ray.types.seams import Source


def _drafts(count: int) -> list[Draft]:
    asked = user(part("image", "image.png"), text("what is it"))
    return [
        Draft(kind="k", messages=(asked, assistant(f"number {i}")), media={"image.png": bytes([i])}, facts={"i": i})
        for i in range(count)
    ]


def test_samples_come_back_by_number_and_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path, "s", "train", _drafts(5))
    write_shards(tmp_path, "s", "held_out", _drafts(2))
    source = WebDatasetSource(tmp_path / "s", "s")
    assert isinstance(source, Source)
    assert len(source) == 5
    assert len(WebDatasetSource(tmp_path / "s", "s", split="held_out")) == 2
    assert [sample.key for sample in source] == [f"s-train-{i:06d}" for i in range(5)]
    sample = source[3]
    assert (sample.key, sample.kind, dict(sample.facts)) == (source.key(3), "k", {"i": 3})
    assert dict(sample.media) == {"image.png": bytes([3])}
    assert sample.messages[1]["content"] == [{"type": "text", "text": "number 3"}]
    with pytest.raises(IndexError, match=r"s has samples 0..4, not 5"):
        source[5]


def test_several_tars_count_through_and_travel(tmp_path: Path) -> None:
    first, second = (write_shards(tmp_path, name, "train", _drafts(n)) for name, n in (("a", 3), ("b", 2)))
    source = WebDatasetSource([tmp_path / first[0].path, tmp_path / second[0].path], "both")
    assert [sample.facts["i"] for sample in source] == [0, 1, 2, 0, 1]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[4] == source[4]
    assert copy.state_dict() == source.state_dict()
    assert source.state_dict()["length"] == 5


def test_the_library_reads_our_tars(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, "s", "train", _drafts(4))[0]
    with open(tmp_path / shard.path, "rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": shard.path, "stream": stream}])
        read = list(webdataset.tariterators.group_by_keys(files))
    ours = WebDatasetSource(tmp_path / "s", "s")
    assert [item["__key__"] for item in read] == [sample.key for sample in ours]
    for item, sample in zip(read, ours, strict=True):
        assert item["image.png"] == sample.media["image.png"]
        assert json.loads(item["json"])["messages"] == list(sample.messages)


def test_we_read_the_librarys_tars(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "dir/0001", "jpg": b"picture", "txt": " a red seven \n"})
        writer.write({"__key__": "dir/0002", "txt": "only text"})
        writer.write({"__key__": "dir/0003", "flac": b"sound", "json": {"caption": "a bell"}})
    pictured, plain, heard = WebDatasetSource(tmp_path / "train-0.tar", "theirs")
    assert (pictured.key, pictured.kind, dict(pictured.media)) == ("dir/0001", "caption", {"jpg": b"picture"})
    assert pictured.messages[0]["content"] == [{"type": "image", "media": "jpg"}]
    assert pictured.messages[1]["content"][0]["text"] == "a red seven"
    assert (plain.kind, plain.messages[0]["role"]) == ("text", "text")
    assert heard.messages[0]["content"] == [{"type": "audio", "media": "flac"}]
    assert heard.messages[1]["content"][0]["text"] == "a bell"


def test_the_index_is_kept_and_follows_the_tar(tmp_path: Path) -> None:
    shard = tmp_path / write_shards(tmp_path, "s", "train", _drafts(3))[0].path
    WebDatasetSource(shard, "s")
    kept = shard.with_name(shard.name + ".omni-index")
    stamp = kept.stat().st_mtime_ns
    WebDatasetSource(shard, "s")
    assert kept.stat().st_mtime_ns == stamp, "a fitting index is not written again"
    write_shards(tmp_path, "s", "train", _drafts(7))
    assert len(WebDatasetSource(shard, "s")) == 7
    kept.write_text("damaged")
    assert len(WebDatasetSource(shard, "s")) == 7


def test_an_index_beside_a_read_only_shard_lies_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / write_shards(tmp_path, "s", "train", _drafts(3))[0].path
    replace = os.replace

    def refuse(part: str, place: Path) -> None:
        if Path(place).parent == shard.parent:
            raise PermissionError(13, "read-only")
        replace(part, place)

    monkeypatch.setattr(os, "replace", refuse)
    assert len(WebDatasetSource(shard, "s", cache=tmp_path / "cache")) == 3
    assert len(list((tmp_path / "cache").glob("*.omni-index"))) == 1
    assert not shard.with_name(shard.name + ".omni-index").exists()


def test_a_bad_sample_names_shard_and_key_and_leaves_the_others(tmp_path: Path) -> None:
    good = json.dumps({"kind": "k", "messages": [{"role": "user", "content": [{"type": "image", "media": "a.png"}]}]})
    _write_tar(
        tmp_path / "train-0.tar",
        [
            ("s0.json", b"{not json"),
            ("s1.json", good.encode()),
            ("s2.json", b"[1]"),
            ("s3.json", b'{"messages": 3}'),
            ("s4.png", b"alone"),
            ("s5.json", good.encode()),
            ("s5.a.png", b"whole"),
        ],
    )
    source = WebDatasetSource(tmp_path, "s")
    for index, why in enumerate(
        ("json cannot be read", "member a.png is missing; it has no media", "is a list", "not a list", "hold neither")
    ):
        with pytest.raises(DataError, match=rf"train-0.tar: sample s{index}: .*{why}"):
            source[index]
    assert source[5].media == {"a.png": b"whole"}


def test_a_tar_cut_short_keeps_its_whole_samples(tmp_path: Path) -> None:
    shard = tmp_path / write_shards(tmp_path, "s", "train", _drafts(3))[0].path
    raw = shard.read_bytes()
    place = raw.index(b"s-train-000002.image.png")
    shard.write_bytes(raw[: place + 512])
    source = WebDatasetSource(shard, "s")
    assert [source[i].facts["i"] for i in (0, 1)] == [0, 1]
    with pytest.raises(DataError, match=r"sample s-train-000002: member image.png is cut short: 0 of 1 bytes"):
        source[2]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, "s", "held_out", _drafts(1))
    with pytest.raises(DataError, match=r"has no train\*.tar; splits there: held_out"):
        WebDatasetSource(tmp_path / "s", "s")
    with pytest.raises(DataError, match=r"none.tar is not there"):
        WebDatasetSource(tmp_path / "none.tar", "s")
    (tmp_path / "text.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        WebDatasetSource(tmp_path / "text.tar", "s")


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
