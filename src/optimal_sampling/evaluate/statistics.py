"""Scores from graded samples: avg@k, pass@k, maj@k, their intervals, and paired differences.

Pure functions on arrays, without models or files. The unit is the question: every score is a mean
over questions of one value per question, and every interval treats the questions as a random draw
from a population of such questions, and samples as a random draw for each question.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from optimal_sampling.errors import ConfigError, MissingDependencyError

__all__ = [
    "CheckpointScores",
    "Estimate",
    "Metric",
    "MetricName",
    "Sample",
    "average_at_k",
    "interval",
    "majority_at_k",
    "paired_difference",
    "pass_at_k",
    "question_values",
    "score",
    "truncated_rate",
    "no_answer_rate",
]

Values: TypeAlias = Float[np.ndarray, " questions"]
"""One number in [0, 1] per question."""

MetricName = Literal["avg", "pass", "maj"]

NO_VOTE = -1
RIGHT = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded completion. A completion that failed counts as `no_answer`."""

    question: str
    """Identifies the question; the same for all checkpoints."""
    sample_index: int
    verdict: str
    """One of `records.verdicts.Verdict`."""
    answer: str | None
    """As extracted; wrong answers with the same text vote together."""
    tokens: int
    """Length of the completion."""
    hedging: float = 0.0
    """Share of hedging words among the words of the completion."""


@dataclass(frozen=True)
class CheckpointScores:
    """Graded samples of one checkpoint on one benchmark.

    Every array is questions x samples; the questions are in the order of their names.
    """

    questions: tuple[str, ...]
    correct: Bool[np.ndarray, "questions samples"]
    truncated: Bool[np.ndarray, "questions samples"]
    no_answer: Bool[np.ndarray, "questions samples"]
    tokens: Int[np.ndarray, "questions samples"]
    hedging: Float[np.ndarray, "questions samples"]
    votes: Int[np.ndarray, "questions samples"]
    """0: right; -1: no vote (no answer, or truncated); else one number per wrong answer."""
    skipped: tuple[str, ...] = ()
    """Questions without a usable reference, which no score counts."""

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> CheckpointScores:
        """Raises ConfigError where the questions do not all have the same number of samples."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """Samples per question."""
        return self.correct.shape[1]


@dataclass(frozen=True, slots=True)
class Metric:
    """avg@k, pass@k or maj@k."""

    name: MetricName
    k: int

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the interval that holds the true one at the given level."""

    value: float
    low: float
    high: float
    level: float = 0.95


def average_at_k(scores: CheckpointScores) -> Values:
    """Share of right samples of each question; avg@k is its mean over the questions."""
    raise NotImplementedError


def pass_at_k(scores: CheckpointScores, k: int) -> Values:
    """Probability that k of a question's samples, drawn without replacement, hold a right one.

    Unbiased (Chen et al. 2021, arXiv:2107.03374, equation 1). Raises ConfigError for k above the
    number of samples.
    """
    raise NotImplementedError


def majority_at_k(scores: CheckpointScores, k: int) -> Values:
    """Probability that the most frequent answer among k of a question's samples is right.

    The expected value over all subsets of k samples and over a fair choice among tied answers,
    exactly. Raises ConfigError for k above the number of samples.
    """
    raise NotImplementedError


def question_values(scores: CheckpointScores, metric: Metric) -> Values:
    """The metric of each question; avg@k uses all samples, whatever k."""
    raise NotImplementedError


def interval(values: Values, draws: int = 1, level: float = 0.95) -> Estimate:
    """Mean of values in [0, 1] over questions. `draws`: independent draws behind each value."""
    raise NotImplementedError


def score(scores: CheckpointScores, metric: Metric, level: float = 0.95) -> Estimate:
    """The metric with its interval."""
    raise NotImplementedError


def paired_difference(
    scores: CheckpointScores, baseline: CheckpointScores, metric: Metric, level: float = 0.95
) -> Estimate:
    """Metric of `scores` minus that of `baseline`, on the same questions, paired by question.

    Raises ConfigError where the questions are not the same.
    """
    raise NotImplementedError


def truncated_rate(scores: CheckpointScores, level: float = 0.95) -> Estimate:
    """Share of samples that ended by length."""
    raise NotImplementedError


def no_answer_rate(scores: CheckpointScores, level: float = 0.95) -> Estimate:
    """Share of samples that ended by themselves and hold no answer."""
    raise NotImplementedError
