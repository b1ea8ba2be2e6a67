"""The choice of the learning rate, on problems that nothing else uses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.experiment.plan import Unit
from benchmarks.experiment.unit import Experiment, evaluated, once

from optimal_sampling.records.store import read_json, write_atomically

__all__ = ["choose", "tune", "tuning_units"]

Trial = dict[str, Any]


def tuning_units(experiment: Experiment) -> list[Unit]:
    """The arms and seeds of the choice, on the first pair."""
    plan = experiment.plan
    pair = next(iter(plan.pairs))
    return [
        plan.unit(pair, arm, seed) for seed in plan.tuning["seeds"] for arm in plan.tuning["arms"]
    ]


def tune(experiment: Experiment, unit: Unit) -> list[Trial]:
    """Train an arm's text with each learning rate, and score it on the validation problems."""
    plan, folder = experiment.plan, experiment.output / "tuning" / unit.arm / f"seed-{unit.seed}"
    student = plan.pairs[unit.pair].student
    drawing = experiment.drawing(unit, ("tuning", unit.seed), folder, student)
    once(folder / "drawn.json", drawing.draw)
    return [_trial(experiment, unit, folder, rate) for rate in plan.tuning["learning_rates"]]


def _trial(experiment: Experiment, unit: Unit, folder: Path, rate: float) -> Trial:
    path = folder / f"trial-{rate:g}.json"
    if path.exists():
        return dict(read_json(path))
    student = experiment.plan.pairs[unit.pair].student
    drawing = experiment.drawing(unit, ("tuning", unit.seed), folder, student)
    name = f"student-{rate:g}"
    experiment.train(drawing, rate, name)
    questions = experiment.streams.path("validation")
    plan = experiment.plan.evaluation
    common = {"seed": unit.seed, "batch_size": plan["batch_size"]}
    scores = {
        "sampled": experiment.evaluation(
            questions, folder / f"{name}-sampled", samples=plan["samples"], **common
        ),
        "greedy": experiment.evaluation(
            questions, folder / f"{name}-greedy", temperature=0.0, **common
        ),
    }
    right = {key: evaluated(str(folder / name), each)["right"] for key, each in scores.items()}
    trial = {
        "arm": unit.arm,
        "seed": unit.seed,
        "learning_rate": rate,
        "sampled": fmean(right["sampled"]) / plan["samples"],
        "greedy": fmean(right["greedy"]),
    }
    write_atomically(path, json.dumps(trial) + "\n")
    return trial


def choose(trials: list[Trial]) -> float:
    """The rate with the largest mean of both accuracies over arms and seeds."""
    rates = sorted({each["learning_rate"] for each in trials})
    means = {
        rate: fmean(_value(each) for each in trials if each["learning_rate"] == rate)
        for rate in rates
    }
    return max(rates, key=means.__getitem__)


def _value(trial: Trial) -> float:
    return float(trial["sampled"] + trial["greedy"]) / 2
