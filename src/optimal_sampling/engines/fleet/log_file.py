"""Log files that worker processes append to: kept short while they grow, and their last lines."""

from __future__ import annotations

import contextlib
import os
import shutil
from io import FileIO
from pathlib import Path

__all__ = ["LogTail", "keep_short", "last_lines"]

_MOST_BYTES = 16 << 20  # of a log, before it is moved to the one that is kept beside it
_CHUNK = 1 << 16
_LAST_LINES = 15
_TAIL_BYTES = 8192


def keep_short(log: Path, most: int = _MOST_BYTES) -> None:
    """Move what a log holds to `<name>.1` once it is longer than `most` bytes.

    The process goes on writing at its start. A line that it writes in this moment may be lost.
    """
    with contextlib.suppress(OSError):
        if log.stat().st_size <= most:
            return
        with contextlib.suppress(OSError):  # a full disk: it needs the room more
            shutil.copyfile(log, _older(log))
        os.truncate(log, 0)


def last_lines(log: Path) -> str:
    """The last lines of a log, below its name; "" where there is none."""
    if not log.is_file():
        return ""
    tail = b"".join(_tail(path) for path in (_older(log), log))
    lines = tail.decode(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in [f"{log}:", *lines[-_LAST_LINES:]])


def _older(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")


def _tail(path: Path) -> bytes:
    """The last bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


class LogTail:
    """What is appended to a file, read in parts; the file is emptied once it is long and read."""

    def __init__(self, file: FileIO, most: int = _MOST_BYTES) -> None:
        """`file`: unbuffered, for reading and writing. `most`: bytes that may wait in it."""
        self._file = file
        self._most = most

    def read(self) -> bytes:
        """The next part; b"" where there is none yet. Of a flood the oldest is left out."""
        size = os.fstat(self._file.fileno()).st_size
        left_out = size - self._file.tell() - self._most
        if left_out > 0:
            self._file.seek(left_out, os.SEEK_CUR)
        data = self._file.read(_CHUNK)
        if self._file.tell() >= size > self._most:
            self._file.truncate(0)
            self._file.seek(0)
        return b"[... %d bytes ...]\n%b" % (left_out, data) if left_out > 0 else data
