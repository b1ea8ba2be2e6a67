"""Single figures of the table of large shapes, each measured within a share of the time.

A cell is one run, cut off when its share of the time is over; a share that is not used goes to
the cells after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.costs import predicted_bytes
from optimal_sampling.bench.instruments import Recorder
from optimal_sampling.bench.own_process import Broken
from optimal_sampling.bench.speed import LOCKSTEP, STUDENT, TEACHER
from optimal_sampling.bench.speed import VARIANTS as SPEED_VARIANTS
from optimal_sampling.bench.subcommands import GpuOptions, Size, parse_size
from optimal_sampling.bench.workload import Variant, Workload, weight_bytes
from optimal_sampling.errors import EngineError

__all__ = [
    "FAST",
    "HUGE",
    "RATE",
    "UNEVEN",
    "VARIANTS",
    "Budget",
    "Cell",
    "PairName",
    "Pairs",
    "Task",
    "lost_cell",
    "measure_cell",
    "measure_tasks",
    "speculation_bound",
    "tasks_of",
]

RATE = 0.9
FAST, SLOW = "q* speculative, emulated acceptance 0.9", "q* speculative, emulated acceptance 0.8"
SELF = "self-distillation of the teacher, lockstep"
UNEVEN = "q* lockstep, 4 times as many texts of uneven lengths"
HUGE = "q* lockstep, by admission"
VARIANTS = {
    **{name: SPEED_VARIANTS[name] for name in (LOCKSTEP, TEACHER, STUDENT)},
    FAST: Variant(acceptance=RATE),
    SLOW: Variant(acceptance=0.8),
    SELF: SPEED_VARIANTS[LOCKSTEP],
    UNEVEN: SPEED_VARIANTS[LOCKSTEP],
}
GAP_ROWS = (LOCKSTEP, TEACHER, STUDENT, FAST)
"""Rows of the pair of a large and a small model."""
WARM_UP = Size(1, 32)
FEWEST_ROUNDS = 16
"""Rounds that a run which is cut off must have for a figure."""
MOST_WIDTH = 17
"""Of a round, drafts and the last token."""
UNEVEN_TEXTS = 4
"""Texts of the row UNEVEN, for each row of the batch."""


class Budget:
    """A number of seconds of wall clock, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = time.time() + seconds  # a clock that processes share

    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()

    def share(self, part: float) -> Budget:
        """A part of what is left."""
        return Budget(self.left() * part)

    def over(self, rounds: int) -> bool:
        """Whether a run ends that has had this many rounds."""
        return self.left() <= 0


class Skipped(Exception):
    """Why there is no figure."""


PairName = Literal["pair", "gap", "huge"]


@dataclass(frozen=True)
class Task:
    """One cell to be measured."""

    pair: PairName
    size: Size
    row: str
    weight: float = 1.0
    """Of the time that is left, relative to the others."""

    def __str__(self) -> str:
        return f"{self.size}, {self.row}"


@dataclass(frozen=True)
class Cell:
    """One row at one size."""

    task: Task
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
    roofline: float = 0.0
    """Most tokens per second by the bandwidth of memory; 0 for rows with drafts."""
    byte_ratio: float = 0.0
    """Bytes that a step of the student reads, over those of the teacher."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further figures of a batch that memory does not hold."""
    engine: dict[str, str] = field(default_factory=dict)
    """How the engine ran."""
    recording_off: str = ""
    """Why CUDA graphs were given up."""

    @property
    def rate(self) -> float:
        """Tokens per second, with prompts where texts are complete or prompts are the point."""
        whole = self.complete or self.task.row == UNEVEN
        return self.tokens / self.seconds if whole and self.tokens else self.decoding

    @property
    def figure(self) -> str:
        """The cell of the table."""
        return "-" if self.skipped else f"{self.rate:.0f}{'' if self.complete else '*'}"

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.task}: {self.skipped}"
        part = "" if self.complete else ", as the time was up"
        bound = f", {self.rate / self.roofline:.0%} of the roofline" if self.roofline else ""
        rate = f"{self.rate:.0f} tokens per second"
        ahead = f"; {self.engine['ahead']}" if "ahead" in self.engine else ""
        return f"{self.task}: {rate}{bound} ({self.tokens} tokens{part}){ahead}"


class Pairs:
    """The pairs of models by name, of which one is in memory at a time."""

    def __init__(self, options: GpuOptions, bandwidth: float | None = None) -> None:
        half = max(1, parse_size(options.huge).tokens // 2)
        huge = options.huge_shape
        self.by_name: dict[PairName, RandomPair] = {
            "pair": _pair(options, options.teacher_shape, options.student_shape),
            "gap": _pair(options, options.gap_teacher_shape, options.gap_student_shape),
            "huge": RandomPair(options.models, huge, huge, same_weights=True, prompt_tokens=half),
        }
        for pair in self.by_name.values():
            pair.attention = options.attention
            if bandwidth is not None:
                pair.bandwidth = bandwidth
        self._open: PairName | None = None

    def open(self, name: PairName) -> RandomPair:
        """The pair, loaded, after what happens once per process; the one before is closed."""
        pair = self.by_name[name]
        if self._open != name:
            if self._open is not None:
                self.by_name[self._open].close()
            self._open = name
            pair.loaded()
            for row in (LOCKSTEP, FAST):
                with contextlib.suppress(Skipped):  # reported by the row's own cells
                    if name != "huge":
                        _record(pair, WARM_UP, row, Budget(20))
        return pair


def _pair(options: GpuOptions, teacher: str, student: str) -> RandomPair:
    return RandomPair(options.models, teacher, student, prompt_tokens=options.prompt_tokens)


def tasks_of(options: GpuOptions) -> list[Task]:
    """All cells, in the order in which they are measured."""
    sizes = [parse_size(text) for text in options.sizes]
    tasks = [Task("pair", size, row) for size in sizes for row in VARIANTS if row != UNEVEN]
    tasks += [Task("pair", size, UNEVEN) for size in sizes[:1]]
    gap_sizes = [parse_size(text) for text in options.gap_sizes]
    tasks += [Task("gap", size, row) for size in gap_sizes for row in GAP_ROWS]
    if options.huge_share:
        rest = len(tasks) or 1
        weight = rest * options.huge_share / (1 - options.huge_share) if tasks else 1.0
        tasks.append(Task("huge", parse_size(options.huge), HUGE, weight))
    return tasks


def measure_tasks(tasks: Sequence[Task], pairs: Pairs, budget: Budget) -> Iterator[Cell]:
    """Their cells within the budget. Raises Broken after an error that the GPU keeps."""
    for i, task in enumerate(tasks):
        share = task.weight / sum(each.weight for each in tasks[i:])
        if budget.left() <= 0:
            yield Cell(task, skipped="no time left")
            continue
        measured = measure_huge if task.row == HUGE else measure_cell
        try:
            yield measured(pairs.open(task.pair), task, budget.share(share))
        except RuntimeError as error:
            yield Cell(task, skipped=f"failed: {str(error).splitlines()[0]}")
            if _lasting(error):
                raise Broken from error


def lost_cell(task: Task, how: str) -> Cell:
    """The cell at which a process died."""
    return Cell(task, skipped=f"failed: {how}")


def measure_cell(pair: RandomPair, task: Task, budget: Budget) -> Cell:
    """The same run again and again within the budget; the last one counts."""
    models = pair.twin() if task.row == SELF else pair
    try:
        _warm_up(models, task, budget.share(0.5))
        done = _record(models, task.size, task.row, budget)
    except Skipped as error:
        return Cell(task, skipped=str(error))
    whole = done.whole
    complete = len(done.lengths) == len(_workload(pair, task.size, task.row).requests)
    if not complete and done.rounds < FEWEST_ROUNDS:
        reason = f"no more than {done.rounds} rounds within its {budget.seconds:.1f} s"
        return Cell(task, skipped=reason)
    cell = Cell(task, whole.tokens, whole.wall, done.decoding.rate(), complete)
    cached = pair.prompt_tokens + task.size.tokens / 2
    return replace(
        cell,
        roofline=_roofline(models, task, cached),
        byte_ratio=_byte_ratio(pair, task.size.batch, cached),
        **_engine_facts(pair),
    )


def _warm_up(pair: RandomPair, task: Task, budget: Budget) -> None:
    """Run until a run records no shape, which on a CPU is the first.

    Lengths of drafts follow from times, so a second run may meet other shapes than the first.
    """
    while True:
        known = pair.loaded().pair.recorded_graphs
        _record(pair, task.size, task.row, budget)
        if pair.loaded().pair.recorded_graphs == known or budget.left() <= 0:
            return


def measure_huge(pair: RandomPair, task: Task, budget: Budget) -> Cell:
    """Plain decoding of the batch until the budget is spent."""
    size, cuda = task.size, torch.cuda
    if pair.device.type == "cuda":
        cuda.reset_peak_memory_stats(pair.device)
    try:
        done = _record(pair, size, LOCKSTEP, budget)
    except Skipped as reason:
        return Cell(task, skipped=str(reason))
    rate = done.decoding.rate()
    left = size.batch * size.tokens - done.whole.tokens
    facts = {
        "prompt_tokens": pair.prompt_tokens,
        "predicted_gib": predicted_bytes(pair, pair.workload(size.batch, size.tokens)) / 2**30,
        "kv_gib": done.kv_bytes / 2**30,
        "most_rows": done.most_rows,
        "mean_rows": done.decoding_rows / max(1, done.decoding_rounds),
        "rounds": done.rounds,
        "preemptions": done.loop.scheduler.preemptions,
        "finished": len(done.lengths),
        "decoding": rate,
        "projected_seconds": done.whole.wall + left / rate if rate else None,
    }
    if pair.device.type == "cuda":
        facts["peak_gib"] = cuda.max_memory_allocated(pair.device) / 2**30
    complete = len(done.lengths) == size.batch
    whole = done.whole
    cell = Cell(task, whole.tokens, whole.wall, rate, complete, facts=facts)
    return replace(cell, **_engine_facts(pair))


def _engine_facts(pair: RandomPair) -> dict[str, Any]:
    engine = pair.loaded()
    recordings = engine.pair.recorded_graphs
    off = recordings.off if recordings is not None else ""
    return {"engine": engine.notes(), "recording_off": off}


def _record(pair: RandomPair, size: Size, row: str, budget: Budget) -> Recorder:
    """Draw the texts of a row within the budget. Raises Skipped where that is impossible."""
    if budget.left() <= 0:
        raise Skipped("no time left")
    workload = _workload(pair, size, row)
    try:
        engine = pair.engine(workload, size.batch, VARIANTS[row])
        engine.stop = budget.over
        return engine.record(workload.requests)
    except (EngineError, RuntimeError) as error:  # other cells can still be measured
        if _lasting(error):
            raise
        raise Skipped(f"failed: {str(error).splitlines()[0]}") from error


def _lasting(error: Exception) -> bool:
    """Whether every later call to the GPU fails with it: after an illegal access, for instance."""
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    return isinstance(error, kind) and "CUDA error" in str(error)


def _workload(pair: RandomPair, size: Size, row: str) -> Workload:
    """Texts of equal length; for UNEVEN of an eighth of it to all of it, admitted as others end."""
    if row != UNEVEN:
        return pair.workload(size.batch, size.tokens)
    made = pair.workload(UNEVEN_TEXTS * size.batch, size.tokens)
    generator = torch.Generator().manual_seed(0)
    shortest = max(1, size.tokens // 8)
    count = len(made.requests)
    lengths = torch.randint(shortest, size.tokens + 1, (count,), generator=generator).tolist()
    requests = [
        replace(request, max_new_tokens=length)
        for request, length in zip(made.requests, lengths, strict=True)
    ]
    return Workload(tuple(requests), made.natural_end)


def _roofline(pair: RandomPair, task: Task, cached: float) -> float:
    """Of lockstep, or of the one model that the row runs."""
    variant, batch = VARIANTS[task.row], task.size.batch
    if variant.mode != "mixture":
        return batch * pair.bandwidth / _step_bytes(pair, batch, cached)[variant.mode]
    return pair.roofline(batch, cached) if variant.draft_tokens == 0 else 0.0


def _byte_ratio(pair: RandomPair, batch: int, cached: float) -> float:
    """Bytes of a step of the student over one of the teacher."""
    read = _step_bytes(pair, batch, cached)
    return read["student"] / read["teacher"]


def _step_bytes(pair: RandomPair, batch: int, cached: float) -> dict[str, float]:
    """Weights and caches that a step reads, by role."""
    runners = pair.loaded().pair.runners
    return {
        role: weight_bytes(runner.model) + batch * cached * runner.bytes_per_token
        for role, runner in runners.items()
    }


def speculation_bound(byte_ratio: float, acceptance: float, most: int = MOST_WIDTH) -> float:
    """Most tokens of q* with drafts per token of the teacher alone, where bytes are the time.

    A round of width n reads the student n times and the teacher once, and emits
    (1 - acceptance^n) / (1 - acceptance) tokens.
    """
    emitted = 0.0
    best = 0.0
    for width in range(1, most + 1):
        emitted += acceptance ** (width - 1)
        best = max(best, emitted / (byte_ratio * width + 1))
    return best
