"""Units in processes side by side, each of which pays for its start once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from benchmarks.experiment.pairs import TrainedTeacher
from benchmarks.experiment.plan import Plan, Unit
from benchmarks.experiment.tuning import choose, tune, tuning_units
from benchmarks.experiment.unit import Experiment

from optimal_sampling.errors import ConfigError, OptimalSamplingError, did_you_mean

__all__ = ["Workers"]

Made = TypeVar("Made")


@dataclass(frozen=True)
class Workers:
    """Processes that share the work on a folder of results."""

    output: Path
    plan: Plan
    dataset: str | None
    workers: int

    @property
    def experiment(self) -> Experiment:
        """What units are run with."""
        return Experiment(self.output, self.plan, self.dataset)

    def run(self, units: Sequence[Unit]) -> int:
        """Run the units that have no results; 1 where some failed."""
        if not self.plan.sft["learning_rate"]:
            raise ConfigError("the plan has no sft.learning_rate: call `tune`, and write it there")
        owed = [unit for unit in units if not self.experiment.result_path(unit).exists()]
        say(f"{len(units)} units, {len(owed)} owed; results: {self.output}")
        self._prepare({unit.pair for unit in owed})
        pace = Pace(len(owed))
        failed = []
        for unit, result in self._map(partial(_run_unit, self.experiment), owed):
            name = f"{unit.pair} {unit.arm} seed {unit.seed}"
            if isinstance(result, OptimalSamplingError):
                failed.append(f"{name}: {result}")
                say(f"FAILED {failed[-1]}")
            else:
                pace.show(f"{name}: {_scores(result)}")
        if failed:
            say(f"{len(failed)} units failed; the same command tries them again")
        return 1 if failed else 0

    def tune(self, arms: Sequence[str] = ()) -> int:
        """Try the learning rates of the plan with its arms, or some of them; say which is best."""
        tuned = self.plan.tuning["arms"]
        for name in arms:
            if name not in tuned:
                raise ConfigError(
                    f"the learning rate is not chosen with the arm {name!r}"
                    f"{did_you_mean(name, tuned)}; the plan names {', '.join(tuned)}"
                )
        units = [unit for unit in tuning_units(self.experiment) if not arms or unit.arm in arms]
        self._prepare({unit.pair for unit in units})
        trials = []
        for _, found in self._map(partial(tune, self.experiment), units):
            if isinstance(found, OptimalSamplingError):
                raise found
            for each in found:
                say(
                    "{arm} seed {seed} rate {learning_rate:g}: T = 1 {sampled:.3f}, "
                    "greedy {greedy:.3f}".format(**each)
                )
            trials += found
        say("write into the plan, under `tuning` and `sft`:")
        say(f"  trials:  # {', '.join(trials[0])}")
        for each in sorted(trials, key=lambda each: [str(value) for value in each.values()]):
            values = (
                f"{v:.4f}" if isinstance(v, float) and v > 0.01 else f"{v}" for v in each.values()
            )
            say(f"    - [{', '.join(values)}]")
        say(f"  learning_rate: {choose(trials):g}")
        return 0

    def _prepare(self, pairs: Iterable[str]) -> None:
        """Problems and trained teachers, before several processes need them."""
        streams = self.experiment.streams
        for name in ("validation", "evaluation"):
            streams.path(name)
        for name in sorted(pairs):
            with log_of(self.output):
                facts = TrainedTeacher(self.experiment, self.plan.pairs[name]).prepare()
            if facts:
                say(f"{name}: teacher trained, {facts['right']:.1%} right on validation problems")

    def _map(
        self, work: Callable[[Unit], Made], units: Sequence[Unit]
    ) -> Iterator[tuple[Unit, Made | OptimalSamplingError]]:
        """Each unit with what its work gave, or the error it ended with, as they are finished."""
        if self.workers == 1:
            for unit in units:
                with log_of(self.output):
                    result = _caught(work, unit)
                yield unit, result
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(
            self.workers, context, _start, (str(self.output), os.getpid())
        ) as pool:
            futures = {pool.submit(_caught, work, unit): unit for unit in units}
            try:
                yield from ((futures[each], each.result()) for each in as_completed(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _caught(work: Callable[[Unit], Made], unit: Unit) -> Made | OptimalSamplingError:
    try:
        return work(unit)
    except OptimalSamplingError as error:
        return error


def _run_unit(experiment: Experiment, unit: Unit) -> dict[str, Any]:
    return experiment.run(unit)


def _start(output: str, parent: int) -> None:
    """In a new process: what it prints goes into a file, and it ends when its parent does."""
    _redirect(Path(output))
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _redirect(output: Path) -> None:
    path = output / "logs" / f"{os.getpid()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = path.open("a", buffering=1)


@contextmanager
def log_of(output: Path) -> Iterator[None]:
    """What is printed goes into a file."""
    before = sys.stdout, sys.stderr
    _redirect(output)
    try:
        yield
    finally:
        sys.stdout.close()
        sys.stdout, sys.stderr = before


class Pace:
    """Lines with the number of units done and the time that the rest will take."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()

    def show(self, text: str) -> None:
        """One more unit is done."""
        self._done += 1
        seconds = time.monotonic() - self._began
        left = timedelta(seconds=round(seconds / self._done * (self._total - self._done)))
        rate = f"{3600 * self._done / seconds:.0f} units/h"
        say(f"[{self._done}/{self._total}, {rate}, {left} left] {text}")


def _scores(result: dict[str, Any]) -> str:
    questions = len(result["sampled"])
    sampled = sum(result["sampled"]) / questions / result["samples"]
    return f"T = 1 {sampled:.1%}, greedy {sum(result['greedy']) / questions:.1%}"


def say(text: str) -> None:
    """A line on the terminal."""
    print(text, flush=True)
