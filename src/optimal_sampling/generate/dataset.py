"""Datasets: JSONL, Parquet, a folder of such files, a dataset of the hub, or `synthetic`.

Rows are read one at a time, and read again in each iteration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from optimal_sampling.config import DataConfig, parse_slice
from optimal_sampling.errors import DatasetError, MissingDependencyError
from optimal_sampling.prompts import PROMPT_COLUMNS

__all__ = ["Dataset", "open_dataset"]

Row = dict[str, Any]

_JSONL = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_SYNTHETIC_ROWS = 100


@dataclass(frozen=True)
class Source:
    """All rows of a dataset, before any are selected."""

    name: str
    read: Callable[[], Iterator[Row]]
    count: Callable[[int | None], int]
    """Number of rows, at most the given one. Raises DatasetError where one cannot be read."""
    columns: tuple[str, ...] | None = None
    """None: those of the first row."""


@dataclass(frozen=True)
class Dataset:
    """The selected rows, each with its index in the whole dataset. Can be iterated repeatedly."""

    source: Source
    columns: tuple[str, ...]
    prompt_column: str
    answer_column: str | None
    selection: range

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        chosen = self.selection
        rows = enumerate(self.source.read())
        return islice(rows, chosen.start, chosen.stop, chosen.step)


def open_dataset(config: DataConfig, seed: int) -> Dataset:
    """Find the dataset, check that it can be read and has a prompt column, and select rows.

    `seed` is that of the problems of `synthetic`. Raises DatasetError, MissingDependencyError.
    """
    source = _source(config, seed)
    total = source.count(config.num_examples)
    if total == 0:
        raise DatasetError(f"dataset {source.name} is empty")
    columns = source.columns or tuple(next(source.read()))
    part = parse_slice(config.data_slice or "0:")
    selection = range(total)[part]
    if not selection:
        raise DatasetError(
            f"the data slice {config.data_slice} takes none of the {total} rows of {source.name}"
        )
    return Dataset(
        source=source,
        columns=columns,
        prompt_column=_prompt_column(config, source.name, columns),
        answer_column=_answer_column(config, source.name, columns),
        selection=selection,
    )


def _prompt_column(config: DataConfig, name: str, columns: tuple[str, ...]) -> str:
    wanted = (config.prompt_column,) if config.prompt_column else PROMPT_COLUMNS
    found = next((column for column in wanted if column in columns), None)
    if found is None:
        raise DatasetError(
            f"dataset {name} has no column {' or '.join(wanted)}; it has: {', '.join(columns)}. "
            "Name the one with the prompt with --prompt-column"
        )
    return found


def _answer_column(config: DataConfig, name: str, columns: tuple[str, ...]) -> str | None:
    if config.answer_column and config.answer_column not in columns:
        raise DatasetError(
            f"dataset {name} has no column {config.answer_column}; it has: {', '.join(columns)}"
        )
    return config.answer_column


def _source(config: DataConfig, seed: int) -> Source:
    if config.dataset == "synthetic":
        return _synthetic(seed, config.num_examples or _SYNTHETIC_ROWS)
    try:
        path = Path(config.dataset).expanduser()
        if path.is_dir():
            return _folder(path)
        if path.exists():
            return _file(path)
    except (OSError, RuntimeError) as error:  # a name too long for the disk, a user without a home
        raise DatasetError(f"dataset {config.dataset[:200]!r} is no path: {error}") from error
    if _is_path(config.dataset):
        raise DatasetError(
            f"dataset {config.dataset} does not exist (looked for {path.absolute()})"
        )
    return _hub(config.dataset)


def _is_path(name: str) -> bool:
    """Whether a name that does not exist is a path: hub ids are `name` or `owner/name`."""
    if name.startswith((".", "~", "/")) or name.endswith((*_JSONL, *_PARQUET)):
        return True
    return name.count("/") > 1


def _synthetic(seed: int, rows: int) -> Source:
    from optimal_sampling.toy_pair.problems import synthetic_rows

    return Source(
        name="synthetic",
        read=lambda: map(dict, synthetic_rows(seed, rows)),
        count=lambda limit: rows,
    )


def _file(path: Path) -> Source:
    if path.suffix in _PARQUET:
        return _parquet(path)
    if path.suffix in _JSONL:
        return _jsonl(path)
    raise DatasetError(
        f"dataset {path} is neither JSONL ({', '.join(_JSONL)}) nor Parquet ({', '.join(_PARQUET)})"
    )


def _folder(path: Path) -> Source:
    suffixes = (*_JSONL, *_PARQUET)
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    if not files:
        raise DatasetError(f"dataset {path} is a folder without JSONL or Parquet files")
    parts = [_file(file) for file in files]

    def count(limit: int | None) -> int:
        total = 0
        for part in parts:
            total += part.count(None if limit is None else limit - total)
            if total == limit:
                break
        return total

    return Source(
        name=str(path),
        read=lambda: chain.from_iterable(part.read() for part in parts),
        count=count,
    )


def _jsonl(path: Path) -> Source:
    def count(limit: int | None) -> int:
        return sum(1 for _ in islice(_read_jsonl(path), limit))

    return Source(name=str(path), read=lambda: _read_jsonl(path), count=count)


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _parse(path, number, line)
    except OSError as error:
        raise DatasetError(f"cannot read dataset {path}: {error.strerror}") from error


def _parse(path: Path, number: int, line: bytes) -> Row:
    place = f"dataset {path} is not JSON at line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}, byte {error.start + 1}: not UTF-8") from None
    except json.JSONDecodeError as error:
        message = f"{place}, column {error.colno}: {error.msg}"
        if line.startswith(b"["):
            message += "; a JSON array over several lines? Give one object per line (JSONL)"
        raise DatasetError(message) from None
    except RecursionError:
        raise DatasetError(f"{place}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DatasetError(f"{place}: {error}") from None
    if not isinstance(row, dict):
        raise DatasetError(
            f"dataset {path}, line {number}, column 1: "
            f"expected an object {{...}}, found {_kind(row)}"
        )
    return row


def _kind(value: object) -> str:
    names = {
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _parquet(path: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DatasetError(f"cannot read dataset {path} as Parquet: {error}") from error

    def read() -> Iterator[Row]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DatasetError(f"cannot read dataset {path} as Parquet: {error}") from error

    return Source(
        name=str(path),
        read=read,
        count=lambda limit: rows if limit is None else min(rows, limit),
        columns=columns,
    )


def _hub(name: str) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"there is no file or folder {name!r}, and to look for it on the hub needs: "
            "pip install 'datasets>=4'"
        ) from error
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # of the hub, the network or the files: any class
        reason = str(error).strip() or type(error).__name__
        raise DatasetError(
            f"cannot load {name!r}: no such file or folder, and the hub says: {reason}"
        ) from error
    return Source(
        name=name,
        read=lambda: map(dict, table),
        count=lambda limit: len(table) if limit is None else min(len(table), limit),
        columns=tuple(table.column_names),
    )
