"""One model as its own teacher: two contexts in one forward pass, beside that model alone.

With equal prompts q* is the model itself, and what is measured is the cost of the second context.
With the solution in the teacher's prompt, drafts are looked up there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from rich.table import Table

from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.harness import (
    Display,
    Rates,
    RateTable,
    Report,
    Spent,
    System,
    interleave,
    quotients,
)
from optimal_sampling.bench.instruments import Recorder
from optimal_sampling.bench.subcommands import SelfDistilOptions
from optimal_sampling.bench.workload import ModelPair, Variant, Workload, count_tokens
from optimal_sampling.config import PromptConfig

__all__ = ["PRIVILEGED", "measure", "run"]

BATCH = 8
ALONE, PLAIN_ALONE = "the model alone", "the model alone, shapes not padded"
FASTEST = "fastest alone"
PRIVILEGED = PromptConfig(teacher_template="{problem}\nHint: {solution}")
"""The form of solution that the shipped teacher was trained on."""
EQUAL_ROWS = {
    ALONE: Variant(mode="teacher"),
    PLAIN_ALONE: Variant(mode="teacher", batch_invariant=False),
    "q* lockstep": Variant(draft_tokens=0),
}
PRIVILEGED_ROWS = {
    **EQUAL_ROWS,
    **{f"q* prompt lookup, {k}": Variant(draft_tokens=k) for k in (2, 4, 8, 16)},
    "q* prompt lookup, auto": Variant(),
}


@dataclass(frozen=True)
class SelfDistilResult(RateTable):
    """One table, with what became of the drafts."""

    drafts: dict[str, dict[str, float]]
    """By row: share of drafted tokens that was accepted, and tokens per row and round."""

    def table(self, bounds: Rates | None = None) -> Table:
        """The table to be printed."""
        table = super().table(bounds)
        for name, facts in self.drafts.items():
            accepted, tokens = facts["accepted"], facts["tokens_per_round"]
            table.add_row(f"{name}: drafts accepted", f"{accepted:.0%}", "")
            table.add_row(f"{name}: tokens per row and round", f"{tokens:.2f}", "")
        return table


def measure(
    pair: ModelPair, workload: Workload, rows: Mapping[str, Variant], repeats: int, display: Display
) -> SelfDistilResult:
    """Time the rows in turn: rounds that read no prompt, and only the tokens that those drew."""
    drafts: dict[str, dict[str, float]] = {}

    def system(name: str, variant: Variant) -> System:
        def run(repeat: int) -> Spent:
            recorder = Recorder()
            count_tokens(pair.engine(workload, BATCH, variant, recorder), workload)
            counts = recorder.loop.counts
            if counts.drafted:
                drafts[name] = {
                    "accepted": counts.accepted / counts.drafted,
                    "tokens_per_round": recorder.decoding.tokens / recorder.decoding_rows,
                }
            return recorder.decoding

        return System(name, run)

    named = [
        system(name, variant)
        for name, variant in rows.items()
        if name != PLAIN_ALONE or pair.padded
    ]
    timings = interleave(named, repeats, display.status)
    prompts = {r.student_prompt_ids == r.teacher_prompt_ids for r in workload.requests}
    contexts = "equal prompts" if prompts == {True} else "the teacher is shown the solution"
    count = len(workload.requests)
    title = f"same weights, {contexts}: batch {BATCH}, {count} prompts, rounds that read no prompt"
    return SelfDistilResult(**vars(RateTable.of(title, timings, ratios)), drafts=drafts)


def ratios(rates: Rates) -> dict[str, float]:
    """To the model alone, as fast as it runs."""
    alone = max(rates[name] for name in (ALONE, PLAIN_ALONE) if name in rates)
    named = [(f"{name} / {FASTEST}", name, FASTEST) for name in rates if name.startswith("q*")]
    return quotients({**rates, FASTEST: alone}, named)


def run(options: SelfDistilOptions, display: Display) -> Report:
    """The subcommand `selfdistil`. Random weights repeat no solution: one table for shapes."""
    pair = _one_model(options)
    count = max(BATCH, options.num_prompts // 8)
    cases = [(pair.workload(count), EQUAL_ROWS)]
    if pair.natural:
        cases.append((pair.workload(count, prompt=PRIVILEGED), PRIVILEGED_ROWS))
    results = []
    for workload, rows in cases:
        result = measure(pair, workload, rows, options.repeats, display)
        display.show(result.table())
        results.append(asdict(result))
    return Report(pair.names, results)


def _one_model(options: SelfDistilOptions) -> ModelPair:
    """The teacher in both roles."""
    models, shape = options.models, options.teacher_shape
    if shape is None:
        return ModelPair(replace(models, student=models.teacher))
    tokens = options.prompt_tokens
    pair = RandomPair(models, shape, shape, same_weights=True, prompt_tokens=tokens)
    pair.equal_tokens = options.new_tokens
    return pair
