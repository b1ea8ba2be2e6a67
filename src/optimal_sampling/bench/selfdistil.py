"""One model as its own teacher: two contexts in one forward pass, beside that model alone.

With equal prompts q* is the model itself, and what is measured is what the second context costs. With the solution in
the teacher's prompt, drafts are looked up there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.table import Table

from optimal_sampling.bench.measure import Contender, Spent, interleave
from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell, add_rates, rates_table
from optimal_sampling.bench.watch import Watch
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.config import PromptConfig

__all__ = ["SelfDistillation", "measure", "run"]

BATCH = 8
ALONE, PLAIN_ALONE = "the model alone", "the model alone, shapes not padded"
LOCKSTEP, LOOKUP = "q* lockstep", "q* prompt lookup, auto"
PRIVILEGED = PromptConfig(teacher_template="{problem}\nHint: {solution}")
"""As the shipped teacher has learnt to read a solution."""
EQUAL_ROWS: dict[str, dict[str, Any]] = {
    ALONE: {"mode": "teacher"},
    PLAIN_ALONE: {"mode": "teacher", "batch_invariant": False},
    LOCKSTEP: {"draft_tokens": 0},
}
PRIVILEGED_ROWS: dict[str, dict[str, Any]] = {
    **EQUAL_ROWS,
    **{f"q* prompt lookup, {k}": {"draft_tokens": k} for k in (2, 4, 8, 16)},
    LOOKUP: {"draft_tokens": "auto"},
}


@dataclass(frozen=True)
class SelfDistillation:
    """What one table says."""

    title: str
    per_wall_second: dict[str, float]
    per_cpu_second: dict[str, float]
    ratios_wall: dict[str, float]
    ratios_cpu: dict[str, float]
    drafts: dict[str, dict[str, float]]
    """By row: share of drafted tokens that was accepted, and tokens per row and round."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def table(self) -> Table:
        """For people."""
        table = rates_table(self.title, self.per_wall_second, self.per_cpu_second)
        add_rates(table, self.ratios_wall, self.ratios_cpu, ".2f")
        for name, facts in self.drafts.items():
            table.add_row(f"{name}: drafts accepted", f"{facts['accepted']:.0%}", "")
            table.add_row(
                f"{name}: tokens per row and round", f"{facts['tokens_per_round']:.2f}", ""
            )
        return table


def measure(
    bench: Bench, workload: Workload, title: str, rows: Mapping[str, dict[str, Any]], options: BenchOptions,
    tell: Tell,
) -> SelfDistillation:  # fmt: skip
    """Time the rows in turn: rounds that read no prompt, and only the tokens that those drew."""
    drafts: dict[str, dict[str, float]] = {}
    names = [name for name in rows if name != PLAIN_ALONE or bench.padded]
    works = [
        Contender(name, partial(_decode, bench, workload, name, rows[name], drafts))
        for name in names
    ]
    timings = interleave(works, options.repeats, tell)
    wall = {name: timing.per_wall_second for name, timing in timings.items()}
    cpu = {name: timing.per_cpu_second for name, timing in timings.items()}
    return SelfDistillation(title, wall, cpu, _ratios(wall), _ratios(cpu), drafts)


def _decode(
    bench: Bench,
    workload: Workload,
    name: str,
    how: dict[str, Any],
    drafts: dict[str, dict[str, float]],
) -> Spent:
    watch = Watch()
    engine = bench.engine(workload, BATCH, watch=watch, **how)
    for _ in engine.generate(workload.requests):
        pass
    run = engine.draft_counts
    if run.drafted:
        per_round = watch.decoding.tokens / watch.decoding_rows
        drafts[name] = {"accepted": run.accepted / run.drafted, "tokens_per_round": per_round}
    return watch.decoding


def _ratios(speed: Mapping[str, float]) -> dict[str, float]:
    """To the model alone, as fast as it runs."""
    alone = max(speed[name] for name in (ALONE, PLAIN_ALONE) if name in speed)
    return {
        f"{name} / fastest alone": value / alone
        for name, value in speed.items()
        if name.startswith("q*")
    }


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench selfdistil`. Random weights do not repeat a solution, so shapes have the first table only."""
    bench = make_bench(options).twin()
    count = max(BATCH, options.prompts() // 8)
    what = f"batch {BATCH}, {count} prompts, rounds that read no prompt"
    cases = [(bench.workload(count), f"same weights, equal prompts: {what}", EQUAL_ROWS)]
    if bench.natural:
        privileged = bench.workload(count, prompt=PRIVILEGED)
        title = f"same weights, the teacher is shown the solution: {what}"
        cases.append((privileged, title, PRIVILEGED_ROWS))
    results = []
    for workload, title, rows in cases:
        result = measure(bench, workload, title, rows, options, tell)
        show(result.table())
        results.append(result.as_json())
    return Report(bench.names, results)
