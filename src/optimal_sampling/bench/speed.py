"""Tokens per second of q*, of both models alone, and of what a user of Transformers would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from optimal_sampling.bench.contenders import (
    ASSISTED,
    AUTO,
    HF,
    HF_MIX,
    LOCKSTEP,
    PLAIN_TEACHER,
    STUDENT,
    TEACHER,
    contenders,
    drafts,
)
from optimal_sampling.bench.measure import interleave
from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.pairs import make_bench
from optimal_sampling.bench.report import Report, Show, Tell, add_rates, rates_table
from optimal_sampling.bench.roofline import lockstep_bound
from optimal_sampling.bench.workload import Bench, Workload, describe_lengths

__all__ = [
    "FIXED",
    "IDEAL",
    "ROOFLINE",
    "Result",
    "Setting",
    "ideal_lockstep",
    "measure_setting",
    "ratios",
    "run",
    "speed_settings",
    "speed_table",
    "tables",
]

IDEAL, ROOFLINE = "ideal lockstep", "roofline, lockstep"
BEST_TEACHER, BEST_FIXED = "fastest teacher alone", "best of lockstep and fixed lengths"
OURS = (STUDENT, TEACHER, PLAIN_TEACHER, LOCKSTEP, *map(drafts, (1, 2, 4, 8)), AUTO)
PEERS = (HF, HF_MIX, ASSISTED)

FIXED = tuple(map(drafts, (1, 2, 4, 8, 16)))

RATIOS = (
    ("q* lockstep / ideal lockstep", LOCKSTEP, IDEAL),
    ("q* lockstep / teacher alone", LOCKSTEP, TEACHER),
    ("q* speculative / teacher alone", AUTO, BEST_TEACHER),
    ("q* speculative / best of lockstep and fixed lengths", AUTO, BEST_FIXED),
    ("teacher alone / Transformers generate", TEACHER, HF),
    ("q* lockstep / Transformers + logits processor", LOCKSTEP, HF_MIX),
    ("q* speculative / Transformers + logits processor", AUTO, HF_MIX),
    ("q* speculative / Transformers assisted generation", AUTO, ASSISTED),
)
"""What the targets are stated in: a name, what is divided, by what."""


@dataclass(frozen=True)
class Setting:
    """One table: a batch size, a number of prompts, how texts end, and the rows."""

    batch_size: int
    prompts: int
    natural_end: bool
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What one table says."""

    setting: Setting
    title: str
    per_wall_second: dict[str, float]
    per_cpu_second: dict[str, float]
    bounds: dict[str, float]
    """Tokens per second of wall clock that could be had at most."""
    bandwidth: float
    """Measured, bytes per second."""
    ratios_wall: dict[str, float]
    ratios_cpu: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def speed_settings(prompts: int, natural: bool = True) -> list[Setting]:
    """Batch 1 on fewer prompts, batch 32 with natural and with equal lengths."""
    found = [
        Setting(1, max(8, prompts // 16), natural, OURS + PEERS),
        Setting(32, max(32, prompts // 4), False, OURS + PEERS),
    ]
    if natural:
        found.insert(1, Setting(32, prompts, True, OURS + PEERS))
    return found


def measure_setting(bench: Bench, setting: Setting, repeats: int, tell: Tell) -> Result:
    """Time all contenders of a setting in turn."""
    workload = bench.workload(setting.prompts, None if setting.natural_end else bench.equal_tokens)
    rows = contenders(setting.rows, bench, workload, setting.batch_size)
    timings = interleave(rows, repeats, tell)
    title, cached = _lengths(bench, workload, setting)
    tell("memory bandwidth")
    batch = min(setting.batch_size, setting.prompts)
    wall = {name: timing.per_wall_second for name, timing in timings.items()}
    cpu = {name: timing.per_cpu_second for name, timing in timings.items()}
    bounds = {ROOFLINE: lockstep_bound(bench.engine(workload, 1), batch, cached, bench.bandwidth)}
    if STUDENT in wall and TEACHER in wall:
        bounds[IDEAL] = ideal_lockstep(wall)
    return Result(setting, title, wall, cpu, bounds, bench.bandwidth, ratios(wall), ratios(cpu))


def _lengths(bench: Bench, workload: Workload, setting: Setting) -> tuple[str, float]:
    """The table's title, and how many tokens a cache holds on average while a text is drawn."""
    done = list(bench.engine(workload, 32).generate(workload.requests))
    ends = (
        "natural end of text"
        if setting.natural_end
        else f"{workload.requests[0].max_new_tokens} tokens each"
    )
    what = f"batch {setting.batch_size}, {setting.prompts} prompts, {ends}{bench.label}"
    drawn = sum(len(c.token_ids) for c in done)
    seen = sum(
        len(c.token_ids) * (len(c.request.teacher_prompt_ids) + len(c.token_ids) / 2) for c in done
    )
    return f"{what}\n{describe_lengths(workload.requests, done)}", seen / drawn


def ideal_lockstep(speed: Mapping[str, float]) -> float:
    """Tokens per second of both models' forward passes and nothing else."""
    return 1 / (1 / speed[STUDENT] + 1 / speed[TEACHER])


def ratios(speed: Mapping[str, float]) -> dict[str, float]:
    """Those of RATIOS whose rows were measured."""
    known = dict(speed)
    if STUDENT in speed and TEACHER in speed:
        known[IDEAL] = ideal_lockstep(speed)
    teachers = [speed[name] for name in (TEACHER, PLAIN_TEACHER) if name in speed]
    fixed = [value for name, value in speed.items() if name == LOCKSTEP or name in FIXED]
    known.update(
        {
            name: max(values)
            for name, values in ((BEST_TEACHER, teachers), (BEST_FIXED, fixed))
            if values
        }
    )
    return {
        name: known[over] / known[under]
        for name, over, under in RATIOS
        if over in known and under in known
    }


def speed_table(result: Result) -> Table:
    """For people."""
    at = f" at {result.bandwidth / 1e9:.1f} GB/s"
    bounds = {
        f"{name}{at}" if name == ROOFLINE else name: bound for name, bound in result.bounds.items()
    }
    table = rates_table(result.title, result.per_wall_second, result.per_cpu_second)
    add_rates(table, bounds, {}, ".0f")
    add_rates(table, result.ratios_wall, result.ratios_cpu, ".2f")
    return table


def run(options: BenchOptions, show: Show, tell: Tell) -> Report:
    """The command `bench speed`."""
    bench = make_bench(options)
    return tables(bench, speed_settings(options.prompts(), bench.natural), options, show, tell)


def tables(
    bench: Bench,
    settings: Sequence[Setting],
    options: BenchOptions,
    show: Show,
    tell: Tell,
) -> Report:
    """One table per setting, shown as soon as it is measured."""
    results = []
    for setting in settings:
        result = measure_setting(bench, setting, options.repeats, tell)
        show(speed_table(result))
        results.append(result.as_json())
    return Report(bench.names, results)
