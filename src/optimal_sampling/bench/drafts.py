"""Tokens per second of q* by the number of drafted tokens, beside the teacher alone.

The teacher alone is as fast as our engine runs it: its shapes are not padded, where padding makes a difference.
"""

from __future__ import annotations

from optimal_sampling.bench.contenders import ASSISTED, AUTO, LOCKSTEP, PLAIN_TEACHER, TEACHER
from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell
from optimal_sampling.bench.speed import FIXED, Setting, tables
from optimal_sampling.bench.workload import Bench

__all__ = ["draft_settings", "run"]


def draft_settings(bench: Bench, prompts: int) -> list[Setting]:
    """Batch 1 to 128, on fewer prompts where it is slow."""
    rows = (PLAIN_TEACHER if bench.padded else TEACHER, LOCKSTEP, *FIXED, AUTO, ASSISTED)
    counts = ((1, max(8, prompts // 16)), (8, max(32, prompts // 4)), (32, max(64, prompts // 2)))
    return [
        Setting(batch, count, bench.natural, rows)
        for batch, count in (*counts, (128, max(256, prompts)))
    ]


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench drafts`."""
    bench = make_bench(options)
    return tables(bench, draft_settings(bench, options.prompts()), options, show, tell)
