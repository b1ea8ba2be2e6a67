"""Tokens per second of q*, of both models alone, and of what a user of Transformers would write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from optimal_sampling.bench.measure import Contender, Timing, interleave
from optimal_sampling.bench.peers import transformers_generate
from optimal_sampling.bench.workload import Bench, Workload, describe_lengths, make_workload
from optimal_sampling.engines.local.engine import LocalEngine

__all__ = ["Result", "Setting", "measure_setting", "settings", "speed_table"]

STUDENT, TEACHER, LOCKSTEP = "student alone", "teacher alone", "q* lockstep"
SPECULATIVE = "q* speculative (the default)"
PLAIN_TEACHER = "teacher alone, shapes not padded"
HF, HF_MIX = "Transformers generate, teacher", "Transformers generate + logits processor, q*"
EQUAL_TOKENS = 48


@dataclass(frozen=True)
class Setting:
    """One table: a batch size, a number of prompts, and how texts end."""

    batch_size: int
    prompts: int
    natural_end: bool = True
    peers: bool = True


@dataclass(frozen=True)
class Result:
    """What one table says."""

    setting: Setting
    lengths: str
    per_wall_second: dict[str, float]
    per_cpu_second: dict[str, float]
    ratios_wall: dict[str, float]
    ratios_cpu: dict[str, float]

    @classmethod
    def of(
        cls,
        bench: Bench,
        workload: Workload,
        setting: Setting,
        timings: Mapping[str, Timing],
        ratios: Callable[[Mapping[str, float]], dict[str, float]],
    ) -> Result:
        """Medians of the timings, and what they are to each other."""
        done = list(bench.engine(workload, 32).generate(workload.requests))
        wall = {name: timing.per_wall_second for name, timing in timings.items()}
        cpu = {name: timing.per_cpu_second for name, timing in timings.items()}
        return cls(setting, describe_lengths(workload.requests, done), wall, cpu, ratios(wall), ratios(cpu))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def settings(prompts: int) -> list[Setting]:
    """Batch 1 on fewer prompts, batch 32 with natural and with equal lengths."""
    return [
        Setting(1, max(8, prompts // 16), peers=False),
        Setting(32, prompts),
        Setting(32, max(32, prompts // 4), natural_end=False),
    ]


def measure_setting(bench: Bench, setting: Setting, repeats: int, tell: Callable[[str], None]) -> Result:
    """Time all contenders of a setting in turn."""
    workload = make_workload(bench, setting.prompts, None if setting.natural_end else EQUAL_TOKENS)
    return Result.of(bench, workload, setting, interleave(_contenders(bench, workload, setting), repeats, tell), ratios)


def _contenders(bench: Bench, workload: Workload, setting: Setting) -> list[Contender]:
    engine = bench.engine(workload, setting.batch_size).with_mixture(draft_tokens=0)
    engine.stop_ids = bench.engine(workload, 1).stop_ids

    def ours(engine: LocalEngine) -> Callable[[], int]:
        return lambda: sum(len(c.token_ids) for c in engine.generate(workload.requests))

    def alone(engine: LocalEngine, mode: Any) -> Callable[[], int]:
        single = engine.with_mixture(mode=mode)
        single.stop_ids = engine.stop_ids
        return ours(single)

    found = [
        Contender(STUDENT, alone(engine, "student")),
        Contender(TEACHER, alone(engine, "teacher")),
        Contender(LOCKSTEP, ours(engine)),
        Contender(SPECULATIVE, ours(bench.engine(workload, setting.batch_size))),
    ]
    if setting.batch_size == 1:
        found.append(Contender(PLAIN_TEACHER, alone(bench.engine(workload, 1, batch_invariant=False), "teacher")))
    if setting.peers:
        size = setting.batch_size
        found.append(Contender(HF, lambda: transformers_generate(bench, workload, size)))
        found.append(Contender(HF_MIX, lambda: transformers_generate(bench, workload, size, mix=True)))
    return found


def ratios(speed: Mapping[str, float]) -> dict[str, float]:
    """What the targets are stated in. Ideal lockstep: both models' forward passes and nothing else."""
    ideal = 1 / (1 / speed[STUDENT] + 1 / speed[TEACHER])
    found = {"q* lockstep / ideal lockstep": speed[LOCKSTEP] / ideal}
    found["q* lockstep / teacher alone"] = speed[LOCKSTEP] / speed[TEACHER]
    found["q* speculative / teacher alone"] = speed[SPECULATIVE] / max(speed[TEACHER], speed.get(PLAIN_TEACHER, 0.0))
    if HF in speed:
        found["teacher alone / Transformers generate"] = speed[TEACHER] / speed[HF]
        found["q* lockstep / Transformers + logits processor"] = speed[LOCKSTEP] / speed[HF_MIX]
        found["q* speculative / Transformers + logits processor"] = speed[SPECULATIVE] / speed[HF_MIX]
    return found


def speed_table(result: Result) -> Table:
    """For people."""
    setting = result.setting
    ends = "natural end of text" if setting.natural_end else f"{EQUAL_TOKENS} tokens each"
    title = f"batch {setting.batch_size}, {setting.prompts} prompts, {ends}\n{result.lengths}"
    table = Table(title=title, title_justify="left")
    table.add_column("tokens per second", no_wrap=True)
    table.add_column("wall clock", justify="right")
    table.add_column("CPU time", justify="right")
    for name in result.per_wall_second:
        table.add_row(name, f"{result.per_wall_second[name]:.0f}", f"{result.per_cpu_second[name]:.0f}")
    table.add_section()
    for name in result.ratios_wall:
        table.add_row(name, f"{result.ratios_wall[name]:.2f}", f"{result.ratios_cpu[name]:.2f}")
    return table
