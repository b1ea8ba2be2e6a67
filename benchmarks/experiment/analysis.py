"""From the results of units to estimates with intervals. No files but the results themselves.

An interval is for new problems and new training seeds at once. With d[s, i] the value (or the
difference of two arms) of seed s on problem i, n problems and S seeds, the variance of the mean is
taken as Vq + Vs: Vq the variance of the n means over seeds, divided by n; Vs the variance of the S
means over problems, divided by S. Both hold the noise of single cells, so that the sum is a little
too large rather than too small. The interval is Student's t with Satterthwaite's degrees of
freedom, (Vq + Vs)^2 / (Vq^2 / (n - 1) + Vs^2 / (S - 1)). With one seed it is Vq alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
from benchmarks.experiment.plan import Arm, Plan
from scipy.special import stdtrit

from optimal_sampling.evaluate.statistics import Estimate

__all__ = ["BINS", "Judgement", "Results", "crossed", "decoded", "encoded"]

Matrix: TypeAlias = np.ndarray
"""Values in [0, 1]: seeds x problems."""

Facts = Mapping[str, Any]

BINS = ("0", "(0, 0.25]", "(0.25, 0.75]", "above 0.75")
"""Pass rates of the untrained student, which sort the problems."""

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def encoded(counts: Sequence[int]) -> str:
    """Counts below 36 as one character each."""
    return "".join(_DIGITS[count] for count in counts)


def decoded(text: str) -> list[int]:
    """The inverse of `encoded`."""
    return [_DIGITS.index(character) for character in text]


def crossed(values: Matrix, level: float = 0.95) -> Estimate:
    """The mean with its interval over problems and seeds."""
    seeds, problems = values.shape
    by_problem = float(np.var(values.mean(axis=0), ddof=1)) / problems
    by_seed = float(np.var(values.mean(axis=1), ddof=1)) / seeds if seeds > 1 else 0.0
    variance, mean = by_problem + by_seed, float(values.mean())
    if variance == 0:
        return Estimate(mean, mean, mean, level)
    parts = by_problem**2 / (problems - 1) + by_seed**2 / max(seeds - 1, 1)
    half = float(stdtrit(variance**2 / parts, (1 + level) / 2)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, level)


@dataclass(frozen=True)
class Judgement:
    """Whether a recommendation is confirmed: each difference, by pair and by what it is with."""

    arm: str
    differences: Mapping[tuple[str, str], Estimate]

    @property
    def is_confirmed(self) -> bool:
        """Every lower end lies above 0."""
        return bool(self.differences) and all(each.low > 0 for each in self.differences.values())


@dataclass(frozen=True)
class Results:
    """The results of a plan's units, as `report.collect` gives them."""

    plan: Plan
    document: Facts

    @cached_property
    def units(self) -> dict[tuple[str, str, int], Facts]:
        """By pair, arm and seed."""
        return {(each["pair"], each["arm"], each["seed"]): each for each in self.document["units"]}

    def of(self, pair: str, arm: str) -> dict[int, Facts]:
        """An arm's units by seed."""
        owner = self.plan.owner(pair, arm)
        found = {seed: each for (p, a, seed), each in self.units.items() if (p, a) == (owner, arm)}
        return dict(sorted(found.items()))

    def arms(self, pair: str) -> list[Arm]:
        """The arms with results, in the order of the plan."""
        return [arm for arm in self.plan.arms.values() if self.of(pair, arm.name)]

    def matrix(self, pair: str, arm: str, metric: str, seeds: Sequence[int] = ()) -> Matrix:
        """Values of each seed and problem: `sampled`, `greedy`, or `diversity` (one of k right)."""
        units = self.of(pair, arm)
        return np.array([_values(units[seed], metric) for seed in seeds or units])

    def accuracy(self, pair: str, arm: str, metric: str) -> Estimate:
        """The mean over seeds and problems."""
        return crossed(self.matrix(pair, arm, metric), self.plan.criteria["level"])

    def difference(self, pair: str, arm: str, other: str, metric: str) -> Estimate | None:
        """Of two arms, paired by problem and by seed; None without common seeds."""
        seeds = [seed for seed in self.of(pair, arm) if seed in self.of(pair, other)]
        if not seeds:
            return None
        values = self.matrix(pair, arm, metric, seeds) - self.matrix(pair, other, metric, seeds)
        return crossed(values, self.plan.criteria["level"])

    def has(self, pair: str, arm: str, metric: str) -> bool:
        """Whether all units of an arm have a metric."""
        units = self.of(pair, arm).values()
        return bool(units) and all(metric in each for each in units)

    def by_steps(self, pair: str, arm: str, metric: str) -> dict[int, float]:
        """Accuracy by the number of steps; empty where problems have none."""
        steps = np.array(self.document["steps"])
        if None in self.document["steps"]:
            return {}
        means = self.matrix(pair, arm, metric).mean(axis=0)
        return {int(n): float(means[steps == n].mean()) for n in sorted({*steps.tolist()})}

    def by_base(self, pair: str, arm: str, metric: str) -> dict[str, float]:
        """Accuracy by the pass rate of the untrained student."""
        base = self.matrix(pair, "base", "sampled")[0]
        means = self.matrix(pair, arm, metric).mean(axis=0)
        places = np.digitize(base, [1e-9, 0.25 + 1e-9, 0.75 + 1e-9])
        found = {name: means[places == number] for number, name in enumerate(BINS)}
        return {name: float(each.mean()) for name, each in found.items() if len(each)}

    def coverage(self, pair: str, arm: str) -> float | None:
        """Share of the problems tried that have a right completion."""
        right = [count > 0 for unit in self.of(pair, arm).values() for count in _right(unit)]
        return fmean(right) if right else None

    def coverage_by_own(self, pair: str, arm: str) -> dict[int, float]:
        """The same by how many of the student's own 4 tries at a problem are right."""
        own = self.of(pair, "own_k4")
        found: dict[int, list[bool]] = {}
        for seed, unit in self.of(pair, arm).items():
            if seed in own:
                for tries, count in zip(_right(own[seed]), _right(unit), strict=False):
                    found.setdefault(tries, []).append(count > 0)
        return {tries: fmean(each) for tries, each in sorted(found.items())}

    def mean(self, pair: str, arm: str, *path: str) -> float | None:
        """Mean over seeds of a number in each unit, summed over its rounds.

        Seconds are those of units that were drawn in one call.
        """
        units = self.of(pair, arm).values()
        if path == ("cpu_seconds",):
            units = [unit for unit in units if not any(r["resumed"] for r in unit["rounds"])]
        values = [sum(_inside(each, path) for each in unit["rounds"]) for unit in units]
        return fmean(values) if values else None

    def judgements(self) -> list[Judgement]:
        """The criteria of the plan for each candidate that has all its comparisons.

        Each is of all main seeds at least: the interval of fewer is another one.
        """
        return [each for arm in self.plan.criteria["candidates"] if (each := self._judge(arm))]

    def _judge(self, name: str) -> Judgement | None:
        criteria, arm = self.plan.criteria, self.plan.arms[name]
        found = {}
        for pair in self.plan.pairs:
            for other in (criteria["default"], criteria["teacher"][arm.sharpness]):
                seeds = self.of(pair, name).keys() & self.of(pair, other).keys()
                each = self.difference(pair, name, other, criteria["metric"])
                if each is None or not seeds >= {*self.plan.seeds["main"]}:
                    return None
                found[pair, other] = each
        return Judgement(name, found)


def _values(unit: Facts, metric: str) -> Matrix:
    if metric == "diversity":
        return np.array([count > 0 for count in decoded(unit["diversity"]["right"])], dtype=float)
    samples = unit["samples"] if metric == "sampled" else 1
    return np.array(decoded(unit[metric])) / samples


def _right(unit: Facts) -> list[int]:
    """Right tries at each problem of the first round."""
    return decoded(unit["rounds"][0]["right"]) if unit["rounds"] else []


def _inside(facts: Facts, path: Sequence[str]) -> float:
    value: Any = facts
    for name in path:
        value = value[name]
    return float(value)
