"""Tokens per second of q*, of both models alone, and of what a user of Transformers would write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.baselines import transformers_generate
from optimal_sampling.bench.hardware import lockstep_bound
from optimal_sampling.bench.harness import (
    Display,
    Rates,
    RateTable,
    Report,
    Spent,
    System,
    interleave,
    quotients,
    timed,
)
from optimal_sampling.bench.subcommands import DraftsOptions, SpeedOptions
from optimal_sampling.bench.workload import (
    ModelPair,
    Variant,
    Workload,
    count_tokens,
)

__all__ = [
    "IDEAL",
    "LOCKSTEP",
    "ROOFLINE",
    "STUDENT",
    "TEACHER",
    "Setting",
    "draft_settings",
    "fixed_drafts",
    "ideal_lockstep",
    "measure_setting",
    "ratios",
    "run_drafts",
    "run_speed",
    "speed_settings",
    "systems",
]

STUDENT, TEACHER = "student alone", "teacher alone"
PLAIN_TEACHER = "teacher alone, shapes not padded"
LOCKSTEP = "q* lockstep"
AUTO = "q* speculative, auto (the default)"
HF, HF_MIX = "Transformers generate, teacher", "Transformers generate + logits processor, q*"
ASSISTED = "Transformers assisted generation, teacher"
IDEAL, ROOFLINE = "ideal lockstep", "roofline, lockstep"
BEST_TEACHER, BEST_FIXED = "fastest teacher alone", "best of lockstep and fixed lengths"


def fixed_drafts(count: int) -> str:
    """Name of q* with this fixed draft length."""
    return f"q* speculative, {count}"


FIXED = tuple(map(fixed_drafts, (1, 2, 4, 8, 16)))
ENGINE_ROWS = (STUDENT, TEACHER, PLAIN_TEACHER, LOCKSTEP, *FIXED[:-1], AUTO)
VARIANTS = {
    STUDENT: Variant(mode="student"),
    TEACHER: Variant(mode="teacher"),
    PLAIN_TEACHER: Variant(mode="teacher", batch_invariant=False),
    LOCKSTEP: Variant(draft_tokens=0),
    **{fixed_drafts(k): Variant(draft_tokens=k) for k in (1, 2, 4, 8, 16)},
    AUTO: Variant(draft_tokens="auto"),
}
BASELINES: dict[str, dict[str, bool]] = {
    HF: {},
    HF_MIX: {"mix": True},
    ASSISTED: {"assisted": True},
}

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


@dataclass(frozen=True)
class Setting:
    """One table: a batch size, a number of prompts, how texts end, and the rows."""

    batch_size: int
    prompts: int
    natural_end: bool
    rows: tuple[str, ...]


@dataclass(frozen=True)
class SpeedResult(RateTable):
    """One table, with what bounds its rates."""

    setting: Setting
    bounds: dict[str, float]
    """Tokens per wall-clock second that are possible at most."""
    bandwidth: float
    """Of memory, measured, in bytes per second."""

    def bounded_table(self) -> Table:
        """The table to be printed."""
        roofline = f"{ROOFLINE} at {self.bandwidth / 1e9:.1f} GB/s"
        named = {roofline if name == ROOFLINE else name: x for name, x in self.bounds.items()}
        return self.table(named)


def speed_settings(prompts: int, natural: bool = True) -> list[Setting]:
    """Batch 1 on fewer prompts, batch 32 with natural and with equal lengths."""
    rows = (*ENGINE_ROWS, *BASELINES)
    first = Setting(1, max(8, prompts // 16), natural, rows)
    last = Setting(32, max(32, prompts // 4), False, rows)
    return [first, Setting(32, prompts, True, rows), last] if natural else [first, last]


def draft_settings(prompts: int, natural: bool = True, padded: bool = True) -> list[Setting]:
    """Batch 1 to 128, on fewer prompts where it is slow; the teacher alone as fast as it runs."""
    rows = (PLAIN_TEACHER if padded else TEACHER, LOCKSTEP, *FIXED, AUTO, ASSISTED)
    counts = {
        1: max(8, prompts // 16),
        8: max(32, prompts // 4),
        32: max(64, prompts // 2),
        128: max(256, prompts),
    }
    return [Setting(batch, count, natural, rows) for batch, count in counts.items()]


def systems(
    names: Iterable[str], pair: ModelPair, workload: Workload, batch_size: int
) -> list[System]:
    """The systems of these names that differ for this pair and batch size."""
    return [
        _baseline(name, pair, workload, batch_size)
        if name in BASELINES
        else _engine_system(name, pair, workload, batch_size)
        for name in names
        if _applies(name, pair, batch_size)
    ]


def _applies(name: str, pair: ModelPair, batch_size: int) -> bool:
    if name == PLAIN_TEACHER:
        return pair.padded
    return name != ASSISTED or (pair.has_assistant and batch_size == 1)


def _baseline(name: str, pair: ModelPair, workload: Workload, batch_size: int) -> System:
    how = BASELINES[name]
    return System(name, lambda _: transformers_generate(pair, workload, batch_size, **how))


def _engine_system(name: str, pair: ModelPair, workload: Workload, batch_size: int) -> System:
    engine = pair.engine(workload, batch_size, VARIANTS[name])

    def run(repeat: int) -> Spent:
        if engine.pair.recorded_graphs is not None:
            # records again the CUDA graphs that the engine dropped for the system before it
            count_tokens(engine, workload)
        return timed(lambda: count_tokens(engine, workload))

    return System(name, run)


def measure_setting(
    pair: ModelPair, setting: Setting, repeats: int, display: Display
) -> SpeedResult:
    """Time all systems of a setting in turn."""
    workload = pair.workload(setting.prompts, None if setting.natural_end else pair.equal_tokens)
    rows = systems(setting.rows, pair, workload, setting.batch_size)
    timings = interleave(rows, repeats, display.status)
    title, cached = _lengths(pair, workload, setting)
    rates = RateTable.of(title, timings, ratios)
    display.status("memory bandwidth")
    batch, engine = min(setting.batch_size, setting.prompts), pair.engine(workload, 1)
    bounds = {ROOFLINE: lockstep_bound(engine, batch, cached, pair.bandwidth)}
    if STUDENT in timings and TEACHER in timings:
        bounds[IDEAL] = ideal_lockstep(rates.per_wall_second)
    return SpeedResult(**vars(rates), setting=setting, bounds=bounds, bandwidth=pair.bandwidth)


def _lengths(pair: ModelPair, workload: Workload, setting: Setting) -> tuple[str, float]:
    """The table's title, and the mean number of tokens in a cache while a text is drawn."""
    done = list(pair.engine(workload, 32).generate(workload.requests))
    prompts = [len(c.request.teacher_prompt_ids) for c in done]
    texts = [len(c.token_ids) for c in done]
    equal = f"{workload.requests[0].max_new_tokens} tokens each"
    ends = "natural end of text" if setting.natural_end else equal
    mean, most = fmean(texts), max(texts)
    title = (
        f"batch {setting.batch_size}, {setting.prompts} prompts, {ends}{pair.label}\n"
        f"prompts {fmean(prompts):.1f} (most {max(prompts)}), "
        f"completions {mean:.1f} (most {most}, mean/most {mean / most:.2f}) tokens"
    )
    cached = sum(new * (old + new / 2) for new, old in zip(texts, prompts, strict=True))
    return title, cached / sum(texts)


def ideal_lockstep(rates: Rates) -> float:
    """Tokens per second of both models' forward passes and nothing else."""
    return 1 / (1 / rates[STUDENT] + 1 / rates[TEACHER])


def ratios(rates: Rates) -> dict[str, float]:
    """Those of RATIOS whose rows were measured."""
    known = dict(rates)
    if STUDENT in rates and TEACHER in rates:
        known[IDEAL] = ideal_lockstep(rates)
    for best, names in ((BEST_TEACHER, (TEACHER, PLAIN_TEACHER)), (BEST_FIXED, (LOCKSTEP, *FIXED))):
        measured = [rates[name] for name in names if name in rates]
        if measured:
            known[best] = max(measured)
    return quotients(known, RATIOS)


def run_speed(options: SpeedOptions, display: Display) -> Report:
    """The subcommand `speed`."""
    pair = make_pair(options)
    settings = speed_settings(options.num_prompts, pair.natural)
    return _tables(pair, settings, options.repeats, display)


def run_drafts(options: DraftsOptions, display: Display) -> Report:
    """The subcommand `drafts`."""
    pair = make_pair(options)
    settings = draft_settings(options.num_prompts, pair.natural, pair.padded)
    return _tables(pair, settings, options.repeats, display)


def _tables(pair: ModelPair, settings: Sequence[Setting], repeats: int, display: Display) -> Report:
    """One table per setting, shown as soon as it is measured."""
    results: list[dict[str, Any]] = []
    for setting in settings:
        result = measure_setting(pair, setting, repeats, display)
        display.show(result.bounded_table())
        results.append(asdict(result))
    return Report(pair.names, results)
