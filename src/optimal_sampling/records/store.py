"""Files of records: append-only lines, each with a checksum, under a lock; and atomic writes.

What a commit returned for is on the disk. The meaning of a record is unknown here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from optimal_sampling.errors import OptimalSamplingError, RunFolderError, StorageError
from optimal_sampling.records.schema import Record

__all__ = [
    "Line",
    "Lock",
    "RecordFile",
    "Scan",
    "damaged_lines",
    "decode_line",
    "disk_error",
    "is_locked",
    "make_folder",
    "read_json",
    "sync_folder",
    "write_atomically",
]

_GROUP_RECORDS = 256  # most records that wait for one fsync
_SYNC_SHARE = 0.05  # largest share of the time that goes to fsync
_LONGEST_LOOK = 1.0  # seconds in which a reader that looks whether a file is locked is done
_CHECKSUM_BYTES = 8
_CHECKSUM_START, _LINE_END = b',"checksum":"', b'"}\n'
_TAIL_LENGTH = len(_CHECKSUM_START) + 2 * _CHECKSUM_BYTES + len(_LINE_END)
_WRONG_FOLDER = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""Errors for which another folder is needed. All others are errors of the disk."""


def disk_error(path: Path, error: OSError) -> OptimalSamplingError:
    """RunFolderError where another folder is needed, StorageError where the disk failed."""
    reason = error.strerror or str(error)
    if error.errno in _WRONG_FOLDER:
        return RunFolderError(f"cannot write {path}: {reason}; choose another --output-dir")
    return StorageError(f"could not write {path}: {reason}")


def make_folder(path: Path) -> None:
    """Make a folder, with those it lies in. Raises RunFolderError, StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


def sync_folder(path: Path) -> None:
    """Put new names in a folder on the disk, where the file system can."""
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def write_atomically(path: Path, text: str, *, replace: bool = True) -> bool:
    """Write a whole file or nothing, and the folders that it lies in.

    Without `replace`, an existing file stays as it is and the result is False.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace or not _link(temporary, path):
            os.replace(temporary, path)
        sync_folder(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name that must be new; False where the file system has no links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


class Lock:
    """An exclusive lock on a file, which the system drops when the process ends in any way.

    It is a hidden file beside the locked one, which names the process and stays behind.
    """

    def __init__(self, target: Path) -> None:
        path = _lock_path(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Opened for appending, which leaves the holder's name in place.
            self._file = path.open("a+", errors="replace")
            _lock_file(self._file)
        except BlockingIOError:
            with self._file as file:
                file.seek(0)
                holder = file.read().strip() or "unknown"
            raise RunFolderError(
                f"{target} is being written by another process ({holder}); "
                "wait for it, stop it, or give this command a folder of its own (--output-dir, "
                "--data-slice)"
            ) from None
        except OSError as error:
            raise disk_error(path, error) from error
        # The lock holds without the name, so that a full disk is no error.
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            os.write(self._file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Release the lock. Releasing twice is safe."""
        self._file.close()


def _lock_file(file: IO[str]) -> None:
    """Lock a file, past the instants in which `is_locked` looks at it. Raises BlockingIOError."""
    end = time.monotonic() + _LONGEST_LOOK
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(_LONGEST_LOOK / 20)
        else:
            return


def is_locked(target: Path) -> bool:
    """Whether a process writes the file now. Where that cannot be found out, False.

    It takes a shared lock for an instant, which `Lock` waits for.
    """
    try:
        with _lock_path(target).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name.removesuffix('.jsonl')}.lock")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises RunFolderError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    raise RunFolderError(f"{path} holds no JSON object; restore it, or choose another --output-dir")


def encode_line(record: Mapping[str, Any]) -> bytes:
    """A whole line: the record as JSON in UTF-8, the checksum of those bytes as its last field."""
    body = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        data = body.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8; its JSON escape is ASCII
        data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    data = data.removesuffix(b"}")
    return data + _tail(data)


def decode_line(line: bytes) -> Record | None:
    """The record, or None where the line is not byte for byte what `encode_line` wrote."""
    if not _is_whole(line):
        return None
    record: Record = json.loads(line[:-_TAIL_LENGTH] + b"}")
    return record


def damaged_lines(path: Path) -> int:
    """Lines of a file, torn ones included, that are not as they were written."""
    try:
        with path.open("rb") as file:
            return sum(not _is_whole(line) for line in file)
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error


def _is_whole(line: bytes) -> bool:
    data, tail = line[:-_TAIL_LENGTH], line[-_TAIL_LENGTH:]
    return bool(data) and tail == _tail(data)


def _tail(data: bytes) -> bytes:
    checksum = hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).hexdigest().encode()
    return _CHECKSUM_START + checksum + _LINE_END


def _checksum(line: bytes) -> str:
    """The checksum that a whole line ends with."""
    return line[-_TAIL_LENGTH + len(_CHECKSUM_START) : -len(_LINE_END)].decode()


class Line(NamedTuple):
    """A good line of a file."""

    start: int
    """Offset in the file, in bytes."""
    checksum: str
    """16 hex digits."""
    record: Record


class Scan:
    """The good records of a file, in order, and after the iteration the counts of bad lines.

    A bad line before a good one is damage (`bad_lines`). Bad lines at the end are a torn tail
    (`torn_lines`): a write that was cut short before it was acknowledged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad_lines = 0
        self.torn_lines = 0
        self.good_end = 0
        """End of the last good line, in bytes."""
        self.size = 0
        """Bytes read."""

    def __iter__(self) -> Iterator[Record]:
        for line in self.lines():
            yield line.record

    def lines(self) -> Iterator[Line]:
        """Each good line."""
        self.bad_lines = self.torn_lines = self.good_end = self.size = 0
        for line in self._raw_lines():
            start = self.size
            self.size += len(line)
            record = decode_line(line)
            if record is None:
                self._check_origin(line)
                self.torn_lines += 1
                continue
            self.bad_lines += self.torn_lines
            self.torn_lines = 0
            self.good_end = self.size
            yield Line(start, _checksum(line), record)

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunFolderError(f"cannot read {self.path}: {error.strerror}") from error

    def _check_origin(self, line: bytes) -> None:
        """Refuse a file whose first line is whole and was never a record."""
        is_first = self.size == len(line)
        if is_first and line.endswith(b"\n") and not line.startswith(b'{"id":"'):
            raise RunFolderError(
                f"{self.path} was not written by this program; it was left as it is. Move it away"
            )


class RecordFile:
    """The only writer of a file of records, under a lock.

    `append` commits by itself, as often as costs a small share of the time. A write that fails is
    taken back, so that the file always ends with a whole line.

    Raises RunFolderError where the file cannot be written or another process has it, StorageError
    where the disk refuses a write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path)
        self._fd = -1
        self._buffer: list[bytes] = []
        self._length = 0
        self._due = 0.0

    def open(self, scan: Scan) -> None:
        """Get ready to append: cut the torn tail that a finished `scan` of this file found."""
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if scan.size > scan.good_end:
                os.ftruncate(self._fd, scan.good_end)
                os.fsync(self._fd)
            sync_folder(self.path.parent)
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._length = scan.good_end

    def append(self, record: Mapping[str, Any]) -> str:
        """Add a record; its checksum. It is on the disk after the next commit."""
        line = encode_line(record)
        self._buffer.append(line)
        if time.monotonic() >= self._due or len(self._buffer) >= _GROUP_RECORDS:
            self.commit()
        return _checksum(line)

    def commit(self) -> None:
        """Write and fsync the waiting records, all or none."""
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
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._length)
                os.fsync(self._fd)
            if not isinstance(error, OSError):
                raise
            self._buffer = []  # the disk has just refused these; they are owed again
            raise StorageError(
                f"could not write {self.path}: {error.strerror}; "
                "every record acknowledged before is safe. "
                "Free some space and run the same command again"
            ) from error
        finished = time.monotonic()
        self._due = finished + (finished - started) / _SYNC_SHARE

    def close(self) -> None:
        """Commit the waiting records and release the lock. Closing twice is safe."""
        try:
            self.commit()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
