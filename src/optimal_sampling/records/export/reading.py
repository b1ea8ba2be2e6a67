"""Run folders -> one small entry per record, and the records again, in the order of the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records.export.options import MODE_OF_KIND, ExportOptions
from optimal_sampling.records.run_folder import differences, record_lines
from optimal_sampling.records.schema import Key, Record, key_of
from optimal_sampling.records.store import Line, Scan, decode_line, read_json
from optimal_sampling.records.verdicts import Verdict

__all__ = ["Entry", "Run", "content_hash", "index", "open_runs", "records_of", "student_run"]


@dataclass(frozen=True)
class Run:
    """A run folder and its options."""

    path: Path
    compared: Mapping[str, Any]
    """Options that all calls on the folder share."""
    may_differ: Mapping[str, Any]

    @property
    def mode(self) -> str:
        """What its tokens were drawn from; of stages `mixture`."""
        return str(self.compared.get("mode", "mixture"))

    @property
    def stages(self) -> Sequence[Mapping[str, Any]]:
        """The options of its stages; empty for a run without."""
        return self.compared.get("stages") or ()


@dataclass(slots=True)
class Entry:
    """What selection needs of a good record."""

    run: int
    """Which of the runs."""
    file: Path
    offset: int
    """Of its line in the file, in bytes."""
    key: Key
    row_index: int
    prompt: bytes
    """Hash of the student's prompt: what makes two rows the same prompt, in all kinds of runs."""
    completion: bytes
    """Hash of the completion's ids."""
    tokens: int
    truncated: bool
    end: int | None
    """Id of the end token that was drawn; None where there is none."""
    log_p_student: float | None
    verdict: Verdict | None
    tries: int = 0
    """Tries of the prompt up to this one, in a run of stages; else 0."""


def content_hash(content: str | bytes) -> bytes:
    """16 bytes."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return blake2b(data, digest_size=16).digest()


def open_runs(options: ExportOptions) -> list[Run]:
    """The run folders of an export. Raises RunFolderError where they do not belong together."""
    if not options.runs:
        raise ConfigError("name the run folders: optimal-sampling export outputs/run")
    runs = [_open(expand_user(run)) for run in options.runs]
    wanted = MODE_OF_KIND.get(options.kind)
    for run in runs:
        if wanted is not None and run.mode != wanted:
            fits = [kind for kind, mode in MODE_OF_KIND.items() if mode == run.mode]
            raise RunFolderError(
                f"{run.path} was drawn with --mode {run.mode}, and --kind {options.kind} needs "
                f"--mode {wanted}; take --kind {' or '.join(fits)}, or another run"
            )
    if not options.mix:
        _check_same(runs)
    return runs


def _open(path: Path) -> Run:
    if not _has_records(path):
        raise RunFolderError(f"{path} holds no records (no {path / 'records'}/*.jsonl)")
    document = read_json(path / "config.json")
    compared, may_differ = (document.get(name, {}) for name in ("compared", "may_differ"))
    if not isinstance(compared, dict) or not isinstance(may_differ, dict) or not compared:
        raise RunFolderError(
            f"{path / 'config.json'} does not hold the options of a run; restore it, or generate "
            "the run again"
        )
    return Run(path, compared, may_differ)


def _has_records(path: Path) -> bool:
    return any((path / "records").glob("*.jsonl"))


def _check_same(runs: list[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        form = "  {name}: {before!r} there, {now!r} in the other"
        changed = differences(first.compared, other.compared, form)
        if changed:
            raise RunFolderError(
                f"{first.path} and {other.path} were made with different options:\n"
                + "\n".join(changed)
                + "\nExport them on their own, or together with --mix"
            )


def student_run(options: ExportOptions, runs: list[Run]) -> Run | None:
    """The run of the student alone: the one that is named, or the only one beside the first run."""
    if options.student_run is not None:
        named = _open(expand_user(options.student_run))
        if named.mode != "student":
            raise RunFolderError(
                f"{named.path} was drawn with --mode {named.mode}; --student-run is a run with "
                "--mode student"
            )
        return named
    first = runs[0]
    folders = sorted(path.parent for path in first.path.absolute().parent.glob("*/config.json"))
    same = ("dataset", "student")
    beside = [
        run
        for run in _readable(folders)
        if run.mode == "student"
        and run.path != first.path.absolute()
        and all(run.compared.get(name) == first.compared.get(name) for name in same)
    ]
    return beside[0] if len(beside) == 1 else None


def _readable(folders: Iterable[Path]) -> Iterator[Run]:
    """The run folders among some folders; those that are broken are none of this export's."""
    for path in folders:
        with suppress(RunFolderError):
            if _has_records(path):
                yield _open(path)


def index(runs: list[Run]) -> tuple[list[Entry], int]:
    """Entries of the good records in the order of the dataset; and the number of failed samples.

    A sample that two folders with the same options hold is taken once. Raises RunFolderError.
    """
    found: dict[tuple[int, Key], Entry] = {}
    failed: set[tuple[int, Key]] = set()
    groups = _groups(runs)
    for number, run in enumerate(runs):
        verdicts = _verdicts(run.path)
        for shard, line in record_lines(run.path, failed=True):
            place = groups[number], key_of(line.record)
            if line.record["error"]:
                failed.add(place)
            elif place not in found:
                file = run.path / "records" / f"{shard}.jsonl"
                found[place] = _entry(number, file, line, verdicts)
    entries = sorted(
        found.values(), key=lambda each: (each.run, each.row_index, each.tries, *each.key)
    )
    return entries, len(failed - found.keys())


def _groups(runs: list[Run]) -> list[int]:
    """Per run, the first run that has the same options."""
    options = [run.compared for run in runs]
    return [options.index(each) for each in options]


_Verdicts = Mapping[tuple[Key, str], Verdict]


def _verdicts(run: Path) -> _Verdicts:
    """The last verdict by the identity and the checksum of the record that it is about."""
    found: dict[tuple[Key, str], Verdict] = {}
    for path in sorted((run / "verdicts").glob("*.jsonl")):
        for graded in map(dict[str, Any], Scan(path)):
            key = graded["id"], graded["sample_index"]
            found[key, graded["record"]] = graded["verdict"]
    return found


def _entry(run: int, file: Path, line: Line, verdicts: _Verdicts) -> Entry:
    record = line.record
    ids = record["completion_ids"]
    return Entry(
        run=run,
        file=file,
        offset=line.start,
        key=key_of(record),
        row_index=record["row_index"],
        prompt=content_hash(record["student_prompt"]),
        completion=content_hash(",".join(map(str, ids))),
        tokens=record["n_completion_tokens"],
        truncated=record["finish_reason"] == "length",
        end=ids[-1] if record["finish_reason"] == "stop" else None,
        log_p_student=record.get("log_p_student"),
        verdict=verdicts.get((key_of(record), line.checksum)),
        tries=record.get("tries", 0),
    )


def records_of(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Record]]:
    """The records of entries, one at a time. Raises RunFolderError where a file has changed."""
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for entry in entries:
            if entry.file not in files:
                files[entry.file] = stack.enter_context(entry.file.open("rb"))
            file = files[entry.file]
            file.seek(entry.offset)
            record = decode_line(file.readline())
            if record is None or key_of(record) != entry.key:
                raise RunFolderError(f"{entry.file} changed while it was exported; export it again")
            yield entry, record
