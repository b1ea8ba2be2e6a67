"""Verdicts on completions, beside the records: `verdicts/<shard>.jsonl`, keyed like the records.

A verdict names the checksum of the record that was graded. It counts as long as that record does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import (
    Annotated,
    BinaryIO,
    Literal,
    NamedTuple,
    Self,
    TypedDict,
    cast,
    get_args,
    get_type_hints,
)

from optimal_sampling.config import expand_user
from optimal_sampling.records.run_folder import record_lines
from optimal_sampling.records.schema import Key, Record, key_of
from optimal_sampling.records.store import RecordFile, Scan, decode_line

__all__ = [
    "MEANINGS",
    "VERDICTS",
    "Graded",
    "Subject",
    "Verdict",
    "VerdictFile",
    "all_verdicts",
    "graded_records",
    "load_verdicts",
]

Verdict = Literal["correct", "wrong", "no_answer", "truncated", "skipped"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Graded(TypedDict):
    """One line of a file of verdicts: type and meaning of each field, in order."""

    id: Annotated[str, "that of the record"]
    sample_index: Annotated[int, "that of the record; with `id` the identity of a record"]
    verdict: Annotated[
        Verdict,
        "`correct`, `wrong`, `no_answer`, `truncated` (ended by length) or `skipped` "
        "(no usable reference, or the grader raised an error)",
    ]
    answer: Annotated[str | None, "the answer that was found in the completion"]
    reference: Annotated[str | None, "the reference answer that was found in the row"]
    grader: Annotated[str, "`math`, `synthetic`, or `FILE.py:function@` with a hash of the file"]
    record: Annotated[str, "`checksum` of the record that was graded"]
    detail: Annotated[str | None, "why, where the verdict alone does not say it"]
    failed: Annotated[bool, "the grader took too long, died or raised an error on this completion"]


MEANINGS: dict[str, str] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Graded, include_extras=True).items()
}
"""Meaning of each field of Graded, as in docs/records.md."""


class Subject(NamedTuple):
    """What a verdict is about. Another subject needs another verdict."""

    record: str
    """`checksum` of the record."""
    reference: str | None
    grader: str


class VerdictFile:
    """The only writer of a shard's verdicts, under a lock; its torn tail is cut.

    `append` commits by itself, as RecordFile does. Raises RunFolderError, StorageError.
    """

    def __init__(self, run: str | Path, shard: str) -> None:
        self._file = RecordFile(expand_user(run) / "verdicts" / f"{shard}.jsonl")
        self._latest: dict[Key, tuple[Subject, Verdict, bool]] = {}
        try:
            scan = Scan(self._file.path)
            for graded in _verdicts(scan):
                self._count(graded)
            self._file.open(scan)
        except BaseException:
            self._file.close()
            raise
        self.torn_lines = scan.torn_lines
        """Lines cut from the end of the file."""
        self.bad_lines = scan.bad_lines
        """Damaged lines; their records are graded again."""

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    def _count(self, graded: Graded) -> None:
        subject = Subject(graded["record"], graded["reference"], graded["grader"])
        key = graded["id"], graded["sample_index"]
        self._latest[key] = subject, graded["verdict"], graded["failed"]

    def has(self, key: Key, subject: Subject, *, failed: bool = True) -> bool:
        """Whether the last verdict on a sample is about this subject.

        Without `failed`, verdicts of graders that failed do not count.
        """
        latest, _, has_failed = self._latest.get(key, (None, None, False))
        return latest == subject and (failed or not has_failed)

    def verdict(self, key: Key) -> Verdict | None:
        """The last verdict on a sample; None where there is none."""
        return self._latest[key][1] if key in self._latest else None

    def counts(self) -> Counter[str]:
        """How many samples have each verdict, by the last verdict on each."""
        return Counter(verdict for _, verdict, _ in self._latest.values())

    @property
    def failed(self) -> int:
        """Samples on which the grader failed, by the last verdict on each."""
        return sum(has_failed for _, _, has_failed in self._latest.values())

    def append(self, graded: Graded) -> None:
        """Add a verdict. It is on the disk after the next commit."""
        self._file.append(graded)
        self._count(graded)

    def commit(self) -> None:
        """Write and fsync the waiting verdicts, all or none."""
        self._file.commit()

    def close(self) -> None:
        """Commit the waiting verdicts and release the file. Closing twice is safe."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _verdicts(scan: Scan) -> Iterator[Graded]:
    return (cast(Graded, line) for line in scan)


def all_verdicts(run: str | Path) -> dict[tuple[Key, Subject], Verdict]:
    """The last verdict of all shards on each sample and subject."""
    found: dict[tuple[Key, Subject], Verdict] = {}
    for path in sorted((expand_user(run) / "verdicts").glob("*.jsonl")):
        for graded in _verdicts(Scan(path)):
            subject = Subject(graded["record"], graded["reference"], graded["grader"])
            found[(graded["id"], graded["sample_index"]), subject] = graded["verdict"]
    return found


def graded_records(
    run: str | Path, *, failed: bool = False
) -> Iterator[tuple[Record, Graded | None]]:
    """The records of a run folder that `load` yields, each with its verdict.

    The last verdict counts, and none that is about another record of the same identity. Keeps the
    places of the verdicts in memory, not the verdicts. Raises RunFolderError.
    """
    paths = sorted((expand_user(run) / "verdicts").glob("*.jsonl"))
    places: dict[str, tuple[int, int]] = {}
    for number, path in enumerate(paths):
        for line in Scan(path).lines():
            places[cast(Graded, line.record)["record"]] = number, line.start
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("rb")) for path in paths]
        for _, line in record_lines(run, failed=failed):
            number, start = places.get(line.checksum, (-1, 0))
            graded = _verdict_at(files[number], start) if number >= 0 else None
            is_own = graded is not None and _key_of(graded) == key_of(line.record)
            yield line.record, graded if is_own else None


def _verdict_at(file: BinaryIO, start: int) -> Graded | None:
    file.seek(start)
    return cast(Graded | None, decode_line(file.readline()))


def _key_of(graded: Graded) -> Key:
    return graded["id"], graded["sample_index"]


def load_verdicts(run: str | Path) -> dict[Key, Graded]:
    """The verdict of each good record that has one. Raises RunFolderError."""
    return {key_of(record): graded for record, graded in graded_records(run) if graded}
