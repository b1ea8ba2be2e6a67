"""One row at one size, and the size that memory does not hold: each as far as the time that it is given goes."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from optimal_sampling.bench.contenders import LOCKSTEP, STUDENT, TEACHER
from optimal_sampling.bench.memory import predicted_bytes
from optimal_sampling.bench.options import Size
from optimal_sampling.bench.report import Show, Tell
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.watch import MeasuringEngine, TimeIsUp, Watch
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.errors import EngineError

__all__ = [
    "FAST",
    "ROWS",
    "SLOW",
    "Cell",
    "Clock",
    "Slice",
    "measure_cells",
    "measure_slice",
    "run_bounded",
]

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
FIRST = 32
"""Tokens of the first runs of all."""
FEWEST_ROUNDS = 16
"""A run that is cut off before has no figure."""


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
    """Every text was drawn to its end; otherwise the time was up before, and what was drawn is too little to pay for
    its prompts."""
    skipped: str = ""
    """Why there is no figure."""

    @property
    def rate(self) -> float:
        """Tokens per second, prompts included where the texts are complete."""
        return self.tokens / self.seconds if self.complete else self.decoding

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.size}, {self.row}: {self.skipped}"
        part = (
            "" if self.complete else f" of {self.size.batch * self.size.tokens}, as the time was up"
        )
        return f"{self.size}, {self.row}: {self.rate:.0f} tokens per second ({self.tokens} tokens{part})"


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

    engine: MeasuringEngine
    watch: Watch
    seconds: float
    tokens: int
    finished: int

    @property
    def decoding(self) -> float:
        """Tokens per second of the rounds that read no prompt; 0 where there was none."""
        spent = self.watch.decoding
        return spent.tokens / spent.wall if spent.tokens else 0.0


def run_bounded(
    bench: Bench, workload: Workload, batch: int, seconds: float, how: dict[str, Any]
) -> Bounded:
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
        assert engine.loop is not None
        scheduler = engine.loop.scheduler
        drawn = {
            s.request.id: len(s.output) for s in (*scheduler.running, *scheduler.waiting)
        } | drawn
    return Bounded(engine, watch, time.perf_counter() - started, sum(drawn.values()), finished)


def measure_cells(
    bench: ShapeBench, sizes: tuple[Size, ...], clock: Clock, show: Show, tell: Tell
) -> list[Cell]:
    """All rows of all sizes, before the clock has run out. Each is shown at once, as a call may be killed."""
    found: list[Cell] = []
    todo = [(size, row) for size in sizes for row in ROWS]
    _load_and_warm(bench, clock, tell)
    for i, (size, row) in enumerate(todo):
        tell(f"{size}, {row}, {clock.left():.0f} s left")
        found.append(_cell(bench, size, row, clock.left() / (len(todo) - i)))
        show(str(found[-1]))
    return found


def _load_and_warm(bench: ShapeBench, clock: Clock, tell: Tell) -> None:
    """What happens once per process is nobody's cell."""
    tell("random weights")
    workload = bench.workload(1, FIRST)
    bench.engine(workload, 1)
    for row in (LOCKSTEP, FAST):
        with contextlib.suppress(EngineError, RuntimeError):  # its cell will say so
            run_bounded(bench, workload, 1, clock.left() / 10, ROWS[row])


def _cell(bench: ShapeBench, size: Size, row: str, seconds: float) -> Cell:
    """The same run twice, in so many seconds together: the first one warms up, and records shapes on a GPU."""
    if seconds <= 0:
        return Cell(size, row, skipped="no time left")
    clock, workload = Clock(seconds), bench.workload(size.batch, size.tokens)
    pair = bench.twin() if row == SELF else bench
    try:
        run_bounded(pair, workload, size.batch, seconds / 2, ROWS[row])
        done = run_bounded(pair, workload, size.batch, clock.left(), ROWS[row])
    except (EngineError, RuntimeError) as error:  # a cell that fails is not to cost the others
        return Cell(size, row, skipped=f"failed: {str(error).splitlines()[0]}")
    complete = done.tokens == size.batch * size.tokens
    if not complete and done.watch.rounds < FEWEST_ROUNDS:
        return Cell(
            size, row, skipped=f"no more than {done.watch.rounds} rounds within its {seconds:.1f} s"
        )
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
    assert done.engine.loop is not None
    return Slice(
        size=size,
        shape=shape,
        prompt_tokens=bench.prompt_tokens,
        predicted_gib=predicted / 2**30,
        kv_gib=done.watch.kv_bytes / 2**30,
        most_rows=done.watch.most_rows,
        rounds=done.watch.rounds,
        preemptions=done.engine.loop.scheduler.preemptions,
        finished=done.finished,
        tokens=done.tokens,
        seconds=done.seconds,
        decoding=done.decoding,
    )
