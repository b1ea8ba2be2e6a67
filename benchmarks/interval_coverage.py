"""Coverage of the score intervals, and the power of paired against unpaired differences.

    python benchmarks/interval_coverage.py --repeats 10000

Simulated evaluations: each question's chance of a right sample is drawn from a Beta law, its
samples from that chance. An interval covers where it holds the mean of the law. Three laws stand
for a benchmark with questions of one kind, of two kinds, and too hard; two more are extreme.
Prints tables and ends with one line of JSON. Needs SciPy.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import expit, logit
from scipy.stats import t as student_t

from optimal_sampling.evaluate.statistics import (
    CheckpointScores,
    Estimate,
    Metric,
    interval,
    paired_difference,
    score,
)

LAWS = {"Beta(2, 2)": (2.0, 2.0), "Beta(0.4, 0.4)": (0.4, 0.4), "Beta(0.3, 2.7)": (0.3, 2.7)}
"""Middling questions; questions that are mostly solved or mostly not; hard questions, mean 0.1."""
EXTREME = {"Beta(0.1, 0.9)": (0.1, 0.9), "Beta(2, 38)": (2.0, 38.0)}
"""A tenth of the questions solved and the others not; all questions solved by 5% of the samples."""
SAMPLES = (1, 4, 16)
SHIFTS = (0.0, 0.25, 0.5, 1.0)
"""Improvements, as mean shifts of a question's log-odds; each question's own shift varies by half
of it (standard deviation)."""

Bounds = Callable[[np.ndarray, int], Estimate]


@dataclass(frozen=True)
class Simulation:
    """How much is simulated."""

    repeats: int
    questions: int
    seed: int

    def evaluations(self, law: tuple[float, float], k: int) -> Iterator[np.ndarray]:
        """Results of `repeats` evaluations: arrays of questions x k truth values."""
        draw = np.random.default_rng([self.seed, k])
        for _ in range(self.repeats):
            chances = draw.beta(*law, self.questions)
            yield draw.random((self.questions, k)) < chances[:, None]

    def pairs(
        self, law: tuple[float, float], k: int, shift: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Results of a checkpoint and of its baseline on the same questions."""
        draw = np.random.default_rng([self.seed, k, round(100 * shift)])
        for _ in range(self.repeats):
            base = np.clip(draw.beta(*law, self.questions), 1e-12, 1 - 1e-12)
            shifts = draw.normal(shift, shift / 2, self.questions)
            chances = expit(logit(base) + shifts)
            size = (self.questions, k)
            yield draw.random(size) < chances[:, None], draw.random(size) < base[:, None]


def scores_of(correct: np.ndarray) -> CheckpointScores:
    """Scores with nothing but right and wrong samples."""
    none = np.zeros_like(correct)
    questions = tuple(f"{index:06d}" for index in range(len(correct)))
    zeros = np.zeros(correct.shape, int)
    votes = np.where(correct, 0, 1)
    return CheckpointScores(questions, correct, none, none, zeros, zeros.astype(float), votes)


def clustered(correct: np.ndarray, k: int) -> Estimate:
    """The interval of this package."""
    return score(scores_of(correct), Metric("avg", k))


def independent_samples(correct: np.ndarray, k: int) -> Estimate:
    """Wilson's interval that counts every sample as a question of its own."""
    return interval(correct.ravel().astype(float))


def student(correct: np.ndarray, k: int) -> Estimate:
    """Student's t on the means of the questions."""
    means = correct.mean(axis=1)
    half = t_quantile(len(means) - 1) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    return Estimate(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half)


def across_runs(correct: np.ndarray, k: int) -> Estimate:
    """Student's t on the scores of k runs over the same questions."""
    runs = correct.mean(axis=0)
    mean = float(runs.mean())
    if k == 1:
        return Estimate(mean, mean, mean)
    half = t_quantile(k - 1) * float(np.std(runs, ddof=1)) / math.sqrt(k)
    return Estimate(mean, mean - half, mean + half)


METHODS: dict[str, Bounds] = {
    "this package": clustered,
    "t on questions": student,
    "samples as questions": independent_samples,
    "standard error across runs": across_runs,
}


def unpaired_difference(scores: CheckpointScores, baseline: CheckpointScores) -> Estimate:
    """Difference whose variance is the sum of both, as if the questions were not the same."""
    means = [each.correct.mean(axis=1) for each in (scores, baseline)]
    n = len(means[0])
    squares = [float(np.sum((x - x.mean()) ** 2)) + 1 / scores.samples**2 for x in means]
    variances = [value / (n - 1) / n for value in squares]
    freedom = sum(variances) ** 2 / sum(value**2 / (n - 1) for value in variances)
    half = t_quantile(freedom) * math.sqrt(sum(variances))
    value = float(means[0].mean() - means[1].mean())
    return Estimate(value, value - half, value + half)


def t_quantile(freedom: float) -> float:
    """Two-sided critical value at 95%."""
    return float(student_t.ppf(0.975, freedom))


def coverage(simulation: Simulation, law: tuple[float, float], k: int) -> dict[str, float]:
    """Share of intervals that hold the mean of the law, by method; `width` of the first one."""
    truth = law[0] / sum(law)
    held = dict.fromkeys(METHODS, 0)
    width = 0.0
    for correct in simulation.evaluations(law, k):
        for name, method in METHODS.items():
            found = method(correct, k)
            held[name] += found.low <= truth <= found.high
            width += (found.high - found.low) * (method is clustered)
    shares = {name: count / simulation.repeats for name, count in held.items()}
    return shares | {"width": width / simulation.repeats}


def coverage_of_pass(simulation: Simulation, law: tuple[float, float], k: int) -> float:
    """The same of pass@k from 16 samples."""
    a, b = law
    moments = [(b + i) / (a + b + i) for i in range(k)]  # E[(1 - p)^k] of a Beta law
    truth = 1 - math.prod(moments)
    metric = Metric("pass", k)
    held = 0
    for correct in simulation.evaluations(law, 16):
        found = score(scores_of(correct), metric)
        held += found.low <= truth <= found.high
    return held / simulation.repeats


def power(
    simulation: Simulation, law: tuple[float, float], k: int, shift: float
) -> dict[str, float]:
    """Share of differences whose interval excludes 0 and of those that hold the true difference."""
    truth = true_difference(law, shift, simulation.seed)
    found = {"paired": 0, "unpaired": 0, "paired coverage": 0}
    for correct, base in simulation.pairs(law, k, shift):
        new, old = scores_of(correct), scores_of(base)
        paired = paired_difference(new, old, Metric("avg", k))
        unpaired = unpaired_difference(new, old)
        found["paired"] += not paired.low <= 0 <= paired.high
        found["unpaired"] += not unpaired.low <= 0 <= unpaired.high
        found["paired coverage"] += paired.low <= truth <= paired.high
    shares = {name: count / simulation.repeats for name, count in found.items()}
    return {"difference": truth} | shares


def true_difference(law: tuple[float, float], shift: float, seed: int) -> float:
    """Mean improvement over a million questions."""
    draw = np.random.default_rng([seed, 1])
    base = np.clip(draw.beta(*law, 1_000_000), 1e-12, 1 - 1e-12)
    shifts = draw.normal(shift, shift / 2, base.size)
    return float((expit(logit(base) + shifts) - base).mean())


def show_coverage(console: Console, simulation: Simulation) -> list[dict[str, Any]]:
    """Coverage by law and number of samples."""
    table = Table(title=f"Coverage of 95% intervals, {simulation.questions} questions")
    for name in ("difficulties", "k", *METHODS, "width, points"):
        table.add_column(name, justify="right", no_wrap=name == "difficulties")
    rows = []
    for name, law in (LAWS | EXTREME).items():
        for k in SAMPLES:
            found = coverage(simulation, law, k)
            shares = [f"{100 * found[method]:.1f}%" for method in METHODS]
            shares[-1] = shares[-1] if k > 1 else ""
            table.add_row(name, str(k), *shares, f"{100 * found['width']:.1f}")
            rows.append({"law": name, "k": k, **found})
    console.print(table)
    three = [row["this package"] for row in rows if row["law"] in LAWS]
    console.print(f"the three laws: mean {100 * fmean(three):.1f}%, least {100 * min(three):.1f}%")
    return rows


def show_pass(console: Console, simulation: Simulation) -> list[dict[str, Any]]:
    """Coverage of pass@k."""
    table = Table(title="Coverage of 95% intervals of pass@k from 16 samples")
    for name in ("difficulties", "k", "coverage"):
        table.add_column(name, justify="right", no_wrap=name == "difficulties")
    rows = []
    for name, law in LAWS.items():
        for k in (1, 4, 16):
            share = coverage_of_pass(simulation, law, k)
            table.add_row(name, str(k), f"{100 * share:.1f}%")
            rows.append({"law": name, "pass": k, "this package": share})
    console.print(table)
    return rows


def show_power(console: Console, simulation: Simulation) -> list[dict[str, Any]]:
    """How often a difference is found."""
    table = Table(title="95% intervals of a difference that exclude 0; where it is 0: false alarms")
    columns = ("difficulties", "k", "points", "paired", "unpaired", "paired coverage")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name == "difficulties")
    rows = []
    for name, law in LAWS.items():
        for k in SAMPLES:
            for shift in SHIFTS:
                found = power(simulation, law, k, shift)
                shares = [f"{100 * found[column]:.1f}%" for column in columns[3:]]
                points = f"{100 * found['difference']:+.1f}" if shift else "0"
                table.add_row(name, str(k), points, *shares)
                rows.append({"law": name, "k": k, "shift": shift, **found})
    console.print(table)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    simulation = Simulation(options.repeats, options.questions, options.seed)
    console = Console()
    error = 100 * NormalDist().inv_cdf(0.975) * math.sqrt(0.95 * 0.05 / options.repeats)
    console.print(f"{options.repeats} repeats: a share of 95% is known to ±{error:.1f} points")
    results = {
        "coverage": show_coverage(console, simulation),
        "pass": show_pass(console, simulation),
        "power": show_power(console, simulation),
    }
    print(json.dumps({"options": vars(options), **results}))


if __name__ == "__main__":
    main()
