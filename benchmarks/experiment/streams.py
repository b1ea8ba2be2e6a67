"""Problems: disjoint streams for training, the choice of the learning rate, and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

from benchmarks.experiment.plan import Plan
from scripts.toy_training_data import solve

from optimal_sampling.config import DataConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.evaluate.benchmarks import benchmark_row
from optimal_sampling.generate.dataset import open_dataset
from optimal_sampling.records.store import write_atomically
from optimal_sampling.toy_pair.problems import make_problem

__all__ = ["Streams", "read_rows"]

Row = dict[str, Any]

HELD_OUT = ("evaluation", "validation")
"""Streams whose problems are in no other."""


@dataclass(frozen=True)
class Streams:
    """The streams of a plan: of the shipped pair's generator, or of a dataset of the user's own.

    A stream is `evaluation`, `validation`, or `NAME-SEED` with one of the other names of the
    section `problems`. Its rows have the columns `problem` and `answer`, and of the generator also
    `solution`, `solution_other` (in style C) and `steps`.
    """

    folder: Path
    plan: Plan
    dataset: str | None = None

    def path(self, name: str, seed: int | None = None) -> Path:
        """The JSONL file of a stream, which is written on the first call."""
        path = self.folder / f"{name if seed is None else f'{name}-{seed}'}.jsonl"
        if not path.exists():
            rows = self._synthetic(name, seed) if self.dataset is None else self._share(name, seed)
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def rows(self, name: str, seed: int | None = None) -> list[Row]:
        """The rows of a stream."""
        return read_rows(self.path(name, seed))

    def _synthetic(self, name: str, seed: int | None) -> list[Row]:
        about = self.plan.problems[name]
        before = HELD_OUT[: HELD_OUT.index(name)] if name in HELD_OUT else HELD_OUT
        taken = {row["problem"] for other in before for row in self.rows(other)}
        problems = (make_problem(about["seed"] + (seed or 0), index) for index in count())
        rows = (
            {
                "problem": each.text,
                "answer": each.answer,
                "solution": each.solution,
                "solution_other": solve(each, "C"),
                "steps": each.steps,
            }
            for each in problems
        )
        return list(islice(_distinct(rows, taken), about["count"]))

    def _share(self, name: str, seed: int | None) -> list[Row]:
        """The stream's part of the dataset: held-out rows first, the others dealt in turn."""
        shares = {name: self.plan.problems[name]["count"] for name in HELD_OUT}
        rows = self._shuffled
        start = 0
        for held_out, size in shares.items():
            if name == held_out:
                return rows[start : start + size]
            start += size
        dealt = self._dealt
        if (name, seed) not in dealt:
            raise ConfigError(
                f"a dataset is divided over the seeds of the plan, and {seed} is none of {name}: "
                f"{', '.join(str(number) for each, number in dealt if each == name) or 'none'}"
            )
        found = rows[start + dealt.index((name, seed)) :: len(dealt)]
        if not found:
            raise ConfigError(
                f"dataset {self.dataset} has {len(rows)} distinct problems, and none is left to "
                f"train on after {start} that are held out; reduce the counts of the plan"
            )
        return found[: self.plan.problems[name]["count"]]

    @property
    def _dealt(self) -> list[tuple[str, int]]:
        seeds = self.plan.seeds["full"]
        dealt = [("tuning", seed) for seed in self.plan.tuning["seeds"]]
        return dealt + [(name, seed) for name in ("train", "second_round") for seed in seeds]

    @cached_property
    def _shuffled(self) -> list[Row]:
        """The distinct problems of the dataset, in the order of their hashes."""
        dataset = open_dataset(DataConfig(dataset=str(self.dataset)), seed=0)
        rows = list(_distinct((benchmark_row(row) for _, row in dataset), set()))
        return sorted(rows, key=lambda row: hashlib.blake2b(row["problem"].encode()).digest())


def _distinct(rows: Iterable[Row], taken: set[str]) -> Iterator[Row]:
    """The rows whose problem is neither taken nor an earlier one's."""
    seen = set(taken)
    for row in rows:
        if row["problem"] not in seen:
            seen.add(row["problem"])
            yield row


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
