"""A table of large shapes in one call that keeps to a budget of time; what does not fit is skipped.

Cells are measured in a process of their own, shown as they are done, and kept whatever happens to
those after them. Texts are of equal length, prompts of random ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

from optimal_sampling.bench.cells import (
    FAST,
    RATE,
    Budget,
    Cell,
    Pairs,
    Task,
    lost_cell,
    measure_tasks,
    speculation_bound,
    tasks_of,
)
from optimal_sampling.bench.harness import Report, Row, make_table, quotients
from optimal_sampling.bench.own_process import in_own_process
from optimal_sampling.bench.speed import IDEAL, LOCKSTEP, ROOFLINE, STUDENT, TEACHER
from optimal_sampling.bench.subcommands import GpuOptions
from optimal_sampling.bench.workload import COPIED_MEBIBYTES, memory_bandwidth
from optimal_sampling.engines.device import resolve_device
from optimal_sampling.errors import ConfigError

__all__ = ["collect", "measure", "run"]

SPECULATIVE, BOUND, REACHED, PASSES, OF_PASSES = (
    "q* speculative at 0.9 / teacher alone",
    "its bound, max over n of tokens(n) / (r n + 1)",
    "reached of the bound (target 0.85)",
    "the same with r = teacher alone / student alone",
    "reached of that",
)
"""PASSES is what both models' passes one after the other would give, as fast as measured."""
RATIOS = (
    ("q* lockstep / ideal lockstep", LOCKSTEP, (IDEAL,)),
    (SPECULATIVE, FAST, (TEACHER,)),
    ("q* lockstep / roofline", LOCKSTEP, (ROOFLINE,)),
)
MARGIN = 0.03
"""Share of the budget for the last round and the tables."""


def run(options: GpuOptions, report: Report) -> None:
    """The subcommand `gpu`. Raises ConfigError where large shapes are asked of a CPU."""
    _check_shapes(options)
    budget = Budget(options.budget * (1 - MARGIN))
    tasks = tasks_of(options)
    work = partial(measure, options, budget=budget)
    report.status("the bandwidth of memory, then random weights")
    collect(options, in_own_process(work, tasks, lost_cell), report)


def _check_shapes(options: GpuOptions) -> None:
    shapes = {
        options.teacher_shape,
        options.student_shape,
        options.gap_teacher_shape if options.gap_sizes else "tiny",
        options.gap_student_shape if options.gap_sizes else "tiny",
        options.huge_shape if options.huge_share else "tiny",
    }
    if resolve_device(options.device).type == "cpu" and shapes != {"tiny"}:
        raise ConfigError(
            "bench gpu is for large shapes, and there is no GPU here; on a CPU try it with "
            "--teacher-shape tiny --student-shape tiny --huge-shape tiny --gap-sizes"
        )


def measure(
    options: GpuOptions, tasks: Sequence[Task], budget: Budget, pairs: Pairs | None = None
) -> Iterator[Cell]:
    """The cells of all tasks, in this process. The bandwidth of memory is measured first."""
    device = resolve_device(options.device)
    if pairs is None:
        pairs = Pairs(options, memory_bandwidth(device, COPIED_MEBIBYTES[device.type]))
    yield from measure_tasks(tasks, pairs, budget)


def collect(options: GpuOptions, cells: Iterable[Cell], report: Report) -> None:
    """Show cells as they come, keep them, and end with the tables."""
    pairs = Pairs(options).by_name
    report.models = {name: pair.names for name, pair in pairs.items()}
    kept: list[dict[str, Any]] = []
    result: dict[str, Any] = {"cells": kept}
    report.results.append(result)
    found: list[Cell] = []
    for cell in cells:
        if cell.engine and not any(each.engine for each in found):
            report.show("runs: " + _line(cell.engine))
        found.append(cell)
        kept.append({**asdict(cell), "tokens_per_second": cell.rate})
        report.show(str(cell))
        report.save()
    result |= _tables(found, report)
    _check_recording(found, report)


def _line(notes: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in notes.items())


def _check_recording(cells: Sequence[Cell], report: Report) -> None:
    """Fail the command where CUDA graphs were given up: its figures are not the engine's."""
    reasons = [cell.recording_off for cell in cells if cell.recording_off]
    if reasons:
        report.show(f"FAILED: recording was switched off: {reasons[0]}")
        report.failed = True


Figures: TypeAlias = dict[str, dict[str, Any]]
"""By row and size."""


def _tables(cells: Sequence[Cell], report: Report) -> dict[str, Any]:
    """A table per pair, and the figures of the batch that memory does not hold."""
    result: dict[str, Any] = {}
    for name, title in (("pair", "Large shapes"), ("gap", "A large and a small model")):
        own = [cell for cell in cells if cell.task.pair == name]
        if own:
            result[name] = _table(title, own, report)
    for cell in cells:
        if cell.task.pair == "huge" and not cell.skipped:
            facts = {"tokens": cell.tokens, "seconds": cell.seconds, **cell.facts}
            rows = [(key.replace("_", " "), value) for key, value in facts.items()]
            report.show(
                make_table(f"{cell.task.size} tokens, lockstep", ("by admission", ""), rows)
            )
    notes = [cell.engine for cell in cells if cell.engine and cell.task.pair != "huge"]
    result["engine"] = notes[-1] if notes else {}
    report.show(_line(result["engine"]))
    return result


def _table(title: str, cells: Sequence[Cell], report: Report) -> dict[str, Any]:
    """A row per system, bound and ratio, a column per size."""
    sizes = list(dict.fromkeys(cell.task.size for cell in cells))
    measured: Figures = defaultdict(dict)
    limits: Figures = defaultdict(dict)
    ratios: Figures = defaultdict(dict)
    for cell in cells:
        measured[cell.task.row][str(cell.task.size)] = cell.figure
    for size in sizes:
        own = [cell for cell in cells if cell.task.size == size and cell.tokens]
        bounds = _bounds(own)
        for name, rate in bounds.items():
            limits[name][str(size)] = round(rate)
        for name, ratio in _ratios(own, bounds).items():
            ratios[name][str(size)] = ratio
    columns = ("tokens per second, batch x tokens", *map(str, sizes))
    sections = [_section(figures, columns[1:]) for figures in (measured, limits, ratios)]
    table = make_table(f"{title}, random weights", columns, *sections)
    table.caption = "* part of the texts, as the time was up, without their prompts; - skipped"
    report.show(table)
    return {"bounds": limits, "ratios": ratios}


def _bounds(cells: Sequence[Cell]) -> dict[str, float]:
    """Of lockstep at one size: by bandwidth, and by both models' forward passes."""
    rates = {cell.task.row: cell.rate for cell in cells}
    found: dict[str, float] = {}
    if LOCKSTEP in rates:
        found[ROOFLINE] = next(cell.roofline for cell in cells if cell.task.row == LOCKSTEP)
    if STUDENT in rates and TEACHER in rates:
        found[IDEAL] = 1 / (1 / rates[STUDENT] + 1 / rates[TEACHER])
    return found


def _ratios(cells: Sequence[Cell], bounds: dict[str, float]) -> dict[str, float]:
    """Of one size."""
    rates = {cell.task.row: cell.rate for cell in cells}
    found = quotients(rates | bounds, RATIOS)
    if SPECULATIVE in found:
        found[BOUND] = speculation_bound(cells[0].byte_ratio, RATE)
        found[REACHED] = found[SPECULATIVE] / found[BOUND]
        if rates.get(STUDENT):
            found[PASSES] = speculation_bound(rates[TEACHER] / rates[STUDENT], RATE)
            found[OF_PASSES] = found[SPECULATIVE] / found[PASSES]
    return found


def _section(figures: Figures, sizes: Sequence[str]) -> list[Row]:
    return [(name, *(row.get(size, "-") for size in sizes)) for name, row in figures.items()]
