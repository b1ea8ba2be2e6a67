"""A run folder and its verdicts -> graded samples, as `statistics` takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from optimal_sampling.errors import RunFolderError
from optimal_sampling.evaluate.benchmarks import Questions
from optimal_sampling.evaluate.hedging import hedging_share
from optimal_sampling.evaluate.statistics import Sample
from optimal_sampling.records.run_folder import load
from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded, graded_records
from optimal_sampling.verify import GraderPool, Task
from optimal_sampling.verify.answers import reference_of

__all__ = ["failures", "graded_samples", "rows_without_reference"]


def rows_without_reference(questions: Sequence[Questions]) -> dict[str, frozenset[int]]:
    """By benchmark the rows whose reference answer cannot be read, whatever is compared with it."""
    found: dict[str, set[int]] = {each.benchmark.name: set() for each in questions}
    for grader in dict.fromkeys(each.benchmark.grader for each in questions):
        tasks = [
            ((each.benchmark.name, place), Task("", reference_of(row, "answer")))
            for each in questions
            if each.benchmark.grader == grader
            for place, row in enumerate(each.rows())
        ]
        with GraderPool[tuple[str, int]](grader) as pool:
            for (name, place), grade in pool.map(tasks):
                if grade.verdict == "skipped":
                    found[name].add(place)
    return {name: frozenset(rows) for name, rows in found.items()}


def failures(run: Path, rows: Set[int], samples: int) -> Counter[str]:
    """How many of the first `samples` samples of these rows failed, by reason."""
    return Counter(
        record["error"]
        for record in load(run, failed=True)
        if record["error"] and record["row_index"] in rows and record["sample_index"] < samples
    )


def graded_samples(run: Path, rows: range, samples: int, skipped: Set[int]) -> list[Sample]:
    """The first `samples` samples of these rows of a run folder; those of `skipped` rows as such.

    A sample that failed counts as one without an answer. Raises RunFolderError where a good one
    has no verdict, or a row no sample.
    """
    failed = [(record, None) for record in load(run, failed=True) if record["error"]]
    found = [
        (record, graded)
        for record, graded in (*graded_records(run), *failed)
        if record["row_index"] in rows and record["sample_index"] < samples
    ]
    if missing := {*rows} - {record["row_index"] for record, _ in found}:
        raise RunFolderError(
            f"{run}: {len(missing)} of {len(rows)} questions have no completion of their own (row "
            f"{min(missing) + 1} of the questions is the first): their prompts are those of others"
        )
    return [
        replace(_sample(run, record, graded), verdict="skipped")
        if record["row_index"] in skipped
        else _sample(run, record, graded)
        for record, graded in found
    ]


def _sample(run: Path, record: Record, graded: Graded | None) -> Sample:
    if graded is None and not record["error"]:
        raise RunFolderError(
            f"{run}: sample {record['sample_index']} of row {record['row_index']} has no verdict; "
            "run the same command again"
        )
    return Sample(
        question=f"{record['row_index']:06d}",
        sample_index=record["sample_index"],
        verdict=graded["verdict"] if graded else "no_answer",
        answer=graded["answer"] if graded else None,
        tokens=record["n_completion_tokens"],
        hedging=hedging_share(record["completion"]),
    )
