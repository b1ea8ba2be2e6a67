"""Run folders -> verdicts: of the records that are there, or of each as it is made."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Self

from optimal_sampling.config import Regrade, VerifyConfig, VerifyOptions, expand_user
from optimal_sampling.errors import (
    ConfigError,
    OptimalSamplingError,
    RunFolderError,
    did_you_mean,
)
from optimal_sampling.records.run_folder import record_lines
from optimal_sampling.records.schema import Key, Record, key_of
from optimal_sampling.records.store import Line, read_json
from optimal_sampling.records.verdicts import (
    Graded,
    Subject,
    Verdict,
    VerdictFile,
    all_verdicts,
)
from optimal_sampling.verify.answers import REFERENCE_FIELDS, Block, ends_in_thinking, reference_of
from optimal_sampling.verify.graders import Grade, GraderSpec, Task
from optimal_sampling.verify.pool import GraderPool
from optimal_sampling.verify.progress import GradeProgress, GradeTally
from optimal_sampling.vocabulary import load_tokens
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS, thinking_blocks

__all__ = ["Grading", "Interrupted", "Source", "check_columns", "verify"]

_MOST_PENDING = 1000  # completions of a run that wait for a grader; the others wait on the disk

Tag = tuple[Key, Subject]


class Interrupted(KeyboardInterrupt):
    """The grading was interrupted by Ctrl-C; see `tally`. Finished verdicts are on the disk."""

    def __init__(self, tally: GradeTally) -> None:
        super().__init__(tally)
        self.tally = tally


@dataclass(frozen=True)
class Source:
    """How the records of a run become tasks for a grader."""

    grader: GraderSpec
    reference: str | None
    """Column with the reference answer; None: one of REFERENCE_FIELDS."""
    find_blocks: Callable[[], tuple[Block, ...]] = lambda: KNOWN_BLOCKS

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Markers of reasoning of the run's models."""
        return self.find_blocks()

    def can_grade(self, row: Mapping[str, Any]) -> bool:
        """Whether a completion can be `correct`. A function of the user needs no answer."""
        return self.grader.path is not None or reference_of(row, self.reference) is not None

    def subject(self, record: Record, checksum: str) -> Subject:
        """What a verdict on a record would be about."""
        return Subject(checksum, reference_of(record["row"], self.reference), self.grader.name)

    def task(self, record: Record, reference: str | None) -> Task:
        """The task of grading a record."""
        role = "teacher" if record.get("mode") == "teacher" else "student"
        prompt = record["teacher_prompt"] if role == "teacher" else record["student_prompt"]
        return Task(
            completion=record["completion"],
            reference=reference,
            finish_reason=record["finish_reason"],
            in_thinking=ends_in_thinking(prompt, self.blocks),
            row=record["row"] if self.grader.path else {},
            blocks=self.blocks,
        )


def verify(
    runs: Sequence[str | Path], options: VerifyOptions, progress: GradeProgress | None = None
) -> GradeTally:
    """Grade every good record of run folders that has no verdict yet.

    Raises Interrupted for Ctrl-C, and an OptimalSamplingError where the grading as a whole cannot
    go on; in both cases every finished verdict is on the disk.
    """
    progress = progress or GradeProgress()
    folders = [expand_user(run) for run in runs]
    counts = {folder: _count_lines(folder) for folder in folders}
    if empty := [str(folder) for folder, count in counts.items() if not count]:
        raise RunFolderError(f"{', '.join(empty)} holds no records in records/*.jsonl")
    tally = GradeTally(sum(counts.values()))
    pool: GraderPool[Tag] = GraderPool(
        options.grader,
        workers=options.workers,
        timeout=options.timeout,
        memory_gib=options.memory_gib,
    )
    if pool.spec.path is None or options.reference is not None:
        for folder in folders:
            _check_references(folder, options.reference)
    try:
        with progress, pool:
            for folder in folders:
                with closing(_grade_folder(folder, pool, options, tally)) as verdicts:
                    for graded in verdicts:
                        tally.add(graded)
                        progress.update(tally, pool.pending)
            progress.update(tally, 0, is_last=True)
    except KeyboardInterrupt:
        raise Interrupted(tally) from None
    return tally


def _check_references(folder: Path, reference: str | None) -> None:
    """Raise ConfigError where no record of a run folder has a reference answer.

    Before the first verdict: a mistyped column must not replace the verdicts that are there.
    """
    rows = (line.record["row"] for _, line in record_lines(folder))
    first = next(rows, None)
    if first is None:
        return
    column = _column(folder, reference)
    if any(reference_of(row, column) is not None for row in chain([first], rows)):
        return
    raise ConfigError(f"{folder}: {_no_reference(column, first)}")


def _column(folder: Path, reference: str | None) -> str | None:
    """Column with the reference answers; None: one of the usual names."""
    return reference or _options_of(folder).get("answer_column")


def _options_of(folder: Path) -> dict[str, Any]:
    options = read_json(folder / "config.json").get("compared")
    return options if isinstance(options, dict) else {}


def _count_lines(folder: Path) -> int:
    """Lines of the files of records: of the good ones, and of failed attempts."""
    count = 0
    for path in (folder / "records").glob("*.jsonl"):
        with path.open("rb") as file:
            count += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return count


def _grade_folder(
    folder: Path, pool: GraderPool[Tag], options: VerifyOptions, tally: GradeTally
) -> Generator[Graded, None, None]:
    """Grade the shards of a run folder, each into its own file of verdicts."""
    source: Source | None = None
    for shard, group in groupby(record_lines(folder), key=lambda item: item[0]):
        lines = tally.counted(line for _, line in group)
        with VerdictFile(folder, shard) as file:
            source = source or _source_of(folder, pool.spec, options.reference)
            yield from _grade_lines(lines, (file, pool, source), options.regrade)


def _source_of(folder: Path, grader: GraderSpec, reference: str | None) -> Source:
    """References and markers of a run folder, by its `config.json`."""
    options = _options_of(folder)
    column = _column(folder, reference)
    if grader.name != "math":  # other graders do not look for the answer
        return Source(grader, column)
    return Source(grader, column, lambda: _blocks_of(options))


def _blocks_of(options: dict[str, str]) -> tuple[Block, ...]:
    """Markers that the chat templates of a run's models write, and the known ones.

    A model that is no longer there leaves the known ones.
    """
    found: list[Block] = []
    for name in {options.get("student"), options.get("teacher")} - {None}:
        try:
            found += thinking_blocks(load_tokens(str(name)).tokenizer)
        except OptimalSamplingError:
            continue
    return tuple(dict.fromkeys((*found, *KNOWN_BLOCKS)))


def _grade_lines(
    lines: Iterable[Line],
    tools: tuple[VerdictFile, GraderPool[Tag], Source],
    regrade: Regrade = "none",
) -> Generator[Graded, None, None]:
    """Grade the records that need it; each verdict, once it has been written."""
    file, pool, source = tools

    def owed() -> Iterator[tuple[Tag, Task]]:
        for line in lines:
            key, subject = key_of(line.record), source.subject(line.record, line.checksum)
            if regrade == "all" or not file.has(key, subject, failed=regrade == "none"):
                yield (key, subject), source.task(line.record, subject.reference)

    for tag, grade in pool.map(owed()):
        graded = _graded(tag, grade)
        file.append(graded)
        yield graded


def _graded(tag: Tag, grade: Grade) -> Graded:
    """The line of a verdict."""
    (prompt_id, sample_index), subject = tag
    return Graded(
        id=prompt_id,
        sample_index=sample_index,
        verdict=grade.verdict,
        answer=grade.answer,
        reference=subject.reference,
        grader=subject.grader,
        record=subject.record,
        detail=grade.detail,
        failed=grade.failed,
    )


class Grading:
    """Verdicts on the records of a shard as they are made, in processes beside the engine.

    A context manager. What is not graded when it closes is owed: `finish` of a later call grades
    it. Raises ConfigError where the grader cannot be loaded, RunFolderError, StorageError.
    """

    def __init__(self, run: str | Path, shard: str, source: Source, config: VerifyConfig) -> None:
        self._run, self._shard, self.source = Path(run), shard, source
        self._pool: GraderPool[Tag] = GraderPool(
            source.grader, workers=config.verify_workers, timeout=config.verify_timeout
        )
        self._file = VerdictFile(run, shard)
        self._all_submitted = False

    def check(self) -> None:
        """Load the grader, or raise what is wrong with it."""
        self._pool.check()

    def add(self, record: Record, checksum: str) -> None:
        """Have a record graded soon, and write the verdicts that are ready.

        Where too many wait already, the record waits on the disk for `finish`.
        """
        self._store(self._pool.ready())
        if record["error"]:
            return
        if self._pool.pending >= _MOST_PENDING:
            self._all_submitted = False
            return
        subject = self.source.subject(record, checksum)
        task = self.source.task(record, subject.reference)
        self._pool.submit((key_of(record), subject), task)

    def finish(self) -> dict[str, int]:
        """Grade all records of the shard that have no verdict; how many have each verdict.

        The records are on the disk. They are read only if some were not graded as they were made.
        """
        self._store(self._pool.drain())
        if not self._all_submitted:
            lines = (line for shard, line in record_lines(self._run) if shard == self._shard)
            for _ in _grade_lines(lines, (self._file, self._pool, self.source)):
                pass
            self._all_submitted = True
        self._file.commit()
        return dict(self._file.counts())

    def settle(self, ids: Container[str]) -> dict[Key, Verdict]:
        """The verdicts on all records with these ids, whatever their shard; missing ones are made.

        Called before any record is added.
        """
        known = all_verdicts(self._run)
        found: dict[Key, Verdict] = {}

        def owed() -> Iterator[Line]:
            for _, line in record_lines(self._run):
                tag = key_of(line.record), self.source.subject(line.record, line.checksum)
                if tag in known:
                    found[tag[0]] = known[tag]
                elif line.record["id"] in ids:
                    yield line

        for graded in _grade_lines(owed(), (self._file, self._pool, self.source)):
            found[graded["id"], graded["sample_index"]] = graded["verdict"]
        return {key: verdict for key, verdict in found.items() if key[0] in ids}

    def verdict(self, key: Key) -> Verdict | None:
        """The verdict on a record of this shard; None where it is not graded yet."""
        return self._file.verdict(key)

    @property
    def failed(self) -> int:
        """Records of the shard on which the grader failed."""
        return self._file.failed

    def _store(self, grades: Iterable[tuple[Tag, Grade]]) -> None:
        for tag, grade in grades:
            self._file.append(_graded(tag, grade))

    def close(self) -> None:
        """Write what is ready, drop what is pending, and end the processes."""
        try:
            self._store(self._pool.ready())
        finally:
            self._pool.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_columns(columns: Sequence[str], reference: str | None) -> None:
    """Raise ConfigError where a dataset with these columns has no reference answers."""
    looked_for = {*REFERENCE_FIELDS} if reference is None else {reference}
    if not looked_for & {*columns}:
        raise ConfigError(_no_reference(reference, columns))


def _no_reference(column: str | None, columns: Iterable[str]) -> str:
    looked_for = column or ", ".join(REFERENCE_FIELDS)
    near = did_you_mean(column, columns) if column else ""
    return (
        f"no row has a reference answer to grade with (looked for {looked_for}{near}; "
        f"the columns are: {', '.join(columns)}); name its column with --reference"
    )
