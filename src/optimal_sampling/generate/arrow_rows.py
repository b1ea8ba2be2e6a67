"""Rows of Parquet files and Arrow tables, of which a value that cannot be read fails alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from optimal_sampling.errors import DatasetError
from optimal_sampling.types import Unreadable

__all__ = ["parquet_shape", "read_parquet", "read_table"]

_BATCH_ROWS = 1024  # most rows in memory at a time
_BATCH_BYTES = 1 << 24  # about the most bytes of them
_READ_BYTES = 1 << 20  # read from a column at a time


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DatasetError(f"cannot read dataset {path} as Parquet: {error}") from error


def parquet_shape(path: Path) -> tuple[int, list[str]]:
    """Number of rows and names of the columns. Raises DatasetError, also for a name given twice."""
    with _open(path) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DatasetError(f"dataset {path} has several columns named {', '.join(twice)}")
        return file.metadata.num_rows, names


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file. A column that cannot be read leaves the others as they are."""
    with _open(path) as file:
        names = file.schema_arrow.names
        try:
            for group in range(file.num_row_groups):
                yield from _rows(names, [_column(file, group, name) for name in names])
        except OSError as error:
            raise DatasetError(f"cannot read dataset {path}: {error}") from error


def _column(file: pyarrow.parquet.ParquetFile, group: int, name: str) -> Iterator[Any]:
    """The values of a column in a row group. Raises OSError where the disk fails."""
    layout = file.metadata.row_group(group)
    row_bytes = layout.total_byte_size // max(1, layout.num_rows) + 1
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
    done = 0
    try:
        for batch in file.iter_batches(size, [group], [name], use_threads=False):
            done += batch.num_rows
            yield from _values(batch.column(name), name)
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None):
            raise
        reason = f"column {name!r} cannot be read: {' '.join(str(error).split())}"
        for row in range(done, layout.num_rows):  # each a text of its own, as rows have
            yield Unreadable(reason, f"<row {row} of row group {group}: {reason}>")


def read_table(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table."""
    names = table.column_names
    return _rows(names, [_values(table.column(name), name) for name in names])


def _rows(names: list[str], columns: Sequence[Iterable[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: Any, name: str) -> list[Any]:
    """Python values of an array."""
    with contextlib.suppress(Exception):  # one bad value, of any type: found below
        if "[ns" not in str(column.type):  # of which Python's types depend on what is installed
            return list(column.to_pylist())
    return [_value(scalar, name) for scalar in column]


def _value(scalar: Any, name: str) -> Any:
    """The Python value of a scalar; where it has none, Unreadable, or a value with such parts."""
    kind, types = scalar.type, pyarrow.types
    with contextlib.suppress(Exception):  # a value of any type: its parts are tried below
        if not scalar.is_valid or "[ns" not in str(kind):
            return scalar.as_py()
    if types.is_struct(kind):
        return {kind.field(place).name: _value(scalar[place], name) for place in range(len(kind))}
    if types.is_map(kind):
        return [tuple(_value(item, name).values()) for item in scalar.values]
    if hasattr(scalar, "values"):  # a list
        return [_value(item, name) for item in scalar.values]
    if hasattr(scalar, "value") and isinstance(scalar.value, pyarrow.Scalar):  # encoded in some way
        return _value(scalar.value, name)
    try:
        return _microseconds(scalar).as_py()
    except UnicodeDecodeError as error:
        text = scalar.as_buffer().to_pybytes().decode(errors="backslashreplace")
        return Unreadable(f"column {name!r} is not UTF-8 at byte {error.start + 1}", text)
    except Exception:  # a time or a number that Python's types do not hold
        return _arrow_text(scalar, name)


def _microseconds(scalar: Any) -> Any:
    """A time in nanoseconds as one that Python has. Raises ArrowInvalid where that changes it."""
    kind, types = scalar.type, pyarrow.types
    if getattr(kind, "unit", None) != "ns":
        return scalar
    if types.is_timestamp(kind):
        return scalar.cast(pyarrow.timestamp("us", kind.tz))
    return scalar.cast(pyarrow.time64("us") if types.is_time(kind) else pyarrow.duration("us"))


def _arrow_text(scalar: Any, name: str) -> str | Unreadable:
    """A time as Arrow writes it, which knows more years and smaller units than Python."""
    try:
        text = str(scalar.cast(pyarrow.string()).as_py())
    except (pyarrow.ArrowException, ValueError) as error:
        return Unreadable(f"column {name!r} holds a value that cannot be read: {error}")
    if "out of range" in text:
        return Unreadable(f"column {name!r} holds a {scalar.type} that is no date: {text}")
    return f"{text} {scalar.type.unit}" if pyarrow.types.is_duration(scalar.type) else text
