"""Tokens per second and accepted drafts of the ways to draw from two models, at equal sharpness."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from optimal_sampling.bench.harness import Report, Spent, interleave, make_table, per_second
from optimal_sampling.bench.subcommands import MethodsOptions
from optimal_sampling.bench.workload import ModelPair, Variant, Workload
from optimal_sampling.config import MixtureConfig
from optimal_sampling.types import Mode

__all__ = ["run_methods"]

SHARPNESS: dict[str, dict[str, Any]] = {
    "T = 1": {},
    "T = 0.5": {"temperature": 0.5},
    "greedy": {"top_k": 1},
}
METHODS: dict[str, tuple[Mode, dict[str, Any]]] = {
    "teacher alone": ("teacher", {}),
    "KL symmetry": ("mixture", {}),
    "veto": ("mixture", {"alpha_method": "veto"}),
    "interleaved, min-p 0.1": (
        "mixture",
        {"alpha_method": "interleaved", "interleaved_min_p": 0.1},
    ),
    "arithmetic 0.5": ("mixture", {"alpha_method": "arithmetic"}),
}
AT_ALL = ("teacher alone", "KL symmetry", "veto")
"""Rows of every sharpness; the others at T = 1 alone."""


def variants() -> dict[str, Variant]:
    """The rows of a table by name."""
    rows = {}
    for sharpness, options in SHARPNESS.items():
        for method, (mode, given) in METHODS.items():
            if method in AT_ALL or not options:
                mixture = MixtureConfig(**given, **options)
                rows[f"{method}, {sharpness}"] = Variant(mode=mode, mixture=mixture)
    return rows


@dataclass
class Drafts:
    """What became of the drafts of a row, over all its repeats."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    rows: int = 0
    """Rows of the rounds that drew these tokens, summed."""

    @property
    def facts(self) -> dict[str, float | None]:
        """Share accepted, and tokens per row and round; None where nothing was drafted."""
        share = self.accepted / self.drafted if self.drafted else None
        return {"accepted": share, "tokens_per_round": self.tokens / self.rows}


@dataclass
class Measured:
    """A batch size of a pair, and the drafts of its rows."""

    pair: ModelPair
    workload: Workload
    batch: int
    drafts: dict[str, Drafts] = field(default_factory=dict)

    def draw(self, name: str, variant: Variant) -> Spent:
        """The workload once."""
        done = self.pair.engine(self.workload, self.batch, variant).record(self.workload.requests)
        kept = self.drafts.setdefault(name, Drafts())
        kept.drafted += done.loop.counts.drafted
        kept.accepted += done.loop.counts.accepted
        kept.tokens += done.decoding.tokens
        kept.rows += done.decoding_rows
        return done.whole


def run_methods(options: MethodsOptions, report: Report) -> None:
    """The subcommand `methods`: one table per batch size."""
    pair = ModelPair(options.models)
    report.models = pair.names
    largest = max(options.batches)
    for batch in options.batches:
        count = max(4, options.num_prompts * batch // largest)
        measure_batch(Measured(pair, pair.workload(count), batch), options.repeats, report)


def measure_batch(measured: Measured, repeats: int, report: Report) -> None:
    """Time all rows in turn, and show the table."""
    systems = {name: partial(measured.draw, name, row) for name, row in variants().items()}
    timings = interleave(systems, repeats, report.status)
    wall, cpu = per_second(timings, "wall"), per_second(timings, "cpu")
    results: list[dict[str, Any]] = []
    for name in systems:
        teacher = f"teacher alone, {name.rpartition(', ')[2]}"
        rates = {"wall": wall[name], "cpu": cpu[name], "to_teacher_cpu": cpu[name] / cpu[teacher]}
        results.append({"name": name, **rates, **measured.drafts[name].facts})
    count = len(measured.workload.requests)
    columns = ("drawn from", "tokens/s", "by CPU time", "/ teacher (CPU)", "drafts accepted")
    rows = [
        (
            row["name"],
            round(row["wall"]),
            round(row["cpu"]),
            row["to_teacher_cpu"],
            None if row["accepted"] is None else f"{row['accepted']:.0%}",
            row["tokens_per_round"],
        )
        for row in results
    ]
    title = f"batch {measured.batch}, {count} prompts, natural end of text"
    report.show(make_table(title, (*columns, "tokens per row and round"), rows))
    report.results.append({"batch": measured.batch, "prompts": count, "rows": results})
