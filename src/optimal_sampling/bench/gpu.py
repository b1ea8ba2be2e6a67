"""The table of large shapes in one call that keeps to a budget of time: what does not fit is skipped, and said.

Every cell is one run, cut off when its share of the time is over; a share that is not used goes to the cells after it.
Sizes with a target come first. Texts are of equal length, prompts of random ids.
"""

from __future__ import annotations

from dataclasses import asdict

from optimal_sampling.bench.gpu_cells import Clock, measure_cells, measure_slice
from optimal_sampling.bench.gpu_tables import bounds, gpu_table, slice_table, target_table, targets
from optimal_sampling.bench.options import BenchOptions, Size, parse_size
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.speed import IDEAL
from optimal_sampling.engines.device import resolve_device
from optimal_sampling.errors import ConfigError

__all__ = ["run"]

SIZES = (Size(32, 512), Size(8, 256), Size(16, 512), Size(16, 1024), Size(8, 2048))
TEACHER_SHAPE, STUDENT_SHAPE = "Qwen2.5-3B", "Qwen2.5-1.5B"
HUGE_SHARE, MARGIN = 0.2, 0.03
"""Of the budget: kept for the size that memory does not hold, and for the last round and the tables."""


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench gpu`. Raises ConfigError where large shapes are asked of a CPU."""
    clock = Clock(options.budget * (1 - MARGIN))
    bench, large = _pairs(options)
    sizes, huge = options.sizes_or(SIZES), parse_size(options.huge)
    cells = measure_cells(
        bench, sizes, Clock(clock.left() - HUGE_SHARE * options.budget), show, tell
    )
    limits = bounds(bench, sizes, cells)
    reached = targets(cells, limits[IDEAL])
    show(gpu_table(sizes, cells, limits))
    show(target_table(reached))
    notes = bench.engine(bench.workload(1), 1).notes()
    show(", ".join(f"{name} {value}" for name, value in notes.items()))
    bench.close()
    tell(f"{huge} tokens of {options.huge_shape}, {clock.left():.0f} s left")
    part = measure_slice(large, huge, options.huge_shape, clock)
    show(
        f"skipped: {part.size} of {part.shape}: {part.skipped}"
        if part.skipped
        else slice_table(part)
    )
    result = {
        "engine": notes,
        "bandwidth": bench.bandwidth,
        "cells": [{**asdict(cell), "tokens_per_second": cell.rate} for cell in cells],
        "bounds": {
            name: {str(size): value for size, value in values.items()}
            for name, values in limits.items()
        },
        "targets": [{**asdict(target), "met": target.met} for target in reached],
        "admission": asdict(part),
    }
    return Report({**bench.names, "huge": large.names}, [result])


def _pairs(options: BenchOptions) -> tuple[ShapeBench, ShapeBench]:
    """The pair of the table, and the one of the size that memory does not hold. Nothing is loaded yet."""
    teacher, student = options.shapes or (TEACHER_SHAPE, STUDENT_SHAPE)
    huge = options.huge_shape
    if resolve_device(options.models.device).type == "cpu" and {teacher, student, huge} != {"tiny"}:
        raise ConfigError(
            "bench gpu is for large shapes, and there is no GPU here; on a CPU try it with --teacher-shape tiny "
            "--student-shape tiny --huge-shape tiny"
        )
    half = max(1, parse_size(options.huge).tokens // 2)
    bench = ShapeBench(
        options.models, teacher, student, acceptance=None, prompt_tokens=options.prompt_tokens
    )
    large = ShapeBench(
        options.models, huge, huge, same_weights=True, acceptance=None, prompt_tokens=half
    )
    return bench, large
