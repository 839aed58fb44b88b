"""Bytes by path, from a disk or an object store, with a deadline: what every source reads through."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from omni_ray.observability.events import emit
from omni_ray.types.errors import DataError, StorageError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How long and how much a source reads."""

    timeout_s: float = 60.0
    """A read that takes longer counts as stalled."""
    tries: int = 3
    """Times a read that stalls or fails is tried before the run stops."""
    pause_s: float = 0.5
    """Before the second try; doubles with every further one."""
    max_bytes: int = 2**30
    """Largest sample (its media together), row group or line that is taken into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a file system says of a file."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Time of its last change; 0 where the file system does not tell."""


class Storage:
    """Reads of one pyarrow file system; pickles with it, holds no open file."""

    def __init__(self, filesystem: fs.FileSystem | None = None, limits: ReadLimits | None = None) -> None:
        self.filesystem = filesystem or fs.LocalFileSystem()
        self.limits = limits or ReadLimits()

    @staticmethod
    def of(where: Path | str, limits: ReadLimits | None = None) -> tuple[Storage, str]:
        """The storage and the path in it that a path or URI (``s3://bucket/folder``, ``file:///data``) names.

        Raises:
            DataError: a URI that no file system reads.
        """
        text = str(where)
        if "://" not in text:
            return Storage(limits=limits), str(Path(text).absolute())
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (ValueError, OSError) as error:
            raise DataError(f"{text!r} names no file system that can be read ({error})") from error
        return Storage(filesystem, limits), str(path)

    @property
    def is_local(self) -> bool:
        """Whether paths are those of this machine."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def facts(self, path: str) -> FileFacts | None:
        """Size and time of a regular file; None where there is none.

        Raises:
            StorageError: the file system does not answer.
        """
        info = self.tried(lambda: self.filesystem.get_file_info(path), path)
        if info.type != fs.FileType.File:
            return None
        return FileFacts(size=int(info.size), mtime_ns=int(info.mtime_ns or 0))

    def is_folder(self, path: str) -> bool:
        """Whether a folder lies there."""
        found = self.tried(lambda: self.filesystem.get_file_info(path), path)
        return bool(found.type == fs.FileType.Directory)

    def names(self, folder: str) -> list[str]:
        """Names of the regular files of a folder, sorted."""
        chosen = fs.FileSelector(folder, allow_not_found=True)
        found = self.tried(lambda: self.filesystem.get_file_info(chosen), folder)
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes ``offset .. offset + size`` (fewer at the end of the file).

        Raises:
            DataError: more than may be taken into memory.
            StorageError: the file system does not answer, or refuses.
        """
        return self.read_all(path, [(offset, size)])[0]

    def read_all(self, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Several ranges of one file, which is opened once; raises as :meth:`read`."""
        wanted = sum(size for _, size in ranges)
        if wanted > self.limits.max_bytes:
            raise DataError(
                f"{wanted} bytes at once are more than {self.limits.max_bytes}; raise data.max_sample_bytes"
            )

        def ask() -> list[bytes]:
            with self.filesystem.open_input_file(path) as stream:
                return [bytes(stream.read_at(size, offset)) for offset, size in ranges]

        return self.tried(ask, path)

    def open(self, path: str) -> Any:
        """A seekable file; for building an index, where a stall is seen by the reader of the progress line."""
        return self.tried(lambda: self.filesystem.open_input_file(path), path)

    def tried(self, ask: Callable[[], Result], path: str) -> Result:
        """The answer of a read, tried again where it stalls or fails; raises StorageError after the last try."""
        problem: BaseException | None = None
        for turn in range(self.limits.tries):
            if turn:
                emit("read_retry", path=path, turn=turn, problem=str(problem))
                time.sleep(self.limits.pause_s * 2 ** (turn - 1))
            try:
                return with_deadline(ask, self.limits.timeout_s)
            except TimeoutError:
                problem = TimeoutError(f"no answer within {self.limits.timeout_s:g} s")
            except OSError as error:
                problem = error
        raise StorageError(
            f"{path} could not be read in {self.limits.tries} tries ({problem}); "
            "look at the disk or the connection, then resume"
        )


class _Reader(threading.Thread):
    """One thread that reads for another, so that a read which never ends can be left behind."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="reader")
        self.asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            ask = self.asked.get()
            try:
                self.answers.put((ask(), None))
            except BaseException as error:
                self.answers.put((None, error))


_readers = threading.local()


def with_deadline(ask: Callable[[], Result], timeout_s: float) -> Result:
    """Call ``ask`` in a thread of its own kept for this one; within such a call, directly: the outer deadline counts.

    Raises:
        TimeoutError: no answer in time; the stalled thread is left behind and ends with the process.
    """
    if isinstance(threading.current_thread(), _Reader):
        return ask()
    reader: _Reader | None = getattr(_readers, "reader", None)
    if reader is None or not reader.is_alive():
        reader = _readers.reader = _Reader()
    reader.asked.put(ask)
    try:
        answer, error = reader.answers.get(timeout=timeout_s)
    except queue.Empty:
        _readers.reader = None
        raise TimeoutError from None
    if error is not None:
        raise error
    result: Result = answer
    return result
