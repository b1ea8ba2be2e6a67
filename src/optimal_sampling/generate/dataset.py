"""Datasets: JSON or Parquet files, a folder of them, a dataset of the hub, or `synthetic`.

Rows are read one at a time, and read again in each iteration.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from optimal_sampling.config import DataConfig, expand_user, parse_slice
from optimal_sampling.errors import DatasetError, MissingDependencyError
from optimal_sampling.generate.json_rows import is_json, read_json
from optimal_sampling.prompts import PROMPT_COLUMNS
from optimal_sampling.vocabulary import hub_problem

__all__ = ["Dataset", "open_dataset"]

Row = dict[str, Any]

_SYNTHETIC_ROWS = 100
_HUB_BATCH_ROWS = 64
_KINDS = "JSONL, JSON (also .gz, .zst, .bz2, .xz) or Parquet"
_NO_DATA = {
    "config.json",
    "croissant.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "package.json",
    "state.json",
    "summary.json",
}
"""Files that describe a dataset, by name."""
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""Words in names of files and folders that tell their split."""


@dataclass(frozen=True)
class Source:
    """All rows of a dataset, before any are selected."""

    name: str
    read: Callable[[], Iterator[Row]]
    survey: Callable[[int | None], Survey]
    """Of at most the given number of rows. Raises DatasetError where one cannot be read."""


@dataclass
class Survey:
    """What has been seen of a dataset."""

    rows: int
    columns: Counter[str]
    """In how many rows each column is."""


@dataclass(frozen=True)
class Dataset:
    """The selected rows, each with its index in the whole dataset. Can be iterated repeatedly."""

    source: Source
    total: int
    """Rows before the data slice, after `num_examples`."""
    is_whole: bool
    """No rows follow: `num_examples` left none out."""
    columns: tuple[str, ...]
    """Of all rows; a row may lack some."""
    prompt_column: str
    answer_column: str | None
    selection: range

    def __len__(self) -> int:
        return len(self.selection)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        chosen = self.selection
        rows = enumerate(self.source.read())
        return islice(rows, chosen.start, chosen.stop, chosen.step)

    def with_following(self) -> Iterator[tuple[int, Row, Row | None]]:
        """The selected rows, each with the next row of the whole dataset.

        The row after the last is the first; None in a dataset of one row.
        """
        first = next(self.source.read())
        following = chain(islice(self.source.read(), 1, None), [first])
        rows = zip(count(), self.source.read(), following, strict=False)
        chosen = self.selection
        for index, row, after in islice(rows, chosen.start, chosen.stop, chosen.step):
            yield index, row, None if index == 0 and after is first else after


def open_dataset(config: DataConfig, seed: int) -> Dataset:
    """Find the dataset, check that it can be read and has a prompt column, and select rows.

    `seed` is that of the problems of `synthetic`. Raises DatasetError, MissingDependencyError.
    """
    source = _source(config, seed)
    survey = source.survey(config.num_examples)
    if survey.rows == 0:
        raise DatasetError(f"dataset {source.name} is empty")
    selection = range(survey.rows)[parse_slice(config.data_slice or "0:")]
    if not selection:
        raise DatasetError(
            f"the data slice {config.data_slice} takes none of the {survey.rows} rows "
            f"of {source.name}"
        )
    return Dataset(
        source=source,
        total=survey.rows,
        is_whole=config.dataset != "synthetic" and survey.rows != config.num_examples,
        columns=tuple(survey.columns),
        prompt_column=_prompt_column(config, source.name, survey.columns),
        answer_column=_answer_column(config, source.name, survey.columns),
        selection=selection,
    )


def _prompt_column(config: DataConfig, name: str, columns: Counter[str]) -> str:
    """The column that is asked for, or of PROMPT_COLUMNS the one that most rows have."""
    wanted = (config.prompt_column,) if config.prompt_column else PROMPT_COLUMNS
    found = max(wanted, key=lambda column: columns[column])
    if not columns[found]:
        raise DatasetError(
            f"dataset {name} has no column {' or '.join(wanted)}; it has: {', '.join(columns)}. "
            "Call the one with the prompt `problem`, or name it with `generate --prompt-column`"
        )
    return found


def _answer_column(config: DataConfig, name: str, columns: Counter[str]) -> str | None:
    if config.answer_column and config.answer_column not in columns:
        raise DatasetError(
            f"dataset {name} has no column {config.answer_column}; it has: {', '.join(columns)}"
        )
    return config.answer_column


def _source(config: DataConfig, seed: int) -> Source:
    if config.dataset == "synthetic":
        _check_unused(config, "split", "subset", "revision")
        return _synthetic(seed, config.num_examples or _SYNTHETIC_ROWS)
    try:
        path = expand_user(config.dataset)
        if path.is_dir():
            _check_unused(config, "revision")
            return _folder(path, config)
        if path.exists():
            _check_unused(config, "split", "subset", "revision")
            return _file(path)
    except (OSError, ValueError) as error:  # a name too long for the disk, a NUL in the name
        raise DatasetError(f"dataset {config.dataset[:200]!r} is no path: {error}") from error
    if _is_path(config.dataset):
        raise DatasetError(
            f"dataset {config.dataset} does not exist (looked for {path.absolute()})"
        )
    return _hub(config)


def _check_unused(config: DataConfig, *options: str) -> None:
    for option in options:
        if getattr(config, option) is not None:
            raise DatasetError(f"dataset {config.dataset} has no {option}s; leave --{option} out")


def _is_path(name: str) -> bool:
    """Whether a name that does not exist is a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "~", "/")) or _is_data(Path(name)) or name.count("/") > 1


def _is_data(path: Path) -> bool:
    name = path.name.lower()
    is_hidden = name.startswith(".")
    return not is_hidden and name not in _NO_DATA and (is_json(name) or name.endswith(".parquet"))


def _synthetic(seed: int, rows: int) -> Source:
    from optimal_sampling.toy_pair.problems import synthetic_rows

    def read() -> Iterator[Row]:
        return map(dict, synthetic_rows(seed, rows))

    return Source("synthetic", read, lambda limit: Survey(rows, Counter(next(read()).keys())))


def _file(path: Path) -> Source:
    if path.name.lower().endswith(".parquet"):
        from optimal_sampling.generate.arrow_rows import parquet_shape, read_parquet

        rows, names = parquet_shape(path)
        return Source(str(path), lambda: read_parquet(path), _survey_of(rows, names))
    if is_json(path.name):
        return Source(str(path), lambda: read_json(path), lambda limit: _survey_json(path, limit))
    raise DatasetError(f"the name of dataset {path} has the ending of no known kind: {_KINDS}")


def _survey_of(rows: int, names: list[str]) -> Callable[[int | None], Survey]:
    """The survey of a table: every row has every column."""

    def survey(limit: int | None) -> Survey:
        taken = rows if limit is None else min(rows, limit)
        return Survey(taken, Counter(dict.fromkeys(names, taken)))

    return survey


def _survey_json(path: Path, limit: int | None) -> Survey:
    survey = Survey(0, Counter())
    for row in islice(read_json(path), limit):
        survey.rows += 1
        survey.columns.update(row.keys())
    return survey


def _folder(folder: Path, config: DataConfig) -> Source:
    """The files in a folder; where it has none, those in its subfolders."""
    names = _data_files(folder, folder.iterdir())
    if not names or config.subset:
        names = _data_files(folder, folder.rglob("*"))
    if not names:
        raise DatasetError(f"dataset {folder} is a folder without files of the kinds {_KINDS}")
    names = _choose(folder, names, "subset", config.subset)
    names = _choose(folder, names, "split", config.split)
    parts = [_file(folder / name) for name in names]

    def survey(limit: int | None) -> Survey:
        total = Survey(0, Counter())
        for part in parts:
            found = part.survey(None if limit is None else limit - total.rows)
            total.rows += found.rows
            total.columns.update(found.columns)
            if total.rows == limit:
                break
        return total

    return Source(
        name=str(folder),
        read=lambda: chain.from_iterable(part.read() for part in parts),
        survey=survey,
    )


def _data_files(folder: Path, paths: Iterator[Path]) -> list[Path]:
    """The names, relative to the folder, of data files that lie in no hidden folder."""
    names = [path.relative_to(folder) for path in paths if _is_data(path) and path.is_file()]
    return sorted(name for name in names if not re.search(r"(^|/)[._].*/", name.as_posix()))


def _choose(folder: Path, names: list[Path], kind: str, wanted: str | None) -> list[Path]:
    """The files of a subset or split, or all where they are of at most one. Raises DatasetError."""
    found = {name: _subset_of(name) if kind == "subset" else _split_of(name) for name in names}
    known = sorted({each for each in found.values() if each})
    if wanted is None and len(known) > 1:
        raise DatasetError(
            f"dataset {folder} has several {kind}s: {', '.join(known)}; "
            f"choose one with --{kind}, or all of them with --{kind} all"
        )
    if wanted is None or wanted == "all":
        return names
    chosen = [name for name in names if found[name] == wanted]
    if not chosen:
        raise DatasetError(
            f"dataset {folder} has no {kind} {wanted!r}; it has: {', '.join(known) or 'none'}"
        )
    return chosen


def _split_of(name: Path) -> str:
    """The split that the name of a file, or of a folder it lies in, tells; empty if none does."""
    shard = re.match(r"(\w+)-\d{5}-of-\d{5}", name.name)
    if shard:
        return shard[1]
    for part in reversed(name.parts):
        words = {*re.split(r"[^a-z]+", part.lower())}
        for split, synonyms in _SPLITS.items():
            if words & synonyms:
                return split
    return ""


def _subset_of(name: Path) -> str:
    """The folder of a file, without those of splits; empty if there is none."""
    folders = [part for part in name.parts[:-1] if part != "data" and not _split_of(Path(part))]
    return folders[-1] if folders else ""


def _hub(config: DataConfig) -> Source:
    name = config.dataset
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"there is no file or folder {name!r}, and to look for it on the hub needs: "
            "pip install 'datasets>=4'"
        ) from error
    where = {"revision": config.revision}
    was_read = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    if not was_read.exists() and (problem := hub_problem()):
        raise DatasetError(
            f"cannot load {name!r}: no such file or folder, nothing of that name was downloaded "
            f"before, and {problem}"
        )
    try:
        split = config.split or _only_split(
            name, datasets.get_dataset_split_names(name, config.subset, **where)
        )
        table = datasets.load_dataset(name, config.subset, split=split, **where)
    except DatasetError:
        raise
    except Exception as error:  # of the hub, the network or the files: any class
        reason = " ".join(str(error).split()) or type(error).__name__
        if "config name" in reason.lower():
            reason += " (choose one with --subset)"
        raise DatasetError(
            f"cannot load {name!r}: no such file or folder, and the hub says: {reason}"
        ) from error

    from optimal_sampling.generate.arrow_rows import read_table

    def read() -> Iterator[Row]:
        # As Arrow, so that no image or sound is decoded.
        batches = table.with_format("arrow").iter(_HUB_BATCH_ROWS)
        return chain.from_iterable(map(read_table, batches))

    return Source(name, read, _survey_of(len(table), list(table.column_names)))


def _only_split(name: str, splits: list[str]) -> str:
    """`train`, or the only split of a dataset. Raises DatasetError."""
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise DatasetError(
        f"dataset {name} has several splits: {', '.join(splits)}; choose one with --split"
    )
