"""KV caches: what they should need, what they took, and how a batch that does not fit still completes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from rich.table import Table

from optimal_sampling.bench.options import BenchOptions, Size
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.watch import Watch
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.engines.local.engine import LocalEngine

__all__ = ["Footprint", "measure_memory", "memory_table", "predicted_bytes", "run"]

SIZES = (Size(8, 64), Size(32, 64), Size(32, 160), Size(256, 160))
OVERSIZE = 8
"""The last row has this fraction of the memory that its batch took."""
MIB = 2**20


@dataclass(frozen=True)
class Footprint:
    """One run."""

    batch: int
    tokens: int
    """New tokens of every text."""
    budget_mib: float | None
    """For the caches; None: the engine's own choice."""
    predicted_mib: float
    """Of all caches, were the whole batch at its longest."""
    kv_mib: float
    """Largest size of the caches."""
    grown_mib: float
    """Peak of allocated GPU memory, or of resident memory on a CPU, over what it was before the run."""
    most_rows: int
    """Requests in flight at once."""
    preemptions: int
    finished: int
    """Texts of full length."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def predicted_bytes(engine: LocalEngine, workload: Workload) -> int:
    """Keys and values of all the texts at their longest, for every context."""
    per_token = {role: engine.pair.runners[role].bytes_per_token for role in engine.roles}
    return sum(
        per_token["student"] * (len(r.student_prompt_ids) + r.max_new_tokens)
        + per_token["teacher"] * (len(r.teacher_prompt_ids) + r.max_new_tokens)
        for r in workload.requests
    )


def measure_memory(bench: Bench, sizes: tuple[Size, ...], tell: Tell) -> list[Footprint]:
    """Every size once, and the last once more in an eighth of the memory that it took, or what two texts take."""
    found = [_run(bench, size, None, tell) for size in sizes]
    return [
        *found,
        _run(bench, sizes[-1], found[-1].kv_mib * max(1 / OVERSIZE, 2 / sizes[-1].batch), tell),
    ]


def _run(bench: Bench, size: Size, budget: float | None, tell: Tell) -> Footprint:
    """`budget`: MiB that the caches may take."""
    tell(f"batch {size}" + ("" if budget is None else f" in {budget:.0f} MiB"))
    workload, watch = bench.workload(size.batch, size.tokens), Watch()
    engine = bench.engine(
        workload, size.batch, watch=watch, kv_memory_gib=None if budget is None else budget / 1024
    )
    before = _allocated(engine.device)
    done = list(engine.generate(workload.requests))
    peak = (
        watch.resident
        if engine.device.type == "cpu"
        else torch.cuda.max_memory_allocated(engine.device)
    )
    assert engine.loop is not None
    return Footprint(
        batch=size.batch,
        tokens=size.tokens,
        budget_mib=budget,
        predicted_mib=predicted_bytes(engine, workload) / MIB,
        kv_mib=watch.kv_bytes / MIB,
        grown_mib=(peak - before) / MIB,
        most_rows=watch.most_rows,
        preemptions=engine.loop.scheduler.preemptions,
        finished=sum(len(c.token_ids) == size.tokens for c in done),
    )


def _allocated(device: torch.device) -> int:
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def memory_table(footprints: list[Footprint], label: str) -> Table:
    """For people."""
    table = Table(
        title=f"Memory of a batch of texts of equal length{label}, MiB", title_justify="left"
    )
    names = ("batch x tokens", "budget", "KV should", "KV took", "grown", "in flight", "preempted")
    for name in (*names, "finished"):
        table.add_column(name, justify="right")
    for f in footprints:
        sizes = (f.predicted_mib, f.kv_mib, f.grown_mib)
        table.add_row(
            str(Size(f.batch, f.tokens)),
            "" if f.budget_mib is None else f"{f.budget_mib:.1f}",
            *(f"{x:.1f}" for x in sizes),
            *map(str, (f.most_rows, f.preemptions, f.finished)),
        )
    return table


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench memory`. Fails where a text did not finish."""
    bench = make_bench(options)
    footprints = measure_memory(bench, options.sizes_or(SIZES), tell)
    show(memory_table(footprints, bench.label))
    failed = any(f.finished < f.batch for f in footprints)
    return Report(bench.names, [f.as_json() for f in footprints], failed)
