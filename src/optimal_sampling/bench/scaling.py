"""Time and memory against the number of prompts, and a batch far larger than memory holds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from rich.table import Table

from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.watch import Watch
from optimal_sampling.bench.workload import Bench

__all__ = ["Growth", "measure_growth", "run", "scaling_table"]

HUGE_BATCH = 4096


@dataclass(frozen=True)
class Growth:
    """One run: so many prompts at this batch size."""

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
    """Resident memory at the end, against the start."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_growth(bench: Bench, prompts: int, tell: Tell) -> list[Growth]:
    """1, 2, 4 and 8 times `prompts` at batch 32, then the most prompts in one batch of HUGE_BATCH."""
    found = [_run(bench, prompts, 32, tell)]  # a first run pays for warming up
    found = [_run(bench, prompts * factor, 32, tell) for factor in (1, 2, 4, 8)]
    found.append(_run(bench, prompts * 8, HUGE_BATCH, tell))
    return found


def _run(bench: Bench, prompts: int, batch_size: int, tell: Tell) -> Growth:
    tell(f"{prompts} prompts at batch {batch_size}")
    workload, watch = bench.workload(prompts), Watch()
    engine = bench.engine(workload, batch_size, watch=watch)
    process = psutil.Process()
    before, wall, cpu = process.memory_info().rss, time.perf_counter(), time.process_time()
    tokens = sum(len(completion.token_ids) for completion in engine.generate(workload.requests))
    return Growth(
        prompts=prompts,
        batch_size=batch_size,
        tokens=tokens,
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.perf_counter() - wall,
        most_rows=watch.most_rows,
        kv_mib=watch.kv_bytes / 2**20,
        grown_mib=(process.memory_info().rss - before) / 2**20,
    )


def scaling_table(growth: list[Growth]) -> Table:
    """For people."""
    table = Table(title="Growth with the number of prompts", title_justify="left")
    names = (
        "prompts",
        "batch",
        "in flight",
        "tokens",
        "CPU s",
        "CPU ms / token",
        "KV caches MiB",
        "memory grown MiB",
    )
    for name in names:
        table.add_column(name, justify="right")
    for g in growth:
        milliseconds = 1e3 * g.cpu_seconds / g.tokens
        table.add_row(
            *map(str, (g.prompts, g.batch_size, g.most_rows, g.tokens)),
            *(f"{x:.2f}" for x in (g.cpu_seconds, milliseconds, g.kv_mib)),
            f"{g.grown_mib:.0f}",
        )
    return table


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench scaling`."""
    bench = make_bench(options)
    growth = measure_growth(bench, max(1, options.prompts() // 4), tell)
    show(scaling_table(growth))
    return Report(bench.names, [g.as_json() for g in growth])
