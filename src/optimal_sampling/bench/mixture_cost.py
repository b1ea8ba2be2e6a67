"""The cost of the mixture: noise, solver, draw and diagnostics of one round, without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
from rich.table import Table

from optimal_sampling.bench.harness import SILENT, Display, Report, System, interleave, make_table
from optimal_sampling.bench.subcommands import SolverOptions
from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step

__all__ = ["cost_table", "measure_cost", "run"]

SIZES = ((264, 1, 100), (264, 32, 100), (151_936, 1, 2), (151_936, 32, 1))
"""Vocabulary, batch, calls per repeat: the shipped pair's vocabulary and Qwen2.5's."""
MIXTURES = {
    "fixed alpha": MixtureConfig(alpha_method="fixed"),
    "KL symmetry, alpha in [0.5, 1]": MixtureConfig(),
    "KL symmetry, alpha in [0, 1]": MixtureConfig(alpha_min=0.0),
}


@dataclass(frozen=True)
class MixtureCost:
    """CPU milliseconds of one call on one thread, medians."""

    vocab: int
    batch: int
    clamped: float
    """Share of rows that the default bounds clamp."""
    milliseconds: dict[str, float]


def measure_cost(
    size: tuple[int, int, int], repeats: int, display: Display = SILENT
) -> MixtureCost:
    """Random logits, the teacher's correlated with the student's and sharper, as real pairs' are.

    `size`: vocabulary, batch, and calls per repeat.
    """
    vocab, batch, calls = size
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(batch, vocab, generator=generator)
    teacher = 1.2 * student + torch.randn(batch, vocab, generator=generator)
    keys, position = keys_tensor(range(batch)), torch.arange(1, batch + 1)
    noise = gumbel(keys, position, vocab)

    def system(name: str, call: Callable[[], object]) -> System:
        def run(repeat: int) -> int:
            for _ in range(calls):
                call()
            return calls

        return System(f"{name}, vocabulary {vocab}, batch {batch}", run)

    works: dict[str, Callable[[], object]] = {"noise": partial(gumbel, keys, position, vocab)}
    for name, mixture in MIXTURES.items():
        works[name] = partial(step, student, teacher, noise, position, mixture)
    timings = interleave([system(*item) for item in works.items()], repeats, display.status)
    milliseconds = {
        name: median(1e3 * spent.cpu / spent.tokens for spent in timing)
        for name, timing in zip(works, timings.values(), strict=True)
    }
    trace = step(student, teacher, noise, position, MixtureConfig()).trace
    return MixtureCost(vocab, batch, trace[:, 1].mean().item(), milliseconds)


def cost_table(costs: list[MixtureCost]) -> Table:
    """The table to be printed."""
    rows: list[tuple[str | float, ...]] = [
        (cost.vocab, cost.batch, f"{cost.clamped:.0%}", *cost.milliseconds.values())
        for cost in costs
    ]
    columns = ("vocabulary", "batch", "clamped", *costs[0].milliseconds)
    return make_table("CPU milliseconds per round, one thread", columns, rows)


def run(options: SolverOptions, display: Display) -> Report:
    """The subcommand `solver`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [measure_cost(size, options.repeats, display) for size in SIZES]
    finally:
        torch.set_num_threads(threads)
    display.show(cost_table(costs))
    return Report(results=[asdict(cost) for cost in costs])
