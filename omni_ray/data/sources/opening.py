"""Which files a source is, and how they are read: from a path, a split and, where it does not tell, a format."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyarrow import fs

from omni_ray.config.training import SourceConfig
from omni_ray.data.sources.base import FileSource, Format
from omni_ray.data.sources.index import INDEX_SUFFIX
from omni_ray.data.sources.lines import JsonLinesFormat, JsonListFormat
from omni_ray.data.sources.records import parse_json
from omni_ray.data.sources.storage import ReadLimits, Storage
from omni_ray.data.sources.tables import ArrowFormat, ParquetFormat
from omni_ray.data.sources.tar import Adapter, TarFormat
from omni_ray.types.errors import DataError

ENDINGS: Mapping[str, str] = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "llava",
    ".arrow": "arrow",
}
"""Format of a file by its name, in the order in which a folder is looked through."""
_NOT_SHARDS = ("manifest.json", "tokenizer.json", "dataset_info.json", "state.json", "dataset_dict.json")


class WebDatasetSource(FileSource):
    """Numbered samples of WebDataset tars."""

    def __init__(
        self,
        where: Path | str | Sequence[Path | str],
        name: str,
        *,
        split: str = "train",
        adapter: Adapter | None = None,
        cache: Path | None = None,
    ) -> None:
        """Open tars.

        Args:
            where: A folder (its tars whose names start with ``split``, sorted), one tar, or several.
            name: Name in mixtures and sample references.
            adapter: Makes a :class:`Sample` of members; default :func:`sample_from_members`.

        Raises:
            DataError: no tar there, or one that cannot be read at all.
        """
        storage, paths = Storage(), []
        for one in [where] if isinstance(where, str | Path) else where:
            storage, path = Storage.of(one)
            paths += find_shards(storage, path, split, "webdataset")[1]
        super().__init__(name, storage, paths, TarFormat(adapter), cache=cache)


def open_path(
    where: Path | str,
    name: str,
    *,
    split: str = "train",
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    media_roots: tuple[str, ...] = (),
    allow_urls: bool = False,
    limits: ReadLimits | None = None,
    filesystem: fs.FileSystem | None = None,
    cache: Path | None = None,
) -> FileSource:
    """Open files where they lie.

    Args:
        where: Folder or file; a path, or a URI such as ``s3://bucket/folder``.
        split: Shards whose name (or whose folder's name) starts with this.
        form: ``webdataset``, ``parquet``, ``jsonl``, ``llava``, ``arrow``, or ``auto``: by the files' endings.
        columns: Known field name -> the record's own (see ``records.FIELDS``).
        media_roots: Folders besides the record's own from which records may name files.
        filesystem: Instead of the one that ``where`` names.

    Raises:
        DataError: nothing there that can be read.
    """
    if filesystem is not None:
        storage, path = Storage(filesystem, limits), str(where)
    else:
        storage, path = Storage.of(where, limits)
    kind, paths = find_shards(storage, path.rstrip("/") or "/", split, form)
    records = {"roots": media_roots, "columns": columns, "allow_urls": allow_urls}
    forms: dict[str, Format] = {"webdataset": TarFormat()}
    forms |= {one.kind: one(**records) for one in (JsonLinesFormat, JsonListFormat, ParquetFormat, ArrowFormat)}  # type: ignore[arg-type]
    return FileSource(name, storage, paths, forms[kind], cache=cache)


def open_configured(config: SourceConfig, name: str, root: Path | str, limits: ReadLimits | None = None) -> FileSource:
    """Open a source as a recipe describes it; ``{data}`` in its paths stands for ``root``.

    Raises:
        DataError: as :func:`open_path`.
    """
    return open_path(
        config.path.replace("{data}", str(root)),
        name,
        split=config.split,
        form=config.format,
        columns=config.columns,
        media_roots=tuple(folder.replace("{data}", str(root)) for folder in config.media_roots),
        allow_urls=config.allow_urls,
        limits=limits,
    )


def is_there(config: SourceConfig, root: Path | str) -> bool:
    """Whether a source of a recipe has any shards."""
    return holds_shards(config.path.replace("{data}", str(root)), config.split, config.format)


def holds_shards(where: Path | str, split: str, form: str = "auto") -> bool:
    """Whether a folder holds shards of a split, readable or not."""
    storage, path = Storage.of(where)
    try:
        return bool(find_shards(storage, path, split, form)[1])
    except _NothingThereError:
        return False
    except DataError:  # files of several formats, or a saved data set that is damaged: opening it says what is wrong
        return True


class _NothingThereError(DataError):
    """No file or folder, or no shards of the split in it."""


def find_shards(storage: Storage, path: str, split: str, form: str = "auto") -> tuple[str, list[str]]:
    """(format, paths) of a file, or of the shards of one split in a folder.

    Raises:
        DataError: nothing there, or files of several formats.
    """
    if not storage.is_folder(path):
        if storage.facts(path) is None:
            raise _NothingThereError(f"{path} is not there; name a folder of shards or a shard")
        return _format_of(path, form), [path]
    for folder in (path, posixpath.join(path, split), posixpath.join(path, "data")):
        names = [name for name in storage.names(folder) if _is_shard(name, form)]
        own = names if folder.endswith("/" + split) or _is_saved_split(storage, folder) else []
        chosen = own or [name for name in names if name.startswith(split)]
        if chosen:
            kinds = {_format_of(name, form) for name in chosen}
            if len(kinds) > 1:
                raise DataError(f"{folder} holds {split} files of {' and '.join(sorted(kinds))}; name a format")
            return kinds.pop(), _saved_order(storage, folder, [posixpath.join(folder, name) for name in chosen])
    names = [name for name in storage.names(path) if _is_shard(name, form)]
    there = sorted({re.sub(r"[-_.]?[\d]*(-of-\d+)?\.\w+$", "", name) for name in names})
    ending = next((e for e, kind in ENDINGS.items() if kind == form), "")
    raise _NothingThereError(f"{path} has no {split}*{ending or ' shards'}; splits there: {', '.join(there) or 'none'}")


def _is_shard(name: str, form: str) -> bool:
    # .index.json: what version 0.1.0 kept beside a tar
    if (
        name in _NOT_SHARDS
        or name.startswith((".", "cache-", "indices-"))
        or name.endswith((INDEX_SUFFIX, ".index.json"))
    ):
        return False
    kind = ENDINGS.get(posixpath.splitext(name)[1])
    return kind is not None and (form == "auto" or kind == form or {form, kind} == {"jsonl", "llava"})


def _format_of(path: str, form: str) -> str:
    found = ENDINGS.get(posixpath.splitext(path)[1]) if form == "auto" else form
    if found is None:
        raise DataError(f"{path} has an unknown ending; name its format, one of {', '.join(set(ENDINGS.values()))}")
    return found


def _is_saved_split(storage: Storage, folder: str) -> bool:
    """Whether a folder is what ``Dataset.save_to_disk`` wrote: one split, whatever its files are called."""
    return storage.facts(posixpath.join(folder, "state.json")) is not None


def _saved_order(storage: Storage, folder: str, paths: list[str]) -> list[str]:
    """The files that ``state.json`` lists, in its order; else the files in name order.

    Raises:
        DataError: the folder holds a shuffled or selected data set whose rows stand in another order.
    """
    place = posixpath.join(folder, "state.json")
    facts = storage.facts(place)
    if facts is None:
        return paths
    state = parse_json(storage.read(place, 0, facts.size))
    if not isinstance(state, dict) or "_data_files" not in state:
        return paths
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} holds a view of other rows; save it with flatten_indices() first")
    return [posixpath.join(folder, str(item["filename"])) for item in state["_data_files"]]
