"""What the page is made of: run folders with their state, and output folders of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records.run_folder import Totals
from optimal_sampling.records.schema import Record
from optimal_sampling.records.store import damaged_lines, is_locked, read_json
from optimal_sampling.records.verdicts import Graded, graded_records

__all__ = ["Evaluation", "RunSource", "open_folders"]


@dataclass(frozen=True)
class Evaluation:
    """The scores of an output folder of `evaluate`."""

    name: str
    summary: Mapping[str, Any]
    """As in `results.json`."""


@dataclass(frozen=True)
class RunSource:
    """A run folder as it is now."""

    name: str
    """What tells it from the others on the page."""
    path: Path
    options: Mapping[str, Any]
    """That all calls on the folder share; empty where `config.json` cannot be read."""
    calls: Sequence[Mapping[str, Any]] = ()
    """The summaries of its last calls, one per shard."""
    notes: Sequence[str] = field(default=())
    """What is not as in a finished run."""

    def records(self) -> Iterator[tuple[Record, Graded | None]]:
        """Good records with their verdicts, and the last one of each sample that failed."""
        if _record_files(self.path):
            yield from graded_records(self.path, failed=True)

    @property
    def asked(self) -> int | None:
        """Samples asked for; None before a call has ended."""
        return sum(call.get("asked", 0) for call in self.calls) if self.calls else None

    def owed(self, totals: Totals) -> int | None:
        """Samples that are still to be made."""
        return None if self.asked is None else max(0, self.asked - totals.records)


def open_folders(paths: Sequence[str]) -> tuple[list[RunSource], list[Evaluation]]:
    """The folders of a page. Raises ConfigError, RunFolderError."""
    if not paths:
        raise ConfigError("name the run folders: optimal-sampling report outputs/run")
    runs, evaluations = [], []
    folders = [expand_user(path) for path in paths]
    for folder, name in zip(folders, _names(folders), strict=True):
        if (folder / "results.json").is_file():
            evaluations.append(Evaluation(name, _results(folder)))
        else:
            runs.append(_open_run(folder, name))
    return runs, evaluations


def _results(folder: Path) -> dict[str, Any]:
    summary = read_json(folder / "results.json")
    if not isinstance(summary.get("rows"), list) or not isinstance(summary.get("metrics"), list):
        raise RunFolderError(f"{folder / 'results.json'} does not hold the scores of `evaluate`")
    return summary


def _open_run(folder: Path, name: str) -> RunSource:
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}")
    files = _record_files(folder)
    if not files and not (folder / "config.json").exists():
        raise RunFolderError(
            f"{folder} is no run folder: it has neither {folder / 'records'}/*.jsonl nor a "
            "config.json, and no results.json of `evaluate`"
        )
    options, notes = _options(folder)
    calls, more = _calls(folder)
    notes = [*_state_notes(folder, files, bool(calls)), *notes, *more]
    return RunSource(name, folder, options, calls, notes)


def _state_notes(folder: Path, files: Sequence[Path], has_ended: bool) -> Iterator[str]:
    if any(is_locked(path) for path in files):
        yield "A process is still writing this run. The page has what was there."
    elif not has_ended:
        yield "No call on this run has come to its end: how much is owed is not known."
    if not any(path.stat().st_size for path in files):
        yield "There are no records yet."
    damaged = sum(map(damaged_lines, files))
    if damaged:
        yield f"{damaged} damaged or torn lines are left out; their samples are owed again."


def _options(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    try:
        compared = read_json(folder / "config.json").get("compared")
    except RunFolderError as error:
        return {}, [f"Its options are not known: {error}"]
    if isinstance(compared, dict):
        return compared, []
    return {}, [f"Its options are not known: {folder / 'config.json'} does not hold them."]


def _calls(folder: Path) -> tuple[list[Mapping[str, Any]], list[str]]:
    calls: list[Mapping[str, Any]] = []
    notes: list[str] = []
    for path in sorted(folder.glob("summary*.json")):
        try:
            calls.append(read_json(path))
        except RunFolderError as error:
            notes.append(str(error))
    return calls, notes


def _record_files(folder: Path) -> list[Path]:
    return sorted((folder / "records").glob("*.jsonl"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    depth = 1
    while True:
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names) or depth > max(map(len, parts)):
            return names
        depth += 1
