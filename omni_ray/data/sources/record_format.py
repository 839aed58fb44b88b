"""What text files and tables share: records that name their media, in fields that a source may rename."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from omni_ray.data.sources.base import same_key
from omni_ray.data.sources.index import Shard
from omni_ray.data.sources.media_files import MediaFiles
from omni_ray.data.sources.storage import Storage
from omni_ray.types.errors import DataError


class RecordFormat:
    """A format of records without names of their own."""

    kind = "records"

    def __init__(
        self, roots: tuple[str, ...] = (), columns: Mapping[str, str] | None = None, *, allow_urls: bool = False
    ) -> None:
        """
        Args:
            roots: Folders besides the record's own from which it may name files.
            columns: Known field name -> the record's own.  allow_urls: Whether media may be fetched.
        """
        self.roots = roots
        self.columns = dict(columns or {})
        self.allow_urls = allow_urls

    def key(self, shard: Shard, table: pa.Table, row: int) -> str:
        """The shard's name and the record's number in it."""
        return same_key(shard, row)

    def media_beside(self, storage: Storage, shard: Shard) -> MediaFiles:
        """Loads what a record of the shard names."""
        return MediaFiles(storage, shard.path.rpartition("/")[0], self.roots, allow_urls=self.allow_urls)

    def renamed(self, record: Any) -> Any:
        """The record under the known field names.

        Raises:
            DataError: it lacks a field that is to be renamed.
        """
        if not self.columns or not isinstance(record, dict):
            return record
        missing = [own for own in self.columns.values() if own not in record]
        if missing:
            raise DataError(f"column {missing[0]} is missing; there are {', '.join(sorted(record))}")
        rest = {name: value for name, value in record.items() if name not in self.columns.values()}
        return rest | {known: record[own] for known, own in self.columns.items()}
