"""Bookkeeping over records: what is good, what failed how often, and the means over all tokens.

Knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from optimal_sampling.records.schema import Key, Record, key_of

__all__ = ["MEANS", "Ledger", "Totals"]

MEANS = ("alpha_mean", "clamped_share", "kl_student", "kl_teacher", "ess_ratio")
"""Fields of a record that are means over its tokens."""


@dataclass
class Totals:
    """Sums over good records."""

    records: int = 0
    tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    _sums: Counter[str] = field(default_factory=Counter)
    _weights: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Count one good record."""
        tokens = record["n_completion_tokens"]
        self.records += 1
        self.tokens += tokens
        self.finish_reasons[record["finish_reason"]] += 1
        for name in MEANS:
            if record[name] is not None:
                self._sums[name] += record[name] * tokens
                self._weights[name] += tokens

    def mean(self, name: str) -> float | None:
        """Mean over tokens of one of MEANS; None where there are none."""
        return self._sums[name] / self._weights[name] if self._weights[name] else None


@dataclass
class Ledger:
    """What a run folder holds. What is owed = what was asked - what is good."""

    good: set[Key] = field(default_factory=set)
    failed: dict[Key, int] = field(default_factory=dict)
    """Attempts at each sample that is not good yet."""
    totals: Totals = field(default_factory=Totals)

    def add(self, record: Record) -> None:
        """Take a record into account; a good one settles its sample for ever."""
        key = key_of(record)
        if key in self.good:
            return
        if record["error"]:
            self.failed[key] = max(record["attempts"], self.failed.get(key, 0))
            return
        self.failed.pop(key, None)
        self.good.add(key)
        self.totals.add(record)

    def attempts(self, key: Key) -> int:
        """How often the sample has failed."""
        return self.failed.get(key, 0)

    def owes(self, key: Key, max_attempts: int) -> bool:
        """Whether the sample is still to be made."""
        return key not in self.good and self.attempts(key) < max_attempts
