"""A table of large shapes in one call that keeps to a budget of time; what does not fit is skipped.

Every cell is one run, cut off when its share of the time is over; a share that is not used goes to
the cells after it. Texts are of equal length, prompts of random
ids.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.costs import predicted_bytes
from optimal_sampling.bench.harness import Report, Row, make_table, quotients
from optimal_sampling.bench.instruments import Recorder
from optimal_sampling.bench.speed import IDEAL, LOCKSTEP, STUDENT, TEACHER, bounds
from optimal_sampling.bench.speed import VARIANTS as SPEED_VARIANTS
from optimal_sampling.bench.subcommands import GpuOptions, Size, parse_size
from optimal_sampling.bench.workload import Variant
from optimal_sampling.engines.device import resolve_device
from optimal_sampling.errors import ConfigError, EngineError

__all__ = ["run"]

FAST, SLOW = "q* speculative, emulated acceptance 0.9", "q* speculative, emulated acceptance 0.8"
SELF = "self-distillation of the teacher, lockstep"
VARIANTS = {
    **{name: SPEED_VARIANTS[name] for name in (LOCKSTEP, TEACHER, STUDENT)},
    FAST: Variant(acceptance=0.9),
    SLOW: Variant(acceptance=0.8),
    SELF: SPEED_VARIANTS[LOCKSTEP],
}
RATIOS = (
    ("q* lockstep / ideal lockstep", LOCKSTEP, (IDEAL,)),
    ("q* speculative at 0.9 / teacher alone", FAST, (TEACHER,)),
)
WARM_UP = Size(1, 32)
FEWEST_ROUNDS = 16
"""Rounds that a run which is cut off must have for a figure."""
HUGE_SHARE, MARGIN = 0.2, 0.03
"""Shares of the budget: for --huge; for the last round and the tables."""


class Budget:
    """A number of seconds of wall clock, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def share(self, part: float) -> Budget:
        """A part of what is left."""
        return Budget(self.left() * part)

    def over(self, rounds: int) -> bool:
        """Whether a run ends that has had this many rounds."""
        return self.left() <= 0


class Skipped(Exception):
    """Why there is no figure."""


@dataclass(frozen=True)
class Cell:
    """One row at one size."""

    size: Size
    row: str
    tokens: int = 0
    """Drawn, over all texts."""
    seconds: float = 0.0
    """Prompts included."""
    decoding: float = 0.0
    """Tokens per second of the rounds that read no prompt."""
    complete: bool = False
    """Every text was drawn to its end."""
    skipped: str = ""
    """Why there is no figure."""

    @property
    def rate(self) -> float:
        """Tokens per second, prompts included where the texts are complete."""
        return self.tokens / self.seconds if self.complete else self.decoding

    @property
    def figure(self) -> str:
        """The cell of the table."""
        return "-" if self.skipped else f"{self.rate:.0f}{'' if self.complete else '*'}"

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.size}, {self.row}: {self.skipped}"
        part = "" if self.complete else ", as the time was up"
        rate = f"{self.rate:.0f} tokens per second"
        return f"{self.size}, {self.row}: {rate} ({self.tokens} tokens{part})"


def _record(pair: RandomPair, size: Size, row: str, budget: Budget) -> Recorder:
    """Draw the texts of a row within the budget. Raises Skipped where that is impossible."""
    if budget.left() <= 0:
        raise Skipped("no time left")
    workload = pair.workload(size.batch, size.tokens)
    try:
        engine = pair.engine(workload, size.batch, VARIANTS[row])
        engine.stop = budget.over
        return engine.record(workload.requests)
    except (EngineError, RuntimeError) as error:  # other cells can still be measured
        raise Skipped(f"failed: {str(error).splitlines()[0]}") from error


def measure_cells(
    pair: RandomPair, sizes: Sequence[Size], budget: Budget, report: Report
) -> list[Cell]:
    """All rows of all sizes within the budget. Each is shown at once, as a call may be killed."""
    report.status("random weights")
    pair.loaded()
    for row in (LOCKSTEP, FAST):  # what happens once per process
        with contextlib.suppress(Skipped):  # reported by the row's own cells
            _record(pair, WARM_UP, row, budget.share(0.1))
    found: list[Cell] = []
    todo = [(size, row) for size in sizes for row in VARIANTS]
    for i, (size, row) in enumerate(todo):
        report.status(f"{size}, {row}, {budget.left():.0f} s left")
        found.append(measure_cell(pair, size, row, budget.share(1 / (len(todo) - i))))
        report.show(str(found[-1]))
    return found


def measure_cell(pair: RandomPair, size: Size, row: str, budget: Budget) -> Cell:
    """The same run twice within the budget: the first warms up, and records shapes on a GPU."""
    models = pair.twin() if row == SELF else pair
    try:
        _record(models, size, row, budget.share(0.5))
        done = _record(models, size, row, budget)
    except Skipped as error:
        return Cell(size, row, skipped=str(error))
    whole = done.whole
    complete = whole.tokens == size.batch * size.tokens
    if not complete and done.rounds < FEWEST_ROUNDS:
        reason = f"no more than {done.rounds} rounds within its {budget.seconds:.1f} s"
        return Cell(size, row, skipped=reason)
    return Cell(size, row, whole.tokens, whole.wall, done.decoding.rate(), complete)


def measure_large_batch(pair: RandomPair, size: Size, budget: Budget) -> dict[str, Any]:
    """Plain decoding of the batch until the budget is spent, or why it was `skipped`."""
    try:
        done = _record(pair, size, LOCKSTEP, budget)
    except Skipped as reason:
        return {"skipped": str(reason)}
    predicted = predicted_bytes(pair, pair.workload(size.batch, size.tokens))
    return {
        "prompt_tokens": pair.prompt_tokens,
        "predicted_gib": predicted / 2**30,
        "kv_gib": done.kv_bytes / 2**30,
        "most_rows": done.most_rows,
        "rounds": done.rounds,
        "preemptions": done.loop.scheduler.preemptions,
        "finished": len(done.lengths),
        "tokens": done.whole.tokens,
        "seconds": done.whole.wall,
        "decoding": done.decoding.rate(),
        "skipped": "",
    }


def large_pairs(options: GpuOptions) -> tuple[RandomPair, RandomPair]:
    """The pair of the table, and that of --huge. Nothing is loaded yet.

    Raises ConfigError where large shapes are asked of a CPU.
    """
    teacher, student, huge = options.teacher_shape, options.student_shape, options.huge_shape
    on_cpu = resolve_device(options.device).type == "cpu"
    if on_cpu and {teacher, student, huge} != {"tiny"}:
        raise ConfigError(
            "bench gpu is for large shapes, and there is no GPU here; on a CPU try it with "
            "--teacher-shape tiny --student-shape tiny --huge-shape tiny"
        )
    pair = RandomPair(options.models, teacher, student, prompt_tokens=options.prompt_tokens)
    half = max(1, parse_size(options.huge).tokens // 2)
    return pair, RandomPair(options.models, huge, huge, same_weights=True, prompt_tokens=half)


def run(options: GpuOptions, report: Report) -> None:
    """The subcommand `gpu`."""
    measure(options, *large_pairs(options), report)


def measure(options: GpuOptions, pair: RandomPair, large: RandomPair, report: Report) -> None:
    """Measure and show the table, and the batch that memory does not hold."""
    report.models = {**pair.names, "huge": large.names}
    budget = Budget(options.budget * (1 - MARGIN))
    kept = Budget(budget.left() - HUGE_SHARE * options.budget)
    result = _measure_table(pair, [parse_size(text) for text in options.sizes], kept, report)
    pair.close()
    shape, size = options.huge_shape, parse_size(options.huge)
    report.status(f"{size} tokens of {shape}, {budget.left():.0f} s left")
    facts = measure_large_batch(large, size, budget)
    if facts["skipped"]:
        report.show(f"skipped: {size} of {shape}: {facts['skipped']}")
    else:
        title = f"{size} tokens, {shape} shape as both models, lockstep"
        rows = [(name.replace("_", " "), value) for name, value in facts.items() if value != ""]
        report.show(make_table(title, ("by admission", ""), rows))
    result["admission"] = {"size": asdict(size), "shape": shape, **facts}
    report.results.append(result)


Figures: TypeAlias = dict[str, dict[str, Any]]
"""By row and size."""


def _measure_table(
    pair: RandomPair, sizes: list[Size], budget: Budget, report: Report
) -> dict[str, Any]:
    """A row per system, bound and ratio, a column per size."""
    cells = measure_cells(pair, sizes, budget, report)
    measured: Figures = defaultdict(dict)
    limits: Figures = defaultdict(dict)
    ratios: Figures = defaultdict(dict)
    for cell in cells:
        measured[cell.row][str(cell.size)] = cell.figure
    for size in sizes:
        rates = {cell.row: cell.rate for cell in cells if cell.size == size and cell.tokens}
        found = bounds(pair, rates, size.batch, pair.prompt_tokens + size.tokens / 2)
        for name, rate in found.items():
            limits[name][str(size)] = round(rate)
        for name, ratio in quotients(rates | found, RATIOS).items():
            ratios[name][str(size)] = ratio
    columns = ("tokens per second, batch x tokens", *map(str, sizes))
    sections = [_section(figures, columns[1:]) for figures in (measured, limits, ratios)]
    table = make_table("Large shapes, random weights", columns, *sections)
    table.caption = "* part of the texts, as the time was up, without their prompts; - skipped"
    report.show(table)
    notes = pair.loaded().notes()
    report.show(", ".join(f"{name} {value}" for name, value in notes.items()))
    return {
        "engine": notes,
        "bandwidth": pair.bandwidth,
        "cells": [{**asdict(cell), "tokens_per_second": cell.rate} for cell in cells],
        "bounds": limits,
        "ratios": ratios,
    }


def _section(figures: Figures, sizes: Sequence[str]) -> list[Row]:
    return [(name, *(row.get(size, "-") for size in sizes)) for name, row in figures.items()]
