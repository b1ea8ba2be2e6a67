"""KV caches predicted and measured, admission where a batch does not fit, and growth with the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
import torch
from rich.table import Table

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.harness import SILENT, Display, Report, make_table, timed
from optimal_sampling.bench.instruments import Recorder
from optimal_sampling.bench.subcommands import MemoryOptions, ScalingOptions, Size, parse_sizes
from optimal_sampling.bench.workload import ModelPair, Variant, Workload, count_tokens
from optimal_sampling.engines.local.engine import LocalEngine

__all__ = [
    "Footprint",
    "Growth",
    "measure_growth",
    "measure_memory",
    "predicted_bytes",
    "run_memory",
    "run_scaling",
]

OVERSIZE = 8
"""The last row of `memory` has this fraction of the memory that its batch took."""
HUGE_BATCH = 4096
MIB = 2**20


@dataclass(frozen=True)
class Footprint:
    """One run of `memory`."""

    batch: int
    tokens: int
    """New tokens of every text."""
    budget_mib: float | None
    """Of the caches; None: the engine's own choice."""
    predicted_mib: float
    """Of all caches, with the whole batch at its longest."""
    kv_mib: float
    """Largest size of the caches."""
    grown_mib: float
    """Peak of allocated GPU memory, or of resident memory on a CPU, over that before the run."""
    most_rows: int
    """Requests in flight at once."""
    preemptions: int
    finished: int
    """Texts of full length."""


def predicted_bytes(engine: LocalEngine, workload: Workload) -> int:
    """Keys and values of all the texts at their longest, for every context."""
    per_token = {role: engine.pair.runners[role].bytes_per_token for role in engine.roles}
    return sum(
        per_token["student"] * (len(r.student_prompt_ids) + r.max_new_tokens)
        + per_token["teacher"] * (len(r.teacher_prompt_ids) + r.max_new_tokens)
        for r in workload.requests
    )


def measure_memory(
    pair: ModelPair, sizes: Sequence[Size], display: Display = SILENT
) -> list[Footprint]:
    """Every size once; the last once more in an eighth of the memory it took, or in that of two texts."""
    found = []
    for size in sizes:
        display.status(f"batch {size}")
        found.append(_footprint(pair, size, None))
    budget = found[-1].kv_mib * max(1 / OVERSIZE, 2 / sizes[-1].batch)
    display.status(f"batch {sizes[-1]} in {budget:.0f} MiB")
    return [*found, _footprint(pair, sizes[-1], budget)]


def _footprint(pair: ModelPair, size: Size, budget_mib: float | None) -> Footprint:
    workload, recorder = pair.workload(size.batch, size.tokens), Recorder()
    variant = Variant(kv_memory_gib=None if budget_mib is None else budget_mib / 1024)
    engine = pair.engine(workload, size.batch, variant, recorder)
    before = _allocated(engine.device)
    done = list(engine.generate(workload.requests))
    on_cpu = engine.device.type == "cpu"
    peak = recorder.resident if on_cpu else torch.cuda.max_memory_allocated(engine.device)
    return Footprint(
        batch=size.batch,
        tokens=size.tokens,
        budget_mib=budget_mib,
        predicted_mib=predicted_bytes(engine, workload) / MIB,
        kv_mib=recorder.kv_bytes / MIB,
        grown_mib=(peak - before) / MIB,
        most_rows=recorder.most_rows,
        preemptions=recorder.preemptions,
        finished=sum(len(c.token_ids) == size.tokens for c in done),
    )


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _allocated(device: torch.device) -> int:
    if device.type == "cpu":
        return _resident()
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def memory_table(footprints: Sequence[Footprint], label: str) -> Table:
    """The table to be printed."""
    columns = ("batch x tokens", "budget", "KV should", "KV took", "grown", "in flight")
    rows = [
        (
            str(Size(f.batch, f.tokens)),
            "" if f.budget_mib is None else f"{f.budget_mib:.1f}",
            *(f"{x:.1f}" for x in (f.predicted_mib, f.kv_mib, f.grown_mib)),
            *map(str, (f.most_rows, f.preemptions, f.finished)),
        )
        for f in footprints
    ]
    title = f"Memory of a batch of texts of equal length{label}, MiB"
    return make_table(title, (*columns, "preempted", "finished"), rows)


def run_memory(options: MemoryOptions, display: Display) -> Report:
    """The subcommand `memory`. Fails where a text did not finish."""
    pair = make_pair(options)
    footprints = measure_memory(pair, parse_sizes(options.sizes), display)
    display.show(memory_table(footprints, pair.label))
    failed = any(f.finished < f.batch for f in footprints)
    return Report(pair.names, [asdict(f) for f in footprints], failed)


@dataclass(frozen=True)
class Growth:
    """One run of `scaling`."""

    prompts: int
    batch_size: int
    tokens: int
    cpu_seconds: float
    wall_seconds: float
    most_rows: int
    """Requests in flight at once."""
    kv_mib: float
    """Largest size of both KV caches."""
    grown_mib: float
    """Resident memory at the end, over that at the start."""


def measure_growth(pair: ModelPair, prompts: int, display: Display = SILENT) -> list[Growth]:
    """1, 2, 4 and 8 times `prompts` at batch 32, then the most prompts in one batch of HUGE_BATCH."""
    sizes = [*((prompts * factor, 32) for factor in (1, 2, 4, 8)), (prompts * 8, HUGE_BATCH)]
    found = []
    for count, batch_size in (sizes[0], *sizes):  # the first run is the warm-up
        display.status(f"{count} prompts at batch {batch_size}")
        found.append(_growth(pair, count, batch_size))
    return found[1:]


def _growth(pair: ModelPair, prompts: int, batch_size: int) -> Growth:
    workload, recorder = pair.workload(prompts), Recorder()
    engine = pair.engine(workload, batch_size, recorder=recorder)
    before = _resident()
    spent = timed(lambda: count_tokens(engine, workload))
    return Growth(
        prompts=prompts,
        batch_size=batch_size,
        tokens=spent.tokens,
        cpu_seconds=spent.cpu,
        wall_seconds=spent.wall,
        most_rows=recorder.most_rows,
        kv_mib=recorder.kv_bytes / MIB,
        grown_mib=(_resident() - before) / MIB,
    )


def growth_table(growth: Sequence[Growth]) -> Table:
    """The table to be printed."""
    columns = ("prompts", "batch", "in flight", "tokens", "CPU s", "CPU ms / token")
    rows = [
        (
            *map(str, (g.prompts, g.batch_size, g.most_rows, g.tokens)),
            f"{g.cpu_seconds:.2f}",
            f"{1e3 * g.cpu_seconds / g.tokens:.2f}",
            f"{g.kv_mib:.2f}",
            f"{g.grown_mib:.0f}",
        )
        for g in growth
    ]
    title = "Growth with the number of prompts"
    return make_table(title, (*columns, "KV caches MiB", "memory grown MiB"), rows)


def run_scaling(options: ScalingOptions, display: Display) -> Report:
    """The subcommand `scaling`."""
    pair = make_pair(options)
    growth = measure_growth(pair, max(1, options.num_prompts // 4), display)
    display.show(growth_table(growth))
    return Report(pair.names, [asdict(g) for g in growth])
