"""Scores from graded samples: avg@k, pass@k, maj@k, their intervals, and paired differences.

Pure functions on arrays, without models or files. Every score is a mean over questions of one
value per question. Intervals treat the questions as drawn at random from a population of such
questions, and the samples as drawn at random for each question; docs/statistics.md has the
derivations and the measured coverage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from optimal_sampling.errors import ConfigError, MissingDependencyError, did_you_mean
from optimal_sampling.records.verdicts import VERDICTS

__all__ = [
    "CheckpointScores",
    "Estimate",
    "Metric",
    "MetricName",
    "Sample",
    "Values",
    "average_at_k",
    "check_scipy",
    "interval",
    "majority_at_k",
    "no_answer_rate",
    "paired_difference",
    "pass_at_k",
    "question_values",
    "score",
    "truncated_rate",
]

Values: TypeAlias = Float[np.ndarray, " questions"]
"""One number in [0, 1] per question."""

MetricName = Literal["avg", "pass", "maj"]

RIGHT, NO_VOTE, UNKNOWN = 0, -1, -2
"""Votes that are no number of a wrong answer; UNKNOWN: right, but the answer was not extracted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded completion. A completion that failed counts as `no_answer`."""

    question: str
    """Identifies the question; the same for all checkpoints."""
    sample_index: int
    verdict: str
    """One of `records.verdicts.Verdict`."""
    answer: str | None
    """As extracted; wrong answers with the same text vote together, one without text alone."""
    tokens: int
    """Length of the completion."""
    hedging: float = 0.0
    """Share of hedging words among the words of the completion."""


@dataclass(frozen=True, eq=False)
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
    """RIGHT, NO_VOTE (no answer, or truncated), UNKNOWN, else one number per wrong answer."""
    skipped: tuple[str, ...] = ()
    """Questions without a usable reference, which no score counts."""

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> CheckpointScores:
        """Raises ConfigError where a sample is there twice or has an unknown verdict, where the
        questions do not all have the same samples, and where none has a usable reference.
        """
        table: dict[str, dict[int, Sample]] = {}
        for sample in samples:
            _check_verdict(sample)
            row = table.setdefault(sample.question, {})
            if sample.sample_index in row:
                raise ConfigError(
                    f"sample {sample.sample_index} of question {sample.question!r} is there twice"
                )
            row[sample.sample_index] = sample
        skipped = tuple(sorted(name for name, row in table.items() if _is_skipped(row.values())))
        questions = tuple(sorted(table.keys() - {*skipped}))
        _check_complete(table, questions)
        rows = [[table[name][index] for index in sorted(table[name])] for name in questions]
        verdicts = np.array([[sample.verdict for sample in row] for row in rows])
        return cls(
            questions=questions,
            correct=verdicts == "correct",
            truncated=verdicts == "truncated",
            no_answer=verdicts == "no_answer",
            tokens=np.array([[sample.tokens for sample in row] for row in rows]),
            hedging=np.array([[float(sample.hedging) for sample in row] for row in rows]),
            votes=np.array([_votes(row) for row in rows]),
            skipped=skipped,
        )

    @property
    def samples(self) -> int:
        """Samples per question."""
        return int(self.correct.shape[1])


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
    return np.asarray(scores.correct.mean(axis=1))


def pass_at_k(scores: CheckpointScores, k: int) -> Values:
    """Probability that k of a question's samples, drawn without replacement, hold a right one.

    Unbiased (Chen et al. 2021, arXiv:2107.03374, equation 1). Raises ConfigError for k above the
    number of samples.
    """
    n = _checked_k(scores, k)
    none_right = [Fraction(math.comb(n - right, k), math.comb(n, k)) for right in range(n + 1)]
    table = np.array([float(1 - share) for share in none_right])
    return np.asarray(table[scores.correct.sum(axis=1)])


def majority_at_k(scores: CheckpointScores, k: int) -> Values:
    """Probability that the most frequent answer among k of a question's samples is right.

    The expected value over all subsets of k samples and over a fair choice among tied answers,
    exactly. Right answers vote together, samples without an answer do not vote, and where none
    votes the question is wrong. Raises ConfigError for k above the number of samples, and where
    the grader extracts no answers: every wrong sample would then vote alone.
    """
    _checked_k(scores, k)
    if (scores.votes == UNKNOWN).any():
        raise ConfigError(
            f"maj@{k} needs the answers that were given, and this grader extracts none; "
            "leave maj out"
        )
    return np.array([_majority_of(Counter(row.tolist()), k) for row in scores.votes])


def question_values(scores: CheckpointScores, metric: Metric) -> Values:
    """The metric of each question. avg@k uses all samples: its mean does not depend on k.

    Raises ConfigError for k above the number of samples.
    """
    if metric.name == "avg":
        _checked_k(scores, metric.k)
        return average_at_k(scores)
    if metric.name == "pass":
        return pass_at_k(scores, metric.k)
    return majority_at_k(scores, metric.k)


def interval(values: Values, draws: int = 1, level: float = 0.95) -> Estimate:
    """Mean over questions of values in [0, 1], with a Wilson interval clustered by question.

    `draws`: independent draws that each value is the mean of. The sample size in Wilson's formula
    is the effective one, p(1-p) / (s^2 / n), with the variance s^2 between the n questions, and at
    least n and at most n * draws; with several draws, times the (z/t)^2 of n - 1 degrees of
    freedom (Korn and Graubard 1998; Franco et al. 2019, doi:10.1093/jssam/smy019).
    """
    n = len(values)
    p = float(np.mean(values))
    z = NormalDist().inv_cdf((1 + _checked_level(level)) / 2)
    size = float(n)
    if draws > 1:
        size = _effective_size(values, draws) * (z / _t_quantile(level, n - 1)) ** 2
    shrink = 1 + z * z / size
    centre = (p + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / size + (z / (2 * size)) ** 2)
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), level)


def score(scores: CheckpointScores, metric: Metric, level: float = 0.95) -> Estimate:
    """The metric with its interval. Raises ConfigError for k above the number of samples."""
    return interval(question_values(scores, metric), _draws(scores, metric), level)


def paired_difference(
    scores: CheckpointScores, baseline: CheckpointScores, metric: Metric, level: float = 0.95
) -> Estimate:
    """Metric of `scores` minus that of `baseline`, paired by question, with a t interval.

    The variance between questions is that of the differences with one more question that differs
    by one draw: equal results do not give an interval of width 0. Raises ConfigError where the
    questions are not the same.
    """
    _check_same_questions(scores, baseline)
    differences = question_values(scores, metric) - question_values(baseline, metric)
    draws = min(_draws(scores, metric), _draws(baseline, metric))
    n = len(differences)
    mean = float(np.mean(differences))
    squares = float(np.sum((differences - mean) ** 2)) + 1 / draws**2
    freedom = max(n - 1, 1)
    half = _t_quantile(level, freedom) * math.sqrt(squares / freedom / n)
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half), level)


def check_scipy() -> None:
    """Raises MissingDependencyError without SciPy, which intervals need."""
    try:
        import scipy.special  # noqa: F401 - whether it is there
    except ImportError as error:
        raise MissingDependencyError(
            "intervals need SciPy: pip install '.[eval]' in the folder of this package"
        ) from error


def truncated_rate(scores: CheckpointScores, level: float = 0.95) -> Estimate:
    """Share of samples that ended by length."""
    return interval(scores.truncated.mean(axis=1), scores.samples, level)


def no_answer_rate(scores: CheckpointScores, level: float = 0.95) -> Estimate:
    """Share of samples that ended by themselves and hold no answer."""
    return interval(scores.no_answer.mean(axis=1), scores.samples, level)


def _check_verdict(sample: Sample) -> None:
    if sample.verdict not in VERDICTS:
        raise ConfigError(
            f"question {sample.question!r} has the unknown verdict {sample.verdict!r}"
            f"{did_you_mean(sample.verdict, VERDICTS)}"
        )


def _is_skipped(row: Iterable[Sample]) -> bool:
    return all(sample.verdict == "skipped" for sample in row)


def _check_complete(table: Mapping[str, Mapping[int, Sample]], questions: Sequence[str]) -> None:
    """Raises ConfigError unless the questions all have the same samples, and each a verdict."""
    if not questions:
        raise ConfigError("there is no graded sample of a question that has a usable reference")
    wanted = set().union(*(table[name] for name in questions))
    for name in questions:
        if missing := wanted - table[name].keys():
            raise ConfigError(
                f"question {name!r} lacks {len(missing)} of {len(wanted)} samples: the evaluation "
                "is not finished; call the same command again"
            )
        if any(sample.verdict == "skipped" for sample in table[name].values()):
            raise ConfigError(f"only some samples of question {name!r} are skipped")


def _votes(row: Sequence[Sample]) -> list[int]:
    """One question's samples as RIGHT, NO_VOTE, UNKNOWN or the number of the wrong answer."""
    numbers: dict[str | int, int] = {}
    return [_vote(sample, numbers) for sample in row]


def _vote(sample: Sample, numbers: dict[str | int, int]) -> int:
    """`numbers`: those of wrong answers by text; of one without text, by its sample index."""
    if sample.verdict == "correct":
        return UNKNOWN if sample.answer is None else RIGHT
    if sample.verdict != "wrong":
        return NO_VOTE
    answer = sample.sample_index if sample.answer is None else sample.answer
    return numbers.setdefault(answer, len(numbers) + 1)


def _checked_k(scores: CheckpointScores, k: int) -> int:
    """The number of samples. Raises ConfigError unless 1 <= k <= samples."""
    if not 1 <= k <= scores.samples:
        raise ConfigError(
            f"k must lie in [1, {scores.samples}], the number of samples of each question; got {k}"
        )
    return scores.samples


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, such as 0.95; got {level}")
    return level


def _majority_of(votes: Counter[int], k: int) -> float:
    """`majority_at_k` of one question, from the number of samples by vote."""
    wrong = sorted(count for vote, count in votes.items() if vote > RIGHT)
    return _majority(votes[RIGHT], tuple(wrong), votes[NO_VOTE], k)


@lru_cache(maxsize=65_536)
def _majority(right: int, wrong: tuple[int, ...], silent: int, k: int) -> float:
    """Sum over the number of right votes in a subset of k; a tie of m answers counts 1/m."""
    won = Fraction(0)
    for most in range(1, min(right, k) + 1):
        ties = _subsets(wrong, silent, k - most, most)
        shares = [Fraction(ways, tied + 1) for tied, ways in ties.items()]
        won += math.comb(right, most) * sum(shares, Fraction(0))
    return float(won / math.comb(right + sum(wrong) + silent, k))


def _subsets(wrong: tuple[int, ...], silent: int, size: int, most: int) -> Counter[int]:
    """Number of subsets of `size` of the samples that are not right, by how many answers tie.

    No wrong answer occurs more than `most` times in a subset; those that occur `most` times tie.
    """
    ways = Counter({(0, 0): 1})
    for count in wrong:
        longer: Counter[tuple[int, int]] = Counter()
        for (used, tied), number in ways.items():
            for taken in range(min(count, most, size - used) + 1):
                key = used + taken, tied + (taken == most)
                longer[key] += number * math.comb(count, taken)
        ways = longer
    ties: Counter[int] = Counter()
    for (used, tied), number in ways.items():
        ties[tied] += number * math.comb(silent, size - used)
    return ties


def _draws(scores: CheckpointScores, metric: Metric) -> int:
    """Independent draws behind a question's value.

    pass@k and maj@k average a 0/1 outcome over subsets of k samples: the variance of such a mean is
    at most that of samples/k independent outcomes (Hoeffding 1948).
    """
    return scores.samples if metric.name == "avg" else scores.samples // metric.k


def _effective_size(values: Values, draws: int) -> float:
    """Number of independent 0/1 outcomes whose mean has the variance of the values' mean."""
    n = len(values)
    p = float(np.mean(values))
    variance = float(np.var(values, ddof=1)) / n if n > 1 else math.inf
    if not 0 < p < 1:
        return n
    size = p * (1 - p) / variance if variance else math.inf
    return min(max(size, n), n * draws)


def _t_quantile(level: float, freedom: int) -> float:
    """Two-sided critical value of Student's t."""
    check_scipy()
    from scipy.special import stdtrit

    return float(stdtrit(max(freedom, 1), (1 + _checked_level(level)) / 2))


def _check_same_questions(scores: CheckpointScores, baseline: CheckpointScores) -> None:
    if scores.questions == baseline.questions:
        return
    other = {*scores.questions} ^ {*baseline.questions}
    raise ConfigError(
        f"{len(other)} questions are scored for one checkpoint only, such as {min(other)!r}; "
        "a paired difference needs the same questions"
    )
