"""A table of large shapes in one call that keeps to a budget of time; what does not fit is skipped.

Every cell is one run, cut off when its share of the time is over; a share that is not used goes to
the cells after it. Sizes with a target come first. Texts are of equal length, prompts of random
ids.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.table import Table

from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.footprint import predicted_bytes
from optimal_sampling.bench.hardware import lockstep_bound
from optimal_sampling.bench.harness import SILENT, Display, Report, make_table
from optimal_sampling.bench.instruments import OutOfTime, Recorder
from optimal_sampling.bench.speed import (
    IDEAL,
    LOCKSTEP,
    ROOFLINE,
    STUDENT,
    TEACHER,
    ideal_lockstep,
)
from optimal_sampling.bench.subcommands import GpuOptions, Size, parse_sizes
from optimal_sampling.bench.workload import ModelPair, Variant, Workload
from optimal_sampling.engines.device import resolve_device
from optimal_sampling.errors import ConfigError, EngineError

__all__ = [
    "FAST",
    "VARIANTS",
    "Budget",
    "Cell",
    "large_pairs",
    "measure_cell",
    "measure_cells",
    "report",
    "run",
    "run_bounded",
    "targets",
]

FAST, SLOW = "q* speculative, emulated acceptance 0.9", "q* speculative, emulated acceptance 0.8"
SELF = "self-distillation of the teacher, lockstep"
VARIANTS = {
    LOCKSTEP: Variant(draft_tokens=0),
    TEACHER: Variant(mode="teacher"),
    STUDENT: Variant(mode="student"),
    FAST: Variant(acceptance=0.9),
    SLOW: Variant(acceptance=0.8),
    SELF: Variant(draft_tokens=0),
}
WARM_UP_TOKENS = 32
FEWEST_ROUNDS = 16
"""Rounds that a run which is cut off must have for a figure."""
HUGE_SHARE, MARGIN = 0.2, 0.03
"""Shares of the budget: for --huge; for the last round and the tables."""


@dataclass
class Budget:
    """A number of seconds of wall clock, from now on."""

    seconds: float
    most_rounds: int | None = None
    """Most rounds of each run, in addition."""
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        """Seconds."""
        return self.started + self.seconds - time.perf_counter()

    def share(self, part: float) -> Budget:
        """A part of what is left."""
        return Budget(self.left() * part, self.most_rounds)

    def recorder(self) -> Recorder:
        """A recorder that ends a run when the time is up."""
        return Recorder(self.started + self.seconds, self.most_rounds)


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

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.size}, {self.row}: {self.skipped}"
        whole = self.size.batch * self.size.tokens
        part = "" if self.complete else f" of {whole}, as the time was up"
        rate = f"{self.rate:.0f} tokens per second"
        return f"{self.size}, {self.row}: {rate} ({self.tokens} tokens{part})"


@dataclass(frozen=True)
class BoundedRun:
    """A run that ended at the limits of its recorder, if not before."""

    recorder: Recorder
    seconds: float
    tokens: int
    finished: int

    @property
    def decoding(self) -> float:
        """Tokens per second of the rounds that read no prompt; 0 where there was none."""
        spent = self.recorder.decoding
        return spent.tokens / spent.wall if spent.tokens else 0.0


def run_bounded(
    pair: ModelPair, workload: Workload, batch: int, variant: Variant, recorder: Recorder
) -> BoundedRun:
    """Generate until done, or to the recorder's limits. Raises EngineError if a text fails."""
    started = time.perf_counter()
    engine = pair.engine(workload, batch, variant, recorder)
    drawn: dict[str, int] = {}
    unfinished: dict[str, int] = {}
    try:
        for completion in engine.generate(workload.requests):
            if completion.error:
                raise EngineError(completion.error)
            drawn[completion.request.id] = len(completion.token_ids)
    except OutOfTime:
        unfinished = recorder.unfinished()
    tokens = sum((unfinished | drawn).values())
    return BoundedRun(recorder, time.perf_counter() - started, tokens, len(drawn))


def measure_cells(
    pair: RandomPair, sizes: Sequence[Size], budget: Budget, display: Display = SILENT
) -> list[Cell]:
    """All rows of all sizes within the budget. Each is shown at once, as a call may be killed."""
    display.status("random weights")
    _warm_up(pair, budget)
    found: list[Cell] = []
    todo = [(size, row) for size in sizes for row in VARIANTS]
    for i, (size, row) in enumerate(todo):
        display.status(f"{size}, {row}, {budget.left():.0f} s left")
        found.append(measure_cell(pair, size, row, budget.share(1 / (len(todo) - i))))
        display.show(str(found[-1]))
    return found


def _warm_up(pair: RandomPair, budget: Budget) -> None:
    """Load the models and run what happens once per process."""
    workload = pair.workload(1, WARM_UP_TOKENS)
    pair.engine(workload, 1)
    for row in (LOCKSTEP, FAST):
        with contextlib.suppress(EngineError, RuntimeError):  # reported by the row's own cells
            run_bounded(pair, workload, 1, VARIANTS[row], budget.share(0.1).recorder())


def measure_cell(pair: RandomPair, size: Size, row: str, budget: Budget) -> Cell:
    """The same run twice within the budget: the first warms up, and records shapes on a GPU."""
    if budget.left() <= 0:
        return Cell(size, row, skipped="no time left")
    workload = pair.workload(size.batch, size.tokens)
    models = pair.twin() if row == SELF else pair
    once = partial(run_bounded, models, workload, size.batch, VARIANTS[row])
    try:
        once(budget.share(0.5).recorder())
        done = once(budget.recorder())
    except (EngineError, RuntimeError) as error:  # other cells can still be measured
        return Cell(size, row, skipped=f"failed: {str(error).splitlines()[0]}")
    complete = done.tokens == size.batch * size.tokens
    rounds = done.recorder.rounds
    if not complete and rounds < FEWEST_ROUNDS:
        reason = f"no more than {rounds} rounds within its {budget.seconds:.1f} s"
        return Cell(size, row, skipped=reason)
    return Cell(size, row, done.tokens, done.seconds, done.decoding, complete)


def measure_large_batch(pair: RandomPair, size: Size, budget: Budget) -> dict[str, Any]:
    """Plain decoding of the batch until the budget is spent, or why it was `skipped`."""
    if budget.left() <= 0:
        return {"skipped": "no time left"}
    workload = pair.workload(size.batch, size.tokens)
    try:
        predicted = predicted_bytes(pair.engine(workload, size.batch), workload)
        done = run_bounded(pair, workload, size.batch, VARIANTS[LOCKSTEP], budget.recorder())
    except (EngineError, RuntimeError) as error:
        return {"skipped": f"failed: {str(error).splitlines()[0]}"}
    recorder = done.recorder
    return {
        "prompt_tokens": pair.prompt_tokens,
        "predicted_gib": predicted / 2**30,
        "kv_gib": recorder.kv_bytes / 2**30,
        "most_rows": recorder.most_rows,
        "rounds": recorder.rounds,
        "preemptions": recorder.loop.scheduler.preemptions,
        "finished": done.finished,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "decoding": done.decoding,
        "skipped": "",
    }


CellRates = dict[tuple[str, Size], float]
"""Tokens per second of the measured cells, by row and size."""


def cell_rates(cells: Sequence[Cell]) -> CellRates:
    """Those of the cells that were not skipped."""
    return {(cell.row, cell.size): cell.rate for cell in cells if cell.tokens}


def bounds(pair: RandomPair, sizes: Sequence[Size], rates: CellRates) -> CellRates:
    """Tokens per second of ideal lockstep and of the roofline."""
    found = {}
    for size in sizes:
        if (TEACHER, size) in rates and (STUDENT, size) in rates:
            both = {name: rates[name, size] for name in (TEACHER, STUDENT)}
            found[IDEAL, size] = ideal_lockstep(both)
        engine = pair.engine(pair.workload(1), size.batch)
        cached = pair.prompt_tokens + size.tokens / 2
        found[ROOFLINE, size] = lockstep_bound(engine, size.batch, cached, pair.bandwidth)
    return found


@dataclass(frozen=True)
class Target:
    """A figure that is required, and what was found."""

    what: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        """Reached."""
        return self.found >= self.wanted


def targets(rates: CellRates) -> list[Target]:
    """Those whose rows are known. `rates` holds ideal lockstep as well."""
    found = []
    for size in dict.fromkeys(size for _, size in rates):
        at = {row: rate for (row, other), rate in rates.items() if other == size}
        if size == Size(32, 512) and LOCKSTEP in at:
            name = f"{size}: q* lockstep, tokens per second"
            found.append(Target(name, 3000, at[LOCKSTEP]))
        if LOCKSTEP in at and IDEAL in at:
            name = f"{size}: q* lockstep / ideal lockstep"
            found.append(Target(name, 0.9, at[LOCKSTEP] / at[IDEAL]))
        if size.batch == 8 and FAST in at and TEACHER in at:
            name = f"{size}: q* speculative at 0.9 / teacher alone"
            found.append(Target(name, 1.2, at[FAST] / at[TEACHER]))
    return found


def shapes_table(sizes: Sequence[Size], cells: Sequence[Cell], limits: CellRates) -> Table:
    """A row per system, a column per size."""
    figures = {(cell.row, cell.size): _figure(cell) for cell in cells}
    figures |= {key: f"{rate:.0f}" for key, rate in limits.items()}
    named = [
        (row, *(figures.get((row, size), "-") for size in sizes))
        for row in (*VARIANTS, IDEAL, ROOFLINE)
    ]
    rows = [*named[: len(VARIANTS)], (), *named[len(VARIANTS) :]]
    columns = ("tokens per second, batch x tokens", *map(str, sizes))
    table = make_table("Large shapes, random weights", columns, rows)
    table.caption = "* part of the texts, as the time was up, without their prompts; - skipped"
    return table


def _figure(cell: Cell) -> str:
    return "-" if cell.skipped else f"{cell.rate:.0f}{'' if cell.complete else '*'}"


def run(options: GpuOptions, display: Display) -> Report:
    """The subcommand `gpu`. Raises ConfigError where large shapes are asked of a CPU."""
    return report(options, *large_pairs(options), display)


def large_pairs(options: GpuOptions) -> tuple[RandomPair, RandomPair]:
    """The pair of the table, and that of --huge. Nothing is loaded yet."""
    teacher, student, huge = options.teacher_shape, options.student_shape, options.huge_shape
    on_cpu = resolve_device(options.device).type == "cpu"
    if on_cpu and {teacher, student, huge} != {"tiny"}:
        raise ConfigError(
            "bench gpu is for large shapes, and there is no GPU here; on a CPU try it with "
            "--teacher-shape tiny --student-shape tiny --huge-shape tiny"
        )
    pair = RandomPair(options.models, teacher, student, prompt_tokens=options.prompt_tokens)
    [size] = parse_sizes([options.huge])
    half = max(1, size.tokens // 2)
    return pair, RandomPair(options.models, huge, huge, same_weights=True, prompt_tokens=half)


def report(
    options: GpuOptions, pair: RandomPair, large: RandomPair, display: Display = SILENT
) -> Report:
    """Measure and show the table, its targets, and the batch that memory does not hold."""
    budget = Budget(options.budget * (1 - MARGIN))
    result = _measure_table(options, pair, budget, display)
    pair.close()
    shape, [size] = options.huge_shape, parse_sizes([options.huge])
    display.status(f"{size} tokens of {shape}, {budget.left():.0f} s left")
    facts = measure_large_batch(large, size, budget)
    if facts["skipped"]:
        display.show(f"skipped: {size} of {shape}: {facts['skipped']}")
    else:
        title = f"{size} tokens, {shape} shape as both models, lockstep"
        rows = [(name.replace("_", " "), value) for name, value in facts.items()]
        display.show(make_table(title, ("by admission", ""), rows[:-1]))
    admission = {"size": asdict(size), "shape": shape, **facts}
    return Report({**pair.names, "huge": large.names}, [{**result, "admission": admission}])


def _measure_table(
    options: GpuOptions, pair: RandomPair, budget: Budget, display: Display
) -> dict[str, Any]:
    sizes = parse_sizes(options.sizes)
    kept = Budget(budget.left() - HUGE_SHARE * options.budget)
    cells = measure_cells(pair, sizes, kept, display)
    rates = cell_rates(cells)
    limits = bounds(pair, sizes, rates)
    reached = targets(rates | limits)
    display.show(shapes_table(sizes, cells, limits))
    rows = [(t.what, t.wanted, t.found, "yes" if t.met else "no") for t in reached]
    display.show(make_table("Targets", ("target", "wanted", "found", "met"), rows))
    notes = pair.engine(pair.workload(1), 1).notes()
    display.show(", ".join(f"{name} {value}" for name, value in notes.items()))
    return {
        "engine": notes,
        "bandwidth": pair.bandwidth,
        "cells": [{**asdict(cell), "tokens_per_second": cell.rate} for cell in cells],
        "bounds": {
            name: {str(size): rate for (row, size), rate in limits.items() if row == name}
            for name in (IDEAL, ROOFLINE)
        },
        "targets": [{**asdict(target), "met": target.met} for target in reached],
    }
