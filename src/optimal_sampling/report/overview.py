"""What the page says of a whole run: counts, means, verdicts, lengths, stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from optimal_sampling.evaluate.statistics import interval
from optimal_sampling.generate.progress import MEANS_SHOWN
from optimal_sampling.generate.stage_counts import StageCounts
from optimal_sampling.records.run_folder import Totals
from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import VERDICTS, Graded
from optimal_sampling.report.folders import RunSource
from optimal_sampling.report.profiles import Profiles

__all__ = ["RunOverview"]

_ERRORS_SHOWN = 5
_LENGTH_BINS = 40


@dataclass
class RunOverview:
    """Sums over the records of a run, of the same size for any number of tokens."""

    totals: Totals = field(default_factory=Totals)
    failures: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    right: dict[int, list[int]] = field(default_factory=dict)
    """Per row: correct samples, and samples that a score counts."""
    profiles: Profiles = field(default_factory=Profiles)
    stages: StageCounts = field(default_factory=StageCounts)

    def add(self, record: Record, graded: Graded | None) -> None:
        """Count a record."""
        if record["error"]:
            self.failures[record["error"]] += 1
            return
        self.totals.add(record)
        self.profiles.add(record)
        self.stages.add(record, graded)
        self.lengths[record["n_completion_tokens"]] += 1
        if graded is not None:
            self.verdicts[graded["verdict"]] += 1
            self._count_right(record["row_index"], graded)

    def _count_right(self, row: int, graded: Graded) -> None:
        if graded["verdict"] == "skipped":
            return
        counts = self.right.setdefault(row, [0, 0])
        counts[0] += graded["verdict"] == "correct"
        counts[1] += 1

    def data(self, run: RunSource) -> dict[str, Any]:
        """All of it, as the page has it."""
        names = [stage["name"] for stage in run.options.get("stages") or ()]
        return {
            "good": self.totals.records,
            "failed": self.failures.total(),
            "owed": run.owed(self.totals),
            "tokens": self.totals.tokens,
            "means": self._means(),
            "finish": dict(sorted(self.totals.finish_reasons.items())),
            "verdicts": {name: self.verdicts[name] for name in VERDICTS if self.verdicts[name]},
            "accuracy": self._accuracy(bool(names)),
            "errors": self.failures.most_common(_ERRORS_SHOWN),
            "more_errors": max(0, len(self.failures) - _ERRORS_SHOWN),
            "lengths": _histogram(self.lengths),
            "profiles": self.profiles.data(),
            "unit": self.profiles.unit,
            "stages": [{"name": k, **v} for k, v in self.stages.numbers(names).items()],
            "calls": [_call(each) for each in run.calls if each.get("tokens")],
        }

    def _means(self) -> list[tuple[str, float]]:
        means = self.totals.means()
        titles = {**MEANS_SHOWN, "vetoed": "vetoed share of the student's mass"}
        return [(titles[name], mean) for name in titles if (mean := means.get(name)) is not None]

    def _accuracy(self, has_stages: bool) -> dict[str, Any] | None:
        """Mean over rows with a 95% interval clustered by row; of stages the share of rows that
        have a correct completion.
        """
        counts = [(correct, total) for correct, total in self.right.values() if total]
        if not counts:
            return None
        shares = [min(1, correct) if has_stages else correct / total for correct, total in counts]
        estimate = interval(np.array(shares, dtype=float))
        return {**asdict(estimate), "rows": len(counts), "is_of_rows": has_stages}


def _call(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The speed of a call. A merge, or a call that had nothing to do, has none."""
    names = ("tokens_per_second", "seconds", "tokens", "status")
    return {name: summary.get(name) for name in names} | {"notes": summary.get("notes") or {}}


def _histogram(lengths: Counter[int]) -> dict[str, Any]:
    """Counts in intervals of equal width."""
    most = max(lengths, default=0)
    width = max(1, -(-(most + 1) // _LENGTH_BINS))
    counts = [0] * (most // width + 1)
    for length, count in lengths.items():
        counts[length // width] += count
    return {"width": width, "counts": counts, "quantiles": dict(_length_quantiles(lengths))}


def _length_quantiles(lengths: Counter[int]) -> Iterator[tuple[str, int]]:
    total, seen = lengths.total(), 0
    wanted = {"median": 0.5, "90%": 0.9, "longest": 1.0}
    for length in sorted(lengths):
        seen += lengths[length]
        for name in [name for name, share in wanted.items() if seen >= share * total]:
            yield name, length
            del wanted[name]
