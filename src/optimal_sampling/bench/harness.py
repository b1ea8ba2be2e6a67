"""The measuring harness: interleaved repeats, medians, ratios, tables, one line of JSON.

Imports no torch until a subcommand runs, so that scripts which time other processes can use it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.table import Table

from optimal_sampling.bench.subcommands import BenchOptions
from optimal_sampling.config import ModelConfig

__all__ = [
    "SILENT",
    "Display",
    "RateTable",
    "Rates",
    "Report",
    "Spent",
    "System",
    "interleave",
    "make_table",
    "per_second",
    "quotients",
    "run_bench",
]

Rates: TypeAlias = Mapping[str, float]
"""Tokens per second by name of the system."""


def ignore(text: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Display:
    """Where a measurement is shown."""

    show: Callable[[Table | str], None] = ignore
    """Prints a table or a line."""
    status: Callable[[str], None] = ignore
    """Shows what is being measured, for as long as it is."""


SILENT = Display()


@dataclass(frozen=True)
class Spent:
    """A number of tokens, and the seconds they took."""

    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads of the process."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class System:
    """A system to be timed on the same work as others."""

    name: str
    run: Callable[[int], int | Spent]
    """Does the work once; the argument is the number of the repeat, 0 for the warm-up. Returns
    the number of tokens, or a `Spent` where only a part of the work counts."""
    repeats: int | None = None
    """Most counted repeats; None: as many as the others."""


Timings: TypeAlias = dict[str, list[Spent]]
"""The counted repeats of each system."""


def interleave(
    systems: Iterable[System], repeats: int, status: Callable[[str], None] = ignore
) -> Timings:
    """Run all systems in turn, once to warm up and then `repeats` times.

    Every second turn is in reverse order, so that a machine that slows down does so for all of
    them.
    """
    systems = list(systems)
    timings: Timings = {system.name: [] for system in systems}
    for repeat in range(repeats + 1):
        for system in systems[:: -1 if repeat % 2 else 1]:
            if system.repeats is not None and repeat > system.repeats:
                continue
            status(f"{system.name}: {f'repeat {repeat} of {repeats}' if repeat else 'warm-up'}")
            spent = timed(partial(system.run, repeat))
            if repeat:
                timings[system.name].append(spent)
    return timings


def timed(work: Callable[[], int | Spent]) -> Spent:
    """Tokens and seconds of one call; or what the call itself returns as `Spent`."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    if isinstance(made, Spent):
        return made
    return Spent(made, time.perf_counter() - wall, time.process_time() - cpu)


def per_second(timings: Timings, clock: Literal["wall", "cpu"]) -> dict[str, float]:
    """Median tokens per second of each system."""
    return {
        name: median(spent.tokens / getattr(spent, clock) for spent in repeats)
        for name, repeats in timings.items()
    }


def quotients(rates: Rates, named: Iterable[tuple[str, str, str]]) -> dict[str, float]:
    """Ratios of those (name, numerator, denominator) whose two systems were measured."""
    return {
        name: rates[over] / rates[under]
        for name, over, under in named
        if over in rates and under in rates
    }


@dataclass(frozen=True)
class RateTable:
    """Tokens per second of several systems, and ratios of them, by both clocks."""

    title: str
    per_wall_second: dict[str, float]
    per_cpu_second: dict[str, float]
    ratios_wall: dict[str, float]
    ratios_cpu: dict[str, float]

    @classmethod
    def of(
        cls, title: str, timings: Timings, ratios: Callable[[Rates], dict[str, float]]
    ) -> RateTable:
        """`ratios` computes the named ratios from the rates of one clock."""
        wall, cpu = per_second(timings, "wall"), per_second(timings, "cpu")
        return cls(title, wall, cpu, ratios(wall), ratios(cpu))

    def table(self, bounds: Rates | None = None) -> Table:
        """The table to be printed. `bounds`: most possible tokens per wall-clock second."""
        rows = [
            *_rows(self.per_wall_second, self.per_cpu_second, ".0f"),
            *_rows(bounds or {}, {}, ".0f"),
            *_rows(self.ratios_wall, self.ratios_cpu, ".2f"),
        ]
        return make_table(self.title, ("tokens per second", "wall clock", "CPU time"), rows)


def _rows(wall: Rates, cpu: Rates, form: str) -> list[Sequence[str]]:
    """One section of a table of rates; what has no CPU time is empty there."""
    rows: list[Sequence[str]] = [
        (name, format(value, form), format(cpu[name], form) if name in cpu else "")
        for name, value in wall.items()
    ]
    return [*rows, ()] if rows else []


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | float | None]]
) -> Table:
    """A table whose figures are at the right; an empty row ends a section.

    Numbers with a fraction have two decimals; None is an empty cell.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        if row:
            table.add_row(*map(_cell, row))
        else:
            table.add_section()
    return table


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Report:
    """The result of a subcommand, for the line of JSON and the exit code."""

    models: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    """What the subcommand checks does not hold."""


def run_bench(options: BenchOptions, console: Console) -> int:
    """Run a subcommand: tables, then one line of JSON. Returns the exit code."""
    import torch

    from optimal_sampling.bench.hardware import hardware

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = hardware(getattr(options, "models", ModelConfig()))
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    module, function = options.function.split(":")
    run = getattr(import_module(f"optimal_sampling.bench.{module}"), function)
    with console.status("loading", spinner="dots") as status:
        report: Report = run(options, Display(console.print, status.update))
    line = json.dumps(
        {
            "benchmark": options.name,
            "hardware": facts,
            "models": report.models,
            "results": report.results,
        }
    )
    console.file.write(line + "\n")
    if options.output is not None:
        Path(options.output).write_text(line + "\n")
    return 1 if report.failed else 0
