"""The same samples in every form that a source reads, written with the libraries that people use."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from omni_ray.data.image import encode_png
from omni_ray.data.sources import FileSource, open_path

FORMS = ("webdataset", "parquet", "jsonl", "llava", "arrow")
COUNT = 23


def words(number: int) -> str:
    return f"number {number}, “quoted” {{braces}} [and] \\ more"


def picture(number: int) -> bytes:
    return encode_png(np.full((28, 28, 3), number, dtype=np.uint8))


def write_form(folder: Path, form: str, count: int = COUNT) -> FileSource:
    """Write ``count`` captioned pictures in two shards (one for a LLaVA list) and open them."""
    folder.mkdir(parents=True)
    cuts = [(0, count)] if form == "llava" else [(0, count // 2), (count // 2, count)]
    for part, (first, last) in enumerate(cuts):
        _WRITERS[form](folder, part, range(first, last))
    if form == "arrow":
        files = [{"filename": f"data-0000{part}-of-00002.arrow"} for part in range(2)]
        (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
        (folder / "dataset_info.json").write_text("{}")
    return open_path(folder, form)


def _tar(folder: Path, part: int, numbers: range) -> None:
    with webdataset.TarWriter(str(folder / f"train-{part:05d}.tar")) as writer:
        for number in numbers:
            writer.write({"__key__": f"{number:06d}", "png": picture(number), "txt": words(number)})


def _table(numbers: range) -> pa.Table:
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]
    return pa.table({"image": images, "caption": [words(number) for number in numbers]})


def _parquet(folder: Path, part: int, numbers: range) -> None:
    pq.write_table(_table(numbers), folder / f"train-{part:05d}-of-00002.parquet", row_group_size=5)


def _arrow(folder: Path, part: int, numbers: range) -> None:
    table = _table(numbers)
    with pa.ipc.new_stream(str(folder / f"data-{part:05d}-of-00002.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def _files(folder: Path, numbers: range) -> list[str]:
    (folder / "pictures").mkdir(exist_ok=True)
    for number in numbers:
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number))
    return [f"pictures/{number}.png" for number in numbers]


def _jsonl(folder: Path, part: int, numbers: range) -> None:
    with (folder / f"train-{part}.jsonl").open("w", encoding="utf-8") as out:
        for number, path in zip(numbers, _files(folder, numbers), strict=True):
            out.write(json.dumps({"image": path, "text": words(number)}, ensure_ascii=False) + "\n\n")


def _llava(folder: Path, part: int, numbers: range) -> None:
    records: list[dict[str, Any]] = []
    for number, path in zip(numbers, _files(folder, numbers), strict=True):
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": words(number)}]
        records.append({"id": str(number), "image": path, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")


_WRITERS = {"webdataset": _tar, "parquet": _parquet, "arrow": _arrow, "jsonl": _jsonl, "llava": _llava}


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A tar of members, any names."""
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()
