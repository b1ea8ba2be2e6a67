"""The table of large shapes in one call that keeps to a budget of time: what does not fit is skipped, and said.

Every cell is one run, cut off when its share of the time is over; a share that is not used goes to the cells after it.
Sizes with a target come first. Texts are of equal length, prompts of random ids.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from optimal_sampling.bench.contenders import LOCKSTEP, STUDENT, TEACHER
from optimal_sampling.bench.memory import predicted_bytes
from optimal_sampling.bench.options import BenchOptions, Size, parse_size
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.roofline import lockstep_bound
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.speed import IDEAL, ROOFLINE, ideal_lockstep
from optimal_sampling.bench.watch import TimeIsUp, Watch
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.errors import EngineError

__all__ = ["Cell", "Clock", "Slice", "gpu_table", "measure_cells", "measure_slice", "run", "targets"]

SIZES = (Size(32, 512), Size(8, 256), Size(16, 512), Size(16, 1024), Size(8, 2048))
TEACHER_SHAPE, STUDENT_SHAPE = "Qwen2.5-3B", "Qwen2.5-1.5B"
FAST, SLOW = "q* speculative, emulated acceptance 0.9", "q* speculative, emulated acceptance 0.8"
SELF = "self-distillation of the teacher, lockstep"
ROWS: dict[str, dict[str, Any]] = {
    LOCKSTEP: {"draft_tokens": 0},
    TEACHER: {"mode": "teacher"},
    STUDENT: {"mode": "student"},
    FAST: {"acceptance": 0.9},
    SLOW: {"acceptance": 0.8},
    SELF: {"draft_tokens": 0},
}
WARM_UP = 8
"""Tokens of an uncounted run before each cell's own."""
HUGE_SHARE, MARGIN = 0.2, 0.03
"""Of the budget: kept for the size that memory does not hold, and for the last round and the tables."""


class Clock:
    """A budget of wall clock, from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()


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
    """Every text was drawn to its end; otherwise the time was up before."""
    skipped: str = ""
    """Why there is no figure."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Slice:
    """As much of the size that memory does not hold as there was time for."""

    size: Size
    shape: str
    prompt_tokens: int = 0
    predicted_gib: float = 0.0
    """Keys and values of all texts at their longest."""
    kv_gib: float = 0.0
    """Largest size of the caches."""
    most_rows: int = 0
    """Requests in flight at once."""
    rounds: int = 0
    preemptions: int = 0
    finished: int = 0
    tokens: int = 0
    seconds: float = 0.0
    decoding: float = 0.0
    """Tokens per second of the rounds that read no prompt."""
    skipped: str = ""
    """Why there is no figure."""


@dataclass(frozen=True)
class Bounded:
    """A run that was cut off when its time was up."""

    engine: LocalEngine
    watch: Watch
    seconds: float
    tokens: int
    finished: int

    @property
    def decoding(self) -> float:
        """Tokens per second of the rounds that read no prompt; 0 where there was none."""
        spent = self.watch.decoding
        return spent.tokens / spent.wall if spent.tokens else 0.0


def run_bounded(bench: Bench, workload: Workload, batch: int, seconds: float, how: dict[str, Any]) -> Bounded:
    """Generate until done, or until no further round may start. Raises EngineError where a text fails."""
    started = time.perf_counter()
    watch = Watch(deadline=started + seconds)
    engine = bench.engine(workload, batch, watch=watch, **how)
    drawn: dict[str, int] = {}
    finished = 0
    try:
        for completion in engine.generate(workload.requests):
            if completion.error:
                raise EngineError(completion.error)
            drawn[completion.request.id] = len(completion.token_ids)
            finished += 1
    except TimeIsUp:
        assert engine.last_run is not None
        scheduler = engine.last_run.scheduler
        drawn = {s.request.id: len(s.output) for s in (*scheduler.running, *scheduler.waiting)} | drawn
    return Bounded(engine, watch, time.perf_counter() - started, sum(drawn.values()), finished)


def measure_cells(bench: ShapeBench, sizes: tuple[Size, ...], clock: Clock, tell: Tell) -> list[Cell]:
    """All rows of all sizes, before the clock has run out."""
    found: list[Cell] = []
    todo = [(size, row) for size in sizes for row in ROWS]
    for i, (size, row) in enumerate(todo):
        tell(f"{size}, {row}, {clock.left():.0f} s left")
        found.append(_cell(bench, size, row, clock.left() / (len(todo) - i)))
    return found


def _cell(bench: ShapeBench, size: Size, row: str, seconds: float) -> Cell:
    """A warm run and a counted one, in so many seconds together."""
    if seconds <= 0:
        return Cell(size, row, skipped="no time left")
    clock, workload = Clock(seconds), bench.workload(size.batch, size.tokens)
    pair = bench.twin() if row == SELF else bench
    try:
        run_bounded(pair, workload.shortened(min(WARM_UP, size.tokens)), size.batch, seconds / 2, ROWS[row])
        done = run_bounded(pair, workload, size.batch, clock.left(), ROWS[row])
    except (EngineError, RuntimeError) as error:  # a cell that fails is not to cost the others
        return Cell(size, row, skipped=f"failed: {str(error).splitlines()[0]}")
    if not done.tokens:
        return Cell(size, row, skipped=f"no token within its {seconds:.1f} s")
    complete = done.tokens == size.batch * size.tokens
    return Cell(size, row, done.tokens, done.seconds, done.decoding, complete)


def measure_slice(bench: ShapeBench, size: Size, shape: str, clock: Clock) -> Slice:
    """Plain decoding of the whole batch until the clock has run out."""
    if clock.left() <= 0:
        return Slice(size, shape, skipped="no time left")
    workload = bench.workload(size.batch, size.tokens)
    try:
        predicted = predicted_bytes(bench.engine(workload, size.batch), workload)
        done = run_bounded(bench, workload, size.batch, clock.left(), {"draft_tokens": 0})
    except (EngineError, RuntimeError) as error:
        return Slice(size, shape, skipped=f"failed: {str(error).splitlines()[0]}")
    assert done.engine.last_run is not None
    return Slice(
        size=size,
        shape=shape,
        prompt_tokens=bench.prompt_tokens,
        predicted_gib=predicted / 2**30,
        kv_gib=done.watch.kv_bytes / 2**30,
        most_rows=done.watch.most_rows,
        rounds=done.watch.rounds,
        preemptions=done.engine.last_run.scheduler.preemptions,
        finished=done.finished,
        tokens=done.tokens,
        seconds=done.seconds,
        decoding=done.decoding,
    )


def bounds(bench: ShapeBench, sizes: tuple[Size, ...], cells: list[Cell]) -> dict[str, dict[Size, float]]:
    """Per size, the tokens per second of ideal lockstep and of the roofline."""
    rates = {(cell.row, cell.size): cell.rate for cell in cells if cell.tokens}
    ideal, roofline = {}, {}
    for size in sizes:
        if (TEACHER, size) in rates and (STUDENT, size) in rates:
            ideal[size] = ideal_lockstep({name: rates[name, size] for name in (TEACHER, STUDENT)})
        engine = bench.engine(bench.workload(1), size.batch)
        roofline[size] = lockstep_bound(engine, size.batch, bench.prompt_tokens + size.tokens / 2, bench.bandwidth)
    return {IDEAL: ideal, ROOFLINE: roofline}


@dataclass(frozen=True)
class Target:
    """A figure that was asked for, and what was found."""

    what: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        """Reached."""
        return self.found >= self.wanted


def targets(cells: list[Cell], ideal: dict[Size, float]) -> list[Target]:
    """Those whose rows were measured."""
    rates = {(cell.row, cell.size): cell.rate for cell in cells if cell.tokens}
    found = []
    for size in dict.fromkeys(cell.size for cell in cells):
        lockstep, teacher, fast = (rates.get((row, size), 0.0) for row in (LOCKSTEP, TEACHER, FAST))
        if size == Size(32, 512) and lockstep:
            found.append(Target(f"{size}: q* lockstep, tokens per second", 3000, lockstep))
        if lockstep and size in ideal:
            found.append(Target(f"{size}: q* lockstep / ideal lockstep", 0.9, lockstep / ideal[size]))
        if size.batch == 8 and fast and teacher:
            found.append(Target(f"{size}: q* speculative at 0.9 / teacher alone", 1.2, fast / teacher))
    return found


def gpu_table(title: str, sizes: tuple[Size, ...], cells: list[Cell], limits: dict[str, dict[Size, float]]) -> Table:
    """For people: a row per contender, a column per size."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "* as much of the texts as there was time for; - skipped"
    table.add_column("tokens per second, batch x tokens")
    for size in sizes:
        table.add_column(str(size), justify="right")
    for row in ROWS:
        table.add_row(row, *(_figure(cell) for cell in cells if cell.row == row))
    table.add_section()
    for name, values in limits.items():
        table.add_row(name, *(f"{values[size]:.0f}" if size in values else "-" for size in sizes))
    return table


def _figure(cell: Cell) -> str:
    return "-" if cell.skipped else f"{cell.rate:.0f}" + ("" if cell.complete else "*")


def slice_table(part: Slice) -> Table:
    """For people."""
    table = Table(title=f"{part.size} tokens, {part.shape} shape as both models, lockstep", title_justify="left")
    table.add_column("by admission")
    table.add_column("", justify="right")
    for name, value in asdict(part).items():
        if name not in ("size", "shape", "skipped"):
            table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    return table


def target_table(found: list[Target]) -> Table:
    """For people."""
    table = Table(title="Targets", title_justify="left")
    table.add_column("target")
    for name in ("wanted", "found", "met"):
        table.add_column(name, justify="right")
    for target in found:
        table.add_row(target.what, f"{target.wanted:g}", f"{target.found:.2f}", "yes" if target.met else "no")
    return table


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench gpu`."""
    whole = Clock(options.budget * (1 - MARGIN))
    sizes, huge = options.sizes_or(SIZES), parse_size(options.huge)
    teacher, student = options.shapes or (TEACHER_SHAPE, STUDENT_SHAPE)
    large = ShapeBench(
        options.models, options.huge_shape, options.huge_shape, same_weights=True, acceptance=None,
        prompt_tokens=max(1, huge.tokens // 2),
    )  # fmt: skip
    bench = ShapeBench(options.models, teacher, student, acceptance=None, prompt_tokens=options.prompt_tokens)
    tell("random weights")
    bench.engine(bench.workload(1), 1)  # loading is nobody's cell
    cells = measure_cells(bench, sizes, Clock(whole.left() - HUGE_SHARE * options.budget), tell)
    limits = bounds(bench, sizes, cells)
    show(gpu_table(f"{teacher} and {student} shapes, random weights", sizes, cells, limits))
    reached = targets(cells, limits[IDEAL])
    show(target_table(reached))
    bench.close()
    tell(f"{huge} tokens of {options.huge_shape}, {whole.left():.0f} s left")
    part = measure_slice(large, huge, options.huge_shape, whole)
    show(slice_table(part))
    skipped = [f"{cell.size}, {cell.row}: {cell.skipped}" for cell in cells if cell.skipped]
    skipped += [f"{huge} of {options.huge_shape}: {part.skipped}"] if part.skipped else []
    for line in skipped:
        show(f"skipped: {line}")
    result = {
        "bandwidth": bench.bandwidth,
        "cells": [asdict(cell) for cell in cells],
        "bounds": {name: {str(size): value for size, value in values.items()} for name, values in limits.items()},
        "targets": [{**asdict(target), "met": target.met} for target in reached],
        "admission": asdict(part),
        "skipped": skipped,
    }
    return Report({**bench.names, "huge": large.names}, [result])
