"""Writing files so that a crash leaves the old one or the new one, and locks that die with their process."""

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

_CANNOT_WRITE_HERE = {
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


def disk_error(path: Path, error: OSError) -> OptimalSamplingError:
    """The error to raise for `error`: another folder is needed, or the disk gave out under a good one."""
    reason = error.strerror or str(error)
    if error.errno in _CANNOT_WRITE_HERE:
        return RunFolderError(f"cannot write {path}: {reason}; choose another --output-dir")
    return StorageError(f"could not write {path}: {reason}")


def create_folder(path: Path) -> None:
    """`mkdir -p` with errors that say what to do."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


def sync_folder(path: Path) -> None:
    """Make new names in a folder survive a power cut, where the file system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str, *, replace: bool = True) -> bool:
    """Write a whole file or nothing. Without `replace`, an existing file stays and the answer is False."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if replace or not _link(temporary, path):
                os.replace(temporary, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    return True


def _link(source: Path, target: Path) -> bool:
    """Give `source` a second name that must be new; False where the file system has no links."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


class Lock:
    """An exclusive lock on a file that the system drops when the process dies, however it dies.

    A hidden file beside it names the holder, for the message of whoever comes second, and stays behind.
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
        self._sign()

    def _sign(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # a full disk must not stop a reader of the summary; the lock itself holds
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go. Releasing twice is safe."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_json(path: Path) -> dict[str, object]:
    """A JSON object written by `write_atomically`."""
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
