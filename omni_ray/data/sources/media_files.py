"""Media that a record names: files below allowed folders, bytes in a table, and URLs only where the recipe says so."""

from __future__ import annotations

import os
import posixpath
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from omni_ray.data.sources.storage import Storage, with_deadline
from omni_ray.types.errors import DataError, StorageError

_SCHEMES = ("http://", "https://")


class MediaFiles:
    """Loads what records name; a :data:`MediaLoader`. Pickles.

    A path is taken relative to the record's own folder, then to each further root, and must end inside one of them
    after links are followed: a record cannot read the machine's other files.
    """

    def __init__(self, storage: Storage, folder: str, roots: tuple[str, ...] = (), *, allow_urls: bool = False) -> None:
        self.storage = storage
        self.roots = tuple(self._real(root) for root in (folder, *roots))
        self.allow_urls = allow_urls

    def __call__(self, value: Any, kind: str) -> tuple[str, bytes]:
        """(name, bytes) of a path, a URL, bytes, or ``{"bytes": ..., "path": ...}``.

        Raises:
            DataError: it is missing, empty, too large, outside the roots, or a URL that is not allowed.
            StorageError: the file is there and does not answer.
        """
        if isinstance(value, Mapping):
            path, raw = value.get("path"), value.get("bytes")
            if raw is None and path is None:
                raise DataError(f"its {kind} has neither bytes nor a path")
            if raw is not None:
                return posixpath.basename(str(path)) if path else kind, self._checked(bytes(raw), kind)
            value = path
        if isinstance(value, bytes | bytearray):
            return kind, self._checked(bytes(value), kind)
        if not isinstance(value, str) or not value or "\0" in value:
            raise DataError(f"its {kind} is {value!r}, which is no path")
        if "://" in value or value.startswith("data:"):
            return value, self._fetch(value)
        return value, self._read(value)

    def _read(self, value: str) -> bytes:
        allowed = False
        for root in self.roots:
            path = self._real(value if posixpath.isabs(value) else posixpath.join(root, value))
            if not any(path == one or path.startswith(one.rstrip("/") + "/") for one in self.roots):
                continue
            allowed = True
            facts = self.storage.facts(path)
            if facts is None:
                continue
            if facts.size > self.storage.limits.max_bytes:
                raise DataError(f"{value} has {facts.size} bytes, more than {self.storage.limits.max_bytes}")
            return self._checked(self.storage.read(path, 0, facts.size), value)
        if not allowed:
            raise DataError(f"{value} lies outside the allowed folders; add its folder to media_roots if it is trusted")
        raise DataError(f"{value} is missing")

    def _fetch(self, url: str) -> bytes:
        if not self.allow_urls:
            raise DataError(f"{url[:80]} is a URL; set allow_urls for the source if it is trusted")
        if not url.startswith(_SCHEMES):
            raise DataError(f"{url[:80]} is no http address; use a path below media_roots")
        limits = self.storage.limits

        def ask() -> bytes:
            with urllib.request.urlopen(url, timeout=limits.timeout_s) as answer:
                return bytes(answer.read(limits.max_bytes + 1))

        problem: BaseException | None = None
        for _ in range(limits.tries):
            try:
                return self._checked(with_deadline(ask, limits.timeout_s), url)
            except urllib.error.HTTPError as error:
                error.close()
                if 400 <= error.code < 500:
                    raise DataError(f"{url} is not there (HTTP {error.code})") from error
                problem = error
            except (OSError, TimeoutError) as error:
                problem = error
        raise StorageError(f"{url} could not be fetched in {limits.tries} tries ({problem})")

    def _checked(self, raw: bytes, name: str) -> bytes:
        if not raw:
            raise DataError(f"{name} is empty")
        if len(raw) > self.storage.limits.max_bytes:
            raise DataError(f"{name} has more than {self.storage.limits.max_bytes} bytes")
        return raw

    def _real(self, path: str) -> str:
        return os.path.realpath(path) if self.storage.is_local else posixpath.normpath(path)
