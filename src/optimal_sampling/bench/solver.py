"""What the mixture costs: noise, solver, draw and diagnostics of one round, without any model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step

__all__ = ["Cost", "measure_solver", "solver_table"]

SIZES = ((264, 1, 100), (264, 32, 100), (151_936, 1, 2), (151_936, 32, 1))
"""Vocabulary, batch, calls per repeat: the shipped pair's vocabulary and Qwen2.5's."""


@dataclass(frozen=True)
class Cost:
    """CPU milliseconds of one call on one thread, medians."""

    vocab: int
    batch: int
    clamped: float
    """Share of rows that the default bounds clamp."""
    milliseconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_solver(repeats: int, tell: Callable[[str], None]) -> list[Cost]:
    """Random logits, the teacher's correlated with the student's and sharper, as real pairs' are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_cost(vocab, batch, calls, repeats, tell) for vocab, batch, calls in SIZES]
    finally:
        torch.set_num_threads(threads)


def _cost(vocab: int, batch: int, calls: int, repeats: int, tell: Callable[[str], None]) -> Cost:
    tell(f"vocabulary {vocab}, batch {batch}")
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(batch, vocab, generator=generator)
    teacher = 1.2 * student + torch.randn(batch, vocab, generator=generator)
    keys, position = keys_tensor(range(batch)), torch.arange(1, batch + 1)
    noise = gumbel(keys, position, vocab)

    def drawing(mixture: MixtureConfig) -> Callable[[], object]:
        return lambda: step(student, teacher, noise, position, mixture)

    work: dict[str, Callable[[], object]] = {
        "noise": lambda: gumbel(keys, position, vocab),
        "fixed alpha": drawing(MixtureConfig(alpha_method="fixed")),
        "KL symmetry, alpha in [0.5, 1]": drawing(MixtureConfig()),
        "KL symmetry, alpha in [0, 1]": drawing(MixtureConfig(alpha_min=0.0)),
    }
    spent: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(-1, repeats):
        for name, call in work.items():
            started = time.process_time()
            for _ in range(calls):
                call()
            if repeat >= 0:
                spent[name].append(1e3 * (time.process_time() - started) / calls)
    clamped = step(student, teacher, noise, position, MixtureConfig()).trace[:, 1].mean().item()
    return Cost(vocab, batch, clamped, {name: median(times) for name, times in spent.items()})


def solver_table(costs: list[Cost]) -> Table:
    """For people."""
    table = Table(title="CPU milliseconds per round, one thread", title_justify="left")
    for name in ("vocabulary", "batch", "clamped", *costs[0].milliseconds):
        table.add_column(name, justify="right")
    for cost in costs:
        times = (f"{x:.2f}" for x in cost.milliseconds.values())
        table.add_row(str(cost.vocab), str(cost.batch), f"{cost.clamped:.0%}", *times)
    return table
