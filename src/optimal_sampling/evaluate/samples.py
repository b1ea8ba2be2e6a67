"""A run folder and its verdicts -> graded samples, as `statistics` takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optimal_sampling.errors import RunFolderError
from optimal_sampling.evaluate.hedging import hedging_share
from optimal_sampling.evaluate.statistics import Sample
from optimal_sampling.records.run_folder import load
from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded, graded_records

__all__ = ["graded_samples", "leave_out"]


def graded_samples(run: Path, questions: int, samples: int) -> list[Sample]:
    """The first `samples` samples of the first `questions` rows of a run folder.

    A sample that failed counts as one without an answer. Raises RunFolderError where a good one
    has no verdict.
    """
    failed = [(record, None) for record in load(run, failed=True) if record["error"]]
    return [
        _sample(run, record, graded)
        for record, graded in (*graded_records(run), *failed)
        if record["row_index"] < questions and record["sample_index"] < samples
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


def leave_out(samples: Mapping[str, Sequence[Sample]]) -> dict[str, list[Sample]]:
    """The same samples by checkpoint, with questions skipped in all that are skipped in one.

    Whether a reference can be used may show only where a completion has an answer to compare.
    """
    skipped = {each.question for each in _all(samples) if each.verdict == "skipped"}
    return {
        checkpoint: [
            replace(each, verdict="skipped") if each.question in skipped else each for each in found
        ]
        for checkpoint, found in samples.items()
    }


def _all(samples: Mapping[str, Sequence[Sample]]) -> Iterable[Sample]:
    return (each for found in samples.values() for each in found)
