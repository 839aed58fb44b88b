"""What must not stop a run, and what must: every kind of damage is named, the same at every read, and counted."""

from __future__ import annotations

import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import picture, tar_bytes, write_form

from omni_ray.config.model import model_preset
from omni_ray.data.bad_samples import BadSamples
from omni_ray.data.sources import ReadLimits, Storage, WebDatasetSource, open_path
from omni_ray.types.errors import DataError, StorageError

VISION = model_preset("tiny").vision


def _tar(tmp_path: Path, members: list[tuple[str, bytes]], name: str = "train-0.tar") -> WebDatasetSource:
    (tmp_path / name).write_bytes(tar_bytes(members))
    return WebDatasetSource(tmp_path, "s")


def _whole(*keys: str) -> list[tuple[str, bytes]]:
    return [member for key in keys for member in ((f"{key}.png", picture(1)), (f"{key}.txt", b"one"))]


# tars


def test_a_tar_damaged_in_the_middle_says_what_is_lost(tmp_path: Path) -> None:
    raw = bytearray(tar_bytes(_whole("a", "b", "c")))
    header = raw.index(b"b.png")
    raw[header + 148 : header + 156] = b"garbage!"  # its checksum
    (tmp_path / "train-0.tar").write_bytes(raw)
    source = WebDatasetSource(tmp_path, "s")
    assert source[0].key == "a"
    assert len(source) == 2
    with pytest.raises(DataError, match=rf"train-0.tar: sample byte-{header}: the tar is damaged at byte {header}"):
        source[1]


@pytest.mark.parametrize("cut", [0, 1, 300])
def test_a_tar_cut_behind_a_whole_sample_says_so(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a block's end it may be a writer that sets no end mark: told, not counted."""
    raw = tar_bytes(_whole("a", "b", "c"))
    end = raw.index(b"c.png") - cut  # in the room behind b.txt, or where c would begin
    (tmp_path / "train-0.tar").write_bytes(raw[:end])
    source = WebDatasetSource(tmp_path, "s")
    assert [source[number].key for number in (0, 1)] == ["a", "b"]
    if cut == 0:
        assert len(source) == 2
        assert f"unfinished_shard shard={tmp_path / 'train-0.tar'} bytes={end}" in capsys.readouterr().err
        return
    assert len(source) == 3
    with pytest.raises(DataError, match=rf"sample byte-{end}: the tar is cut short at byte {end}: what followed"):
        source[2]


def test_an_empty_shard_is_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train-1.tar").write_bytes(b"")
    (tmp_path / "train-2.tar").write_bytes(tar_bytes([]))
    source = _tar(tmp_path, _whole("a"))
    assert [shard.samples for shard in source.shards] == [1, 0, 0]
    assert "empty_shard" in capsys.readouterr().err
    os.remove(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match="source 's' holds no samples"):
        WebDatasetSource(tmp_path, "s")


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    source = _tar(tmp_path, [*_whole("a", "b"), *_whole("a"), ("c.txt", b"1"), ("c.txt", b"2")])
    assert [source[i].key for i in (0, 1)] == ["a", "b"]
    with pytest.raises(DataError, match="sample a: its key stands twice in the shard"):
        source[2]
    with pytest.raises(DataError, match="sample c: member txt stands twice under this key"):
        source[3]


@pytest.mark.parametrize("name", ["../x.txt", "/etc/passwd.txt", "a/../../x.txt"])
def test_members_outside_their_folder(tmp_path: Path, name: str) -> None:
    source = _tar(tmp_path, [(name, b"text"), *_whole("good")])
    with pytest.raises(DataError, match="points outside its folder"):
        source[0]
    assert source[1].key == "good"


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "b.txt"), (tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(f"{kind.decode()}.txt")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    (tmp_path / "train-0.tar").write_bytes(out.getvalue())
    for index in range(3):
        with pytest.raises(DataError, match="is a link or a special file"):
            WebDatasetSource(tmp_path, "s")[index]


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path) -> None:
    raw = bytearray(tar_bytes([("a.png", b"x" * 100), ("a.txt", b"one")]))
    raw[124:136] = b"77777777777\0"  # 8 GiB
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    (tmp_path / "train-0.tar").write_bytes(raw)
    with pytest.raises(DataError, match="member png is cut short"):
        WebDatasetSource(tmp_path, "s")[0]
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "train-0.tar").write_bytes(tar_bytes(_whole("a")))
    with pytest.raises(DataError, match=r"bytes at once are more than 50; raise data.max_sample_bytes"):
        open_path(tmp_path / "big", "s", limits=ReadLimits(max_bytes=50))[0]


# text


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    latin = "schön".encode("latin-1")
    half = b'{"messages": [{"role": "text", "content": [{"type": "text", "text": "\\ud800"}]}]}'
    source = _tar(tmp_path, [("a.txt", latin), ("b.json", b'{"caption": "' + latin + b'"}'), ("c.json", half)])
    for index, why in enumerate(("its txt is not UTF-8", "its json is not UTF-8", "half a surrogate pair")):
        with pytest.raises(DataError, match=why):
            source[index]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_bytes(b'{"text": "good"}\n{"text": "' + latin + b'"}\n{"text": "too"}')
    lines = open_path(tmp_path / "lines", "l")
    assert (len(lines), lines[2].kind) == (3, "text")
    with pytest.raises(DataError, match=r"train.jsonl: sample train-00000001: its json is not UTF-8"):
        lines[1]


def test_text_of_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", "schön".encode("latin-1")]).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "train.parquet")
    source = open_path(tmp_path, "t")
    assert source[0].messages[0]["content"][0]["text"] == "good"
    with pytest.raises(DataError, match="its text is not UTF-8"):
        source[1]


def test_json_that_is_too_deep_or_cut(tmp_path: Path) -> None:
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "train.jsonl").write_bytes(deep + b'\n{"text": "whole"}\n{"text": "cu')
    source = open_path(tmp_path, "l")
    with pytest.raises(DataError, match=r"cannot be read|not a list"):
        source[0]
    assert source[1].kind == "text"
    with pytest.raises(DataError, match="its json cannot be read"):
        source[2]
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.json").write_bytes(b'[{"text": "a"}, {"text": "b\\"}{"}, {"text": "cut')
    cut = open_path(tmp_path / "list", "l")
    assert [cut[i].messages[0]["content"][0]["text"] for i in (0, 1)] == ["a", 'b"}{']
    with pytest.raises(DataError, match="its json cannot be read"):
        cut[2]


# media that records name


def test_files_outside_the_roots_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(7))
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(secret)
    (data / "own.png").write_bytes(picture(1))
    (data / "empty.png").write_bytes(b"")
    named = ["own.png", str(secret), "../secret.png", "link.png", "file://" + str(secret), "http://127.0.0.1:9/x.png"]
    named += ["data:image/png;base64,AAAA", "missing.png", "", "a\0b", "empty.png", "."]
    (data / "train.jsonl").write_text("\n".join(json.dumps({"image": n, "text": "t"}) for n in named))
    source = open_path(data, "s")
    assert source[0].media == {"own.png": picture(1)}
    why = ["outside the allowed folders"] * 3 + ["is a URL; set allow_urls"] * 3
    why += ["missing.png is missing", "is no path", "is no path", "empty.png is empty", r"\. is missing"]
    for index, reason in enumerate(why, start=1):
        with pytest.raises(DataError, match=reason):
            source[index]
    trusted = open_path(data, "s", media_roots=(str(tmp_path),))
    for index in (1, 2, 3):
        assert list(trusted[index].media.values()) == [picture(7)]
    with pytest.raises(DataError, match="is no http address"):
        open_path(data, "s", allow_urls=True)[4]


def test_a_fifo_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "pipe.png", "text": "t"}))
    with pytest.raises(DataError, match=r"pipe\.png is missing"):
        open_path(tmp_path, "s")[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.png").write_bytes(picture(3))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "web"))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_urls_only_where_the_recipe_says_so(server: str, tmp_path: Path) -> None:
    records = [{"image": f"{server}/a.png", "text": "t"}, {"image": f"{server}/none.png", "text": "t"}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    with pytest.raises(DataError, match="set allow_urls"):
        open_path(tmp_path, "s")[0]
    source = open_path(tmp_path, "s", allow_urls=True)
    assert list(source[0].media.values()) == [picture(3)]
    with pytest.raises(DataError, match="HTTP 404"):
        source[1]


def test_pairs_that_are_not_whole(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "x"}]
    records = [{"conversations": turns}, {"image": ["a.png"], "conversations": turns[:1] * 2}, {"image": "a.png"}]
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "train.json").write_text(json.dumps(records))
    source = open_path(tmp_path, "s")
    for index, why in enumerate(("names no image", "names no image", "neither messages nor a caption")):
        with pytest.raises(DataError, match=why):
            source[index]


# files that do not answer


class _Stalls(Storage):
    def __init__(self, stalls: int, timeout_s: float) -> None:
        super().__init__(limits=ReadLimits(timeout_s=timeout_s, tries=3, pause_s=0.01))
        self.stalls = stalls
        self.over = threading.Event()

    def tried(self, ask, path):  # type: ignore[no-untyped-def]
        def slow():  # type: ignore[no-untyped-def]
            if self.stalls > 0:
                self.stalls -= 1
                self.over.wait()
            return ask()

        return super().tried(slow, path)


def test_a_disk_that_stalls_is_waited_for_and_then_stops_the_run(tmp_path: Path) -> None:
    source = write_form(tmp_path / "s", "webdataset")
    wanted = source[3]
    source.storage = waited = _Stalls(2, 1.0)
    assert source[3] == wanted, "two stalls, the third try answers"
    source.storage = stopped = _Stalls(99, 0.2)
    with pytest.raises(StorageError, match=r"could not be read in 3 tries \(no answer within 0.2 s\)"):
        source[3]
    waited.over.set()
    stopped.over.set()
    assert not issubclass(StorageError, DataError), "a stall is never skipped: the order would depend on the disk"


def test_a_file_that_went_away_stops_the_run(tmp_path: Path) -> None:
    source = write_form(tmp_path / "s", "webdataset")
    os.remove(source.shards[0].path)
    source.storage = Storage(limits=ReadLimits(pause_s=0.0))
    with pytest.raises(StorageError, match="could not be read in 3 tries"):
        source[0]


def test_damaged_tables_name_the_block(tmp_path: Path) -> None:
    source = write_form(tmp_path / "p", "parquet")
    shard = Path(source.shards[0].path)
    raw = bytearray(shard.read_bytes())
    raw[4:600] = os.urandom(596)
    shard.write_bytes(raw)
    damaged = open_path(tmp_path / "p", "parquet")
    with pytest.raises(DataError, match="block 0 of the file is damaged"):
        damaged[0]
    assert damaged[len(damaged) - 1] == source[len(source) - 1]
    shard.write_bytes(raw[:-20])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_path(tmp_path / "p", "parquet")
    arrow = write_form(tmp_path / "a", "arrow")
    cut = Path(arrow.shards[-1].path)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert 0 < len(open_path(tmp_path / "a", "arrow")) < len(arrow)


# counting


def test_bad_samples_stop_a_run_above_the_stated_rate() -> None:
    bad = BadSamples(0.05)
    for step in range(300):
        broken = [f"poor:{step}: /x/train-0.tar: sample k{step}: why"] if step % 10 == 0 and step < 110 else []
        bad.add(["good:1", "good:2", f"poor:{step}"], broken)
        if step < 100:
            bad.check()  # ten bad ones never stop a run
    assert bad.counts() == {"poor": 11}
    bad.check()  # 11 of 311 are below the rate
    every = BadSamples(1.0)
    every.add(["poor:0"], [f"poor:{i}: why" for i in range(15)])
    every.check()  # more bad ones than good ones, and still no more than all
    bad = BadSamples(0.05)
    bad.add([f"poor:{i}" for i in range(100)] + [f"good:{i}" for i in range(10_000)], [])
    bad.add([], [f"poor:{i}: /x/train-0.tar: sample k{i}: why" for i in range(11)])
    with pytest.raises(DataError, match=r"11 of 111 samples read from 'poor'.*0.05") as stopped:
        bad.check()
    assert "poor:10: /x/train-0.tar: sample k10: why" in str(stopped.value)
