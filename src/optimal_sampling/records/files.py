"""Files that a crash leaves either old or new, and locks that end with their process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from optimal_sampling.errors import OptimalSamplingError, RunFolderError, StorageError

__all__ = ["Lock", "create_folder", "disk_error", "read_json", "sync_folder", "write_atomically"]

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


def create_folder(path: Path) -> None:
    """Make a folder and its parents. Raises as `disk_error` says."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


def sync_folder(path: Path) -> None:
    """Put new names in a folder on the disk, where the file system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str, *, replace: bool = True) -> bool:
    """Write a whole file or nothing.

    Without `replace`, an existing file stays as it is and the result is False.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        _write_and_sync(temporary, text)
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


def _write_and_sync(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
        path = target.with_name(f".{target.stem}.lock")
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise disk_error(path, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 4096, 0).decode("utf-8", "replace").strip()
            os.close(self._fd)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise disk_error(path, error) from error
            raise RunFolderError(
                f"{target} is being written by another process ({holder or 'unknown'}); "
                "wait for it, stop it, or choose another --output-dir or --data-slice"
            ) from None
        self._write_holder()

    def _write_holder(self) -> None:
        # The lock holds without it, so that a full disk is no error here.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock. Releasing twice is safe."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises RunFolderError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunFolderError(
            f"{path} is not JSON: {error}; restore it, or choose another --output-dir"
        ) from error
    if not isinstance(value, dict):
        raise RunFolderError(
            f"{path} holds no JSON object; restore it, or choose another --output-dir"
        )
    return value
