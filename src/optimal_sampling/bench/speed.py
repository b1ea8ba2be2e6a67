"""Tokens per second of q*, of both models alone, and of what a user of Transformers would write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.baselines import transformers_generate
from optimal_sampling.bench.harness import (
    Rates,
    RateTable,
    Report,
    Spent,
    Systems,
    interleave,
    quotients,
)
from optimal_sampling.bench.subcommands import DraftsOptions, SelfDistilOptions, SpeedOptions
from optimal_sampling.bench.workload import ModelPair, Variant, Workload
from optimal_sampling.config import PromptConfig

__all__ = ["IDEAL", "LOCKSTEP", "ROOFLINE", "STUDENT", "TEACHER", "VARIANTS", "run_speed"]

STUDENT, TEACHER = "student alone", "teacher alone"
PLAIN_TEACHER = "teacher alone, shapes not padded"
LOCKSTEP, PLAIN_LOCKSTEP = "q* lockstep", "q* lockstep, rows not alone"
AUTO = "q* speculative, auto (the default)"
HF, HF_MIX = "Transformers generate, teacher", "Transformers generate + logits processor, q*"
ASSISTED = "Transformers assisted generation, teacher"
IDEAL, ROOFLINE = "ideal lockstep", "roofline, lockstep"

FIXED = {f"q* speculative, {k}": Variant(draft_tokens=k) for k in (1, 2, 4, 8, 16)}
VARIANTS = {
    STUDENT: Variant(mode="student"),
    TEACHER: Variant(mode="teacher"),
    PLAIN_TEACHER: Variant(mode="teacher", batch_invariant=False),
    LOCKSTEP: Variant(draft_tokens=0),
    PLAIN_LOCKSTEP: Variant(draft_tokens=0, batch_invariant=False),
    **FIXED,
    AUTO: Variant(),
}
BASELINES = {HF: {}, HF_MIX: {"mix": True}, ASSISTED: {"assisted": True}}
RATIOS = (
    ("q* lockstep / ideal lockstep", LOCKSTEP, (IDEAL,)),
    ("q* lockstep / teacher alone", LOCKSTEP, (TEACHER,)),
    ("q* speculative / teacher alone", AUTO, (TEACHER, PLAIN_TEACHER)),
    ("q* speculative / best of lockstep and fixed lengths", AUTO, (LOCKSTEP, *FIXED)),
    ("teacher alone / Transformers generate", TEACHER, (HF,)),
    ("q* lockstep / Transformers + logits processor", LOCKSTEP, (HF_MIX,)),
    ("q* lockstep, rows not alone / Transformers + logits processor", PLAIN_LOCKSTEP, (HF_MIX,)),
    ("q* speculative / Transformers + logits processor", AUTO, (HF_MIX,)),
    ("q* speculative / Transformers assisted generation", AUTO, (ASSISTED,)),
)


@dataclass(frozen=True)
class Setting:
    """One table: a batch size, a number of prompts, how texts end, and the rows."""

    batch_size: int
    prompts: int
    natural_end: bool
    rows: tuple[str, ...]


def speed_settings(pair: ModelPair, prompts: int) -> list[Setting]:
    """Batch 1 on fewer prompts, batch 32 with natural and with equal lengths."""
    natural = pair.natural
    rows = tuple(name for name in (*VARIANTS, *BASELINES) if name != "q* speculative, 16")
    first = Setting(1, max(8, prompts // 16), natural, rows)
    last = Setting(32, max(32, prompts // 4), False, rows)
    return [first, Setting(32, prompts, True, rows), last] if natural else [first, last]


def draft_settings(pair: ModelPair, prompts: int) -> list[Setting]:
    """Batch 1 to 128, on fewer prompts where it is slow; the teacher alone as fast as it runs."""
    rows = (PLAIN_TEACHER if pair.padded else TEACHER, LOCKSTEP, *FIXED, AUTO, ASSISTED)
    counts = {
        1: max(8, prompts // 16),
        8: max(32, prompts // 4),
        32: max(64, prompts // 2),
        128: max(256, prompts),
    }
    return [Setting(batch, count, pair.natural, rows) for batch, count in counts.items()]


def systems(names: Iterable[str], pair: ModelPair, workload: Workload, batch_size: int) -> Systems:
    """The systems of these names that differ for this pair and batch size."""
    absent: set[str] = set()
    if not pair.padded:
        absent.update((PLAIN_TEACHER, PLAIN_LOCKSTEP))
    absent.update((PLAIN_LOCKSTEP,) if pair.drafts else (*FIXED, AUTO))
    if not pair.natural or batch_size > 1:
        absent.add(ASSISTED)
    return {
        name: partial(transformers_generate, pair, workload, batch_size, **BASELINES[name])
        if name in BASELINES
        else partial(_generate, pair, workload, batch_size, VARIANTS[name])
        for name in names
        if name not in absent
    }


def _generate(pair: ModelPair, workload: Workload, batch_size: int, variant: Variant) -> Spent:
    engine = pair.engine(workload, batch_size, variant)
    if engine.pair.recorded_graphs is not None:
        # records again the CUDA graphs that the engine dropped for the system before it
        engine.record(workload.requests)
    return engine.record(workload.requests).whole


def measure_setting(pair: ModelPair, setting: Setting, repeats: int, report: Report) -> None:
    """Time all systems of a setting in turn, and show the table."""
    workload = pair.workload(setting.prompts, None if setting.natural_end else pair.equal_tokens)
    compared = systems(setting.rows, pair, workload, setting.batch_size)
    timings = interleave(compared, repeats, report.status)
    title, cached = _lengths(pair, workload, setting)
    rates = RateTable.of(title, timings, ratios)
    batch = min(setting.batch_size, setting.prompts)
    limits = bounds(pair, rates.per_wall_second, batch, cached)
    roofline = f"{ROOFLINE} at {pair.bandwidth / 1e9:.1f} GB/s"
    named = [(roofline if name == ROOFLINE else name, round(x)) for name, x in limits.items()]
    report.show(rates.table(named))
    facts = {"setting": asdict(setting), "bounds": limits, "bandwidth": pair.bandwidth}
    report.results.append(asdict(rates) | facts)


def _lengths(pair: ModelPair, workload: Workload, setting: Setting) -> tuple[str, float]:
    """The table's title, and the mean number of tokens in a cache while a text is drawn."""
    lengths = pair.engine(workload, 32).record(workload.requests).lengths
    prompts = [len(request.teacher_prompt_ids) for request in workload.requests]
    texts = [lengths[request.id] for request in workload.requests]
    asked = [request.max_new_tokens for request in workload.requests]
    equal = f"{max(asked)} tokens each" if min(asked) == max(asked) else "random lengths"
    ends = "natural end of text" if setting.natural_end else equal
    mean, most = fmean(texts), max(texts)
    title = (
        f"batch {setting.batch_size}, {setting.prompts} prompts, {ends}{pair.label}\n"
        f"prompts {fmean(prompts):.1f} (most {max(prompts)}), "
        f"completions {mean:.1f} (most {most}, mean/most {mean / most:.2f}) tokens"
    )
    middles = [prompt + text / 2 for prompt, text in zip(prompts, texts, strict=True)]
    return title, fmean(middles, weights=texts)


def bounds(pair: ModelPair, rates: Rates, batch: int, cached: float) -> dict[str, float]:
    """Most tokens per second: by the bandwidth of memory, and by both models' forward passes."""
    return {ROOFLINE: pair.roofline(batch, cached), **_ideal(rates)}


def _ideal(rates: Rates) -> dict[str, float]:
    """Both models' forward passes and nothing else; empty where one was not measured."""
    if STUDENT not in rates or TEACHER not in rates:
        return {}
    return {IDEAL: 1 / (1 / rates[STUDENT] + 1 / rates[TEACHER])}


def ratios(rates: Rates) -> dict[str, float]:
    """Those of RATIOS whose rows were measured."""
    return quotients({**rates, **_ideal(rates)}, RATIOS)


def run_speed(options: SpeedOptions, report: Report) -> None:
    """The subcommands `speed` and `drafts`."""
    pair = make_pair(options)
    report.models = pair.names
    settings = draft_settings if isinstance(options, DraftsOptions) else speed_settings
    for setting in settings(pair, options.num_prompts):
        measure_setting(pair, setting, options.repeats, report)


SELF_BATCH = 8
ALONE, PLAIN_ALONE = "the model alone", "the model alone, shapes not padded"
PRIVILEGED = PromptConfig(teacher_template="{problem}\nHint: {solution}")
"""The form of solution that the shipped teacher was trained on."""
SELF_ROWS = {
    ALONE: VARIANTS[TEACHER],
    PLAIN_ALONE: VARIANTS[PLAIN_TEACHER],
    LOCKSTEP: VARIANTS[LOCKSTEP],
}
LOOKUP_ROWS = {f"q* prompt lookup, {k}": Variant(draft_tokens=k) for k in (2, 4, 8, 16)}
LOOKUP_ROWS["q* prompt lookup, auto"] = Variant()


def run_selfdistil(options: SelfDistilOptions, report: Report) -> None:
    """The subcommand `selfdistil`: one model in both roles, beside that model alone.

    With equal prompts q* is the model itself, and what is measured is the cost of the second
    context. With the solution in the teacher's prompt, drafts are looked up there; random weights
    repeat no solution, so there is no such table for shapes.
    """
    pair = make_pair(options)
    report.models = pair.names
    count = max(SELF_BATCH, options.num_prompts // 8)
    measure_selfdistil(pair, count, None, options.repeats, report)
    if pair.natural:
        measure_selfdistil(pair, count, PRIVILEGED, options.repeats, report)


def measure_selfdistil(
    pair: ModelPair, count: int, prompt: PromptConfig | None, repeats: int, report: Report
) -> None:
    """Time the rows in turn, and show the table with what became of the drafts.

    Only rounds that read no prompt count, and the tokens that those drew. `prompt`: a form of
    prompts that shows the teacher the solution; None: both models are given equal prompts.
    """
    workload = pair.workload(count, prompt=prompt)
    contexts = "the teacher is shown the solution" if prompt else "equal prompts"
    drafts: dict[str, dict[str, float]] = {}

    def decode(name: str, variant: Variant) -> Spent:
        done = pair.engine(workload, SELF_BATCH, variant).record(workload.requests)
        if done.loop.counts.drafted:
            drafts[name] = done.drafts()
        return done.decoding

    rows = SELF_ROWS | LOOKUP_ROWS if prompt else SELF_ROWS
    compared = {name: partial(decode, name, variant) for name, variant in rows.items()}
    if not pair.padded:
        del compared[PLAIN_ALONE]
    timings = interleave(compared, repeats, report.status)
    batches = f"batch {SELF_BATCH}, {count} prompts"
    title = f"same weights, {contexts}: {batches}, rounds that read no prompt"
    rates = RateTable.of(title, timings, to_fastest_alone)
    more: list[tuple[str, str | float]] = []
    for name, facts in drafts.items():
        more.append((f"{name}: drafts accepted", f"{facts['accepted']:.0%}"))
        more.append((f"{name}: tokens per row and round", facts["tokens_per_round"]))
    report.show(rates.table(more=more))
    report.results.append(asdict(rates) | {"drafts": drafts})


def to_fastest_alone(rates: Rates) -> dict[str, float]:
    """Ratios of q* to the model alone, as fast as it runs."""
    alone = (ALONE, PLAIN_ALONE)
    mixed = [name for name in rates if name not in alone]
    return quotients(rates, [(f"{name} / fastest alone", name, alone) for name in mixed])
