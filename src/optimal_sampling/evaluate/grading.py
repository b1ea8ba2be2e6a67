"""Verdicts for every good record of a run folder that has none by the benchmark's grader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from optimal_sampling.records.run_folder import record_lines
from optimal_sampling.records.store import Line
from optimal_sampling.records.verdicts import Graded, VerdictFile
from optimal_sampling.verify import Grade, GraderPool, Task, resolve_grader
from optimal_sampling.verify.answers import ends_in_thinking, reference_of
from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS

__all__ = ["grade_run"]


def grade_run(run: Path, grader: str) -> None:
    """Grade what has no verdict. Raises what `GraderPool` and `VerdictFile` raise."""
    spec = resolve_grader(grader)
    with VerdictFile(run, "main") as file:
        lines = list(_ungraded(run, file, spec.name))
        if not lines:
            return
        with GraderPool[Line](spec) as pool:
            for line, grade in pool.map((line, _task(line)) for line in lines):
                file.append(_graded(line, grade, spec.name))


def _ungraded(run: Path, file: VerdictFile, grader: str) -> Iterator[Line]:
    for _, line in record_lines(run):
        latest = file.latest((line.record["id"], line.record["sample_index"]))
        same = latest and (latest["record"], latest["grader"]) == (line.checksum, grader)
        if not same:
            yield line


def _task(line: Line) -> Task:
    record = line.record
    return Task(
        completion=record["completion"],
        reference=reference_of(record["row"], "answer"),
        finish_reason=record["finish_reason"],
        in_thinking=ends_in_thinking(record["student_prompt"], KNOWN_BLOCKS),
        row=record["row"],
    )


def _graded(line: Line, grade: Grade, grader: str) -> Graded:
    record = line.record
    return Graded(
        id=record["id"],
        sample_index=record["sample_index"],
        verdict=grade.verdict,
        answer=grade.answer,
        reference=reference_of(record["row"], "answer"),
        grader=grader,
        record=line.checksum,
        detail=grade.detail,
        failed=grade.failed,
    )
