"""One worker's file of records: append-only lines, each with a checksum, safe before it is acknowledged.

Knows nothing of what a record means.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from optimal_sampling.errors import RunFolderError, StorageError
from optimal_sampling.records.files import Lock, create_folder, disk_error, sync_folder
from optimal_sampling.records.schema import Record, decode_line, encode_line, looks_like_line

__all__ = ["RecordFile", "Scan"]

_GROUP_RECORDS = 256  # most records that wait for one fsync
_SYNC_SHARE = 0.05  # fsync as often as costs this share of the time


class Scan:
    """The good records of a file, in order. After the iteration it knows what was bad.

    A bad line before a good one is damage (`bad_lines`). Bad lines at the end are a torn tail: a write that was cut
    short before it was acknowledged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad_lines = 0
        self.torn_lines = 0
        self.good_end = 0
        self.size = 0

    def __iter__(self) -> Iterator[Record]:
        for _, record in self.with_offsets():
            yield record

    def with_offsets(self) -> Iterator[tuple[int, Record]]:
        """Each good record with the place of its line in the file."""
        self.bad_lines = self.torn_lines = self.good_end = self.size = 0
        for line in self._lines():
            start, self.size = self.size, self.size + len(line)
            record = decode_line(line)
            if record is None:
                self._bad(line)
                continue
            self.bad_lines += self.torn_lines
            self.torn_lines = 0
            self.good_end = self.size
            yield start, record

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunFolderError(f"cannot read {self.path}: {error.strerror}") from error

    def _bad(self, line: bytes) -> None:
        if self.size == len(line) and line.endswith(b"\n") and not looks_like_line(line):
            raise RunFolderError(
                f"{self.path} was not written by this program; it was left as it is. Move it away"
            )
        self.torn_lines += 1


class RecordFile:
    """The one writer of a file. What `commit` has returned for is on the disk.

    `append` commits by itself, as often as costs a small share of the time. A write that fails is taken back, so
    that the file always ends with a whole line; what was acknowledged before is untouched.
    """

    def __init__(self, path: Path) -> None:
        create_folder(path.parent)
        self.path = path
        self.lock = Lock(path)
        self._fd = -1
        self._buffer: list[bytes] = []
        self._length = 0
        self._due = 0.0

    def open(self, scan: Scan) -> None:
        """Cut the torn tail that a finished `scan` of this very file found, and get ready to append."""
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if scan.size > scan.good_end:
                os.ftruncate(self._fd, scan.good_end)
                os.fsync(self._fd)
            sync_folder(self.path.parent)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._length = scan.good_end

    def append(self, record: Record) -> None:
        """Add a record; it is safe after the next commit."""
        self._buffer.append(encode_line(record))
        if time.monotonic() >= self._due or len(self._buffer) >= _GROUP_RECORDS:
            self.commit()

    def commit(self) -> None:
        """Write and fsync what waits, all or nothing."""
        if not self._buffer:
            return
        data = b"".join(self._buffer)
        started = time.monotonic()
        try:
            _write_at(self._fd, data, self._length)
            os.fsync(self._fd)
            # No call between these two: an interrupt comes before both or after both.
            self._length += len(data)
            self._buffer = []
        except OSError as error:
            self._take_back()
            raise StorageError(
                f"could not write {self.path}: {error.strerror}; every record acknowledged before is safe. "
                "Free some space and run the same command again"
            ) from error
        except BaseException:
            self._take_back()
            raise
        finished = time.monotonic()
        self._due = finished + (finished - started) / _SYNC_SHARE

    def _take_back(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._length)
            os.fsync(self._fd)

    def close(self) -> None:
        """Commit what waits and let others write. Closing twice is safe."""
        try:
            if self._fd >= 0:
                self.commit()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if isinstance(value, StorageError):
            self._buffer = []  # the disk has just refused it; it is owed again
        self.close()


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
