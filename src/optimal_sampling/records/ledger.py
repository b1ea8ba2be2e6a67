"""Counts over records: which samples are good, how often others failed, means over all tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from optimal_sampling.records.schema import FIELDS, Key, Record, key_of

__all__ = ["MEANS", "Ledger", "Totals"]

MEANS = tuple(name for name, field in FIELDS.items() if field.is_mean)
"""Fields of a record that are means over its tokens."""


@dataclass
class Totals:
    """Sums over good records."""

    records: int = 0
    tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    _weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))

    def add(self, record: Record) -> None:
        """Count one good record."""
        tokens = record["n_completion_tokens"]
        self.records += 1
        self.tokens += tokens
        self.finish_reasons[record["finish_reason"]] += 1
        for name in MEANS:
            mean = record.get(name)
            weight = record.get(FIELDS[name].weight, 1.0)
            if isinstance(mean, float) and isinstance(weight, float):
                self._sums[name] += mean * weight * tokens
                self._weights[name] += weight * tokens

    def mean(self, name: str) -> float | None:
        """Mean of one of MEANS over all tokens; None where there are no tokens."""
        weight = self._weights[name]
        return self._sums[name] / weight if weight else None

    def means(self) -> dict[str, float | None]:
        """Every mean, and `ess_ratio`: the ratio of the two mean effective sample sizes.

        (A mean of per-token ratios would be that of a few tokens with tiny denominators.)
        """
        means = {name: self.mean(name) for name in MEANS}
        student, teacher = means["ess_student"], means["ess_teacher"]
        ratio = teacher / student if student and teacher is not None else None
        return means | {"ess_ratio": ratio}


@dataclass
class Ledger:
    """The samples of a run folder. Owed = asked for, less the good ones."""

    good: set[Key] = field(default_factory=set)
    failed: dict[Key, int] = field(default_factory=dict)
    """Attempts at each sample that is not good yet."""
    totals: Totals = field(default_factory=Totals)

    def add(self, record: Record) -> None:
        """Count a record. After a good one, later records of its sample change nothing."""
        key = key_of(record)
        if key in self.good:
            return
        if record["error"]:
            self.failed[key] = max(record["attempts"], self.attempts(key))
            return
        self.failed.pop(key, None)
        self.good.add(key)
        self.totals.add(record)

    def attempts(self, key: Key) -> int:
        """Failed attempts at a sample that is not good."""
        return self.failed.get(key, 0)

    def owes(self, key: Key, max_attempts: int) -> bool:
        """Whether the sample is neither good nor has failed `max_attempts` times."""
        return key not in self.good and self.attempts(key) < max_attempts
