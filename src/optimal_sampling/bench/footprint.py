"""KV caches predicted and measured, admission, and growth with the number of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

import psutil
import torch
from rich.table import Table

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.harness import SILENT, Display, Report, make_table, timed
from optimal_sampling.bench.instruments import Recorder
from optimal_sampling.bench.subcommands import MemoryOptions, ScalingOptions, Size, parse_sizes
from optimal_sampling.bench.workload import ModelPair, Variant, Workload, count_tokens
from optimal_sampling.engines.local.engine import LocalEngine

__all__ = ["measure_memory", "predicted_bytes", "run_memory", "run_scaling"]

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
    """Every size once; the last again in an eighth of its memory, or in that of two texts."""
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
        preemptions=recorder.loop.scheduler.preemptions,
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
    rows = [(str(Size(f.batch, f.tokens)), *astuple(f)[2:]) for f in footprints]
    title = f"Memory of a batch of texts of equal length{label}, MiB"
    return make_table(title, (*columns, "preempted", "finished"), rows)


def run_memory(options: MemoryOptions, display: Display) -> Report:
    """The subcommand `memory`. Fails where a text did not finish."""
    pair = make_pair(options)
    footprints = measure_memory(pair, parse_sizes(options.sizes), display)
    display.show(memory_table(footprints, pair.label))
    failed = any(f.finished < f.batch for f in footprints)
    return Report(pair.names, [asdict(f) for f in footprints], failed)


def measure_growth(
    pair: ModelPair, prompts: int, display: Display = SILENT
) -> list[dict[str, float]]:
    """1, 2, 4 and 8 times `prompts` at batch 32, then 8 times at HUGE_BATCH."""
    sizes = [*((prompts * factor, 32) for factor in (1, 2, 4, 8)), (prompts * 8, HUGE_BATCH)]
    found = []
    for count, batch_size in (sizes[0], *sizes):  # the first run is the warm-up
        display.status(f"{count} prompts at batch {batch_size}")
        found.append(_growth(pair, count, batch_size))
    return found[1:]


def _growth(pair: ModelPair, prompts: int, batch_size: int) -> dict[str, float]:
    """One run: seconds, most requests in flight, and memory."""
    workload, recorder = pair.workload(prompts), Recorder()
    engine = pair.engine(workload, batch_size, recorder=recorder)
    before = _resident()
    spent = timed(lambda: count_tokens(engine, workload))
    return {
        "prompts": prompts,
        "batch_size": batch_size,
        "most_rows": recorder.most_rows,
        "tokens": spent.tokens,
        "cpu_seconds": spent.cpu,
        "wall_seconds": spent.wall,
        "kv_mib": recorder.kv_bytes / MIB,
        "grown_mib": (_resident() - before) / MIB,
    }


def run_scaling(options: ScalingOptions, display: Display) -> Report:
    """The subcommand `scaling`."""
    pair = make_pair(options)
    growth = measure_growth(pair, max(1, options.num_prompts // 4), display)
    columns = (
        "prompts",
        "batch",
        "in flight",
        "tokens",
        "CPU s",
        "wall s",
        "KV caches MiB",
        "memory grown MiB",
        "CPU ms / token",
    )
    rows = [(*g.values(), 1e3 * g["cpu_seconds"] / g["tokens"]) for g in growth]
    display.show(make_table("Growth with the number of prompts", columns, rows))
    return Report(pair.names, growth)
