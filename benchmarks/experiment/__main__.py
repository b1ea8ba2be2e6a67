"""Which text makes the best student, on the shipped pair, a second one, or a pair of your own.

    python -m benchmarks.experiment tune      the learning rate, on validation problems
    python -m benchmarks.experiment run       what the profile still owes; killed, it goes on
    python -m benchmarks.experiment report    docs/experiment.md from what is on the disk

Called in the root of the repository, with the packages of the extras `train` and `eval`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from benchmarks.experiment.plan import DEFAULT_PLAN, Plan, claim_folder, given_pair, load_plan

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, OptimalSamplingError


@dataclass(frozen=True)
class Options:
    """Draw text in several ways, train a student on each, and compare the students."""

    command: tyro.conf.Positional[Literal["run", "tune", "report", "compare"]]
    """`run`: units that are owed; `tune`: the learning rate; `report`: tables and figure;
    `compare`: whether this folder's accuracies lie within the intervals of --against."""
    output: str = "outputs/experiment"
    """Folder of results. A second call goes on where the first one ended."""
    plan: str = str(DEFAULT_PLAN)
    """The YAML file of arms, seeds, pairs and criteria."""
    full: bool = False
    """All arms, and all seeds of the main ones."""
    arms: Annotated[str, tyro.conf.arg(metavar="A,B")] = ""
    """Only these arms."""
    seeds: Annotated[str, tyro.conf.arg(metavar="N,N")] = ""
    """These seeds in place of the plan's."""
    teacher: str | None = None
    """A folder or hub id, with --student in place of the plan's pairs."""
    student: str | None = None
    """The model to be trained."""
    dataset: str | None = None
    """Problems with reference answers, in place of the shipped generator: what `generate
    --dataset` takes. Divided into held-out problems and one slice for every seed."""
    workers: int | None = None
    """Processes side by side; unset: one per core up to 2, or 1 with a GPU."""
    docs: str = "docs/experiment.md"
    """`report`: the file to write; the figure and the data go beside it."""
    against: str = "docs/measurements/experiment.json"
    """`compare`: data of a report."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks.experiment")
    output = expand_user(options.output)
    os.environ.setdefault("HF_DATASETS_CACHE", str(output.absolute() / "cache"))
    try:
        return _run(options, output)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on. Results: {output}", file=sys.stderr)
        return 130
    except OptimalSamplingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: Options, output: Path) -> int:
    if options.command in ("report", "compare"):
        from benchmarks.experiment import report

        if options.command == "report":
            return report.write(output, Path(options.docs))
        return report.compare(output, Path(options.against))
    plan = _plan(options)
    from benchmarks.experiment import work  # after the environment is set

    claim_folder(output, plan, options.dataset)
    workers = work.Workers(output, plan, options.dataset, _workers(options))
    arms = [name for name in options.arms.split(",") if name]
    if options.command == "tune":
        return workers.tune(arms)
    profile = "full" if options.full else "main"
    return workers.run(plan.units(profile, arms, _numbers(options.seeds)))


def _plan(options: Options) -> Plan:
    plan = load_plan(Path(options.plan))
    if (options.teacher is None) != (options.student is None):
        raise ConfigError("--teacher and --student belong together")
    if options.teacher is None or options.student is None:
        return plan
    return given_pair(plan, options.teacher, options.student)


def _numbers(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--seeds must be whole numbers from 0 with commas, got {text!r}")
    return [int(part) for part in parts]


def _workers(options: Options) -> int:
    if options.workers is not None:
        if options.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {options.workers}")
        return options.workers
    import torch

    return 1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    sys.exit(main())
