"""A new folder that is there whole or not at all: Parquet files, the card, a rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimal_sampling.errors import RunFolderError, StorageError
from optimal_sampling.records.store import Lock, disk_error, sync_folder

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ParquetShards", "check_target", "new_folder"]

ROW_GROUP = 1000
"""Rows that are held in memory and written together."""
FILE_ROWS = 100_000
"""Most rows of a file."""

_OWN_NAMES = {"README.md", "export.json", "data", ".gitattributes", ".cache"}
"""What an export, or its copy from the hub, holds."""


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which gets the name `target` at the end, and is removed on an error.

    Raises RunFolderError where `target` is not empty (with `overwrite`: and is no export), or
    another process writes it; StorageError where the disk is full.
    """
    check_target(target, overwrite=overwrite)
    target = Path(os.path.realpath(target))  # of a link, what it leads to is replaced
    lock = Lock(target)
    partial = target.with_name(f".{target.name}.partial")
    old = target.with_name(f".{target.name}.old")
    try:
        _restore(old, target)
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            _sync_tree(partial)
            _swap(partial, target, old)
        except OSError as error:
            raise disk_error(target, error) from error
        finally:
            _remove(partial)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        lock.release()


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise RunFolderError where the folder may not be written."""
    try:
        names = set(os.listdir(target))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise RunFolderError(f"{target} is a file; choose another --output-dir") from error
    except OSError as error:
        raise disk_error(target, error) from error
    if names and not overwrite:
        raise RunFolderError(f"{target} is not empty; choose another --output-dir, or --overwrite")
    foreign = sorted(names - _OWN_NAMES)
    if foreign or (names and "data" not in names):
        raise RunFolderError(
            f"{target} holds {', '.join(foreign) or 'no data'}, so it is no export, and "
            "--overwrite leaves it as it is; choose another --output-dir"
        )


def _swap(partial: Path, target: Path, old: Path) -> None:
    """Give the finished folder its name. A folder that was there is removed after that."""
    if target.exists() and any(target.iterdir()):
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(old, target)
            raise
    else:
        os.rename(partial, target)
    sync_folder(target.parent)
    _remove(old)


def _restore(old: Path, target: Path) -> None:
    """Undo the first half of a swap that was killed between its two halves."""
    if old.exists() and not target.exists():
        os.rename(old, target)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


class ParquetShards:
    """Writer of one split: `data/SPLIT-00000-of-00002.parquet` and so on, in row groups.

    Raises StorageError where the disk refuses a write.
    """

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        self._data = folder / "data"
        self._split = split
        self._schema = schema
        self._waiting: list[Mapping[str, Any]] = []
        self._writer: Any = None
        self._in_file = 0
        self._files: list[Path] = []
        self.rows = 0
        """Rows added."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row, with the columns of the schema."""
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist(self._waiting, schema=self._schema)
        self._waiting = []
        try:
            if self._writer is None:
                self._data.mkdir(exist_ok=True)
                path = self._data / f"{self._split}-{len(self._files):05}.parquet"
                self._files.append(path)
                self._writer = parquet.ParquetWriter(path, self._schema, compression="zstd")
            self._writer.write_table(table)
        except OSError as error:
            raise _full(self._data, error) from error
        self._in_file += table.num_rows
        if self._in_file >= FILE_ROWS:
            self._close_file()

    def _close_file(self) -> None:
        writer, self._writer, self._in_file = self._writer, None, 0
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            raise _full(self._data, error) from error

    def close(self) -> None:
        """Write what waits, and give the files their names."""
        if self._waiting:
            self._write_group()
        self._close_file()
        count = len(self._files)
        for number, path in enumerate(self._files):
            path.rename(path.with_name(f"{self._split}-{number:05}-of-{count:05}.parquet"))

    def abandon(self) -> None:
        """Close the file after an error. Its content is of no use."""
        with contextlib.suppress(OSError, StorageError):
            self._close_file()


def _full(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(
        f"could not write {path}: {reason}. Nothing was left under the name of the export. "
        "Free some space and run the same command again"
    )
