"""The measuring harness: interleaved repeats, medians, ratios, tables, one line of JSON.

Imports no torch until a subcommand runs.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import date
from functools import partial
from importlib import import_module
from operator import add, sub
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import psutil
from rich.console import Console
from rich.table import Table

from optimal_sampling.bench.subcommands import BenchOptions
from optimal_sampling.config import ModelConfig, expand_user
from optimal_sampling.errors import StorageError
from optimal_sampling.records.store import write_atomically
from optimal_sampling.version import __version__

__all__ = [
    "RateTable",
    "Rates",
    "Report",
    "Row",
    "Spent",
    "Systems",
    "Timings",
    "hardware",
    "interleave",
    "make_table",
    "per_second",
    "quotients",
    "run_bench",
]


def ignore(text: Any) -> None:
    """Show nothing."""


def nothing() -> None:
    """Save nothing."""


@dataclass
class Report:
    """What a subcommand shows while it runs, and what it found."""

    show: Callable[[Table | str], None] = ignore
    """Prints a table or a line."""
    status: Callable[[str], None] = ignore
    """Shows what is being measured, for as long as it is."""
    models: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    """For the line of JSON."""
    save: Callable[[], None] = nothing
    """Writes what was found so far to the output."""
    failed: bool = False
    """What the subcommand checks does not hold."""


@dataclass(frozen=True)
class Spent:
    """A number of tokens, and the seconds they took."""

    tokens: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    """Of all threads of the process."""

    @classmethod
    def until_now(cls, tokens: int = 0) -> Spent:
        """Readings of the two clocks, whose differences are meaningful."""
        return cls(tokens, time.perf_counter(), time.process_time())

    def __add__(self, other: Spent) -> Spent:
        return Spent(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*map(sub, astuple(self), astuple(other)))

    def rate(self, clock: Literal["wall", "cpu"] = "wall") -> float:
        """Tokens per second; 0 where there was none."""
        return self.tokens / getattr(self, clock) if self.tokens else 0.0


Systems: TypeAlias = Mapping[str, Callable[[], int | Spent]]
"""What is timed on the same work, by name: does the work once and returns the number of tokens,
or a `Spent` where only a part of the work counts."""
Timings: TypeAlias = Mapping[str, Sequence[Spent]]
"""The counted repeats of each system."""
Rates: TypeAlias = Mapping[str, float]
"""Tokens per second by name of the system."""


def interleave(
    systems: Systems,
    repeats: int,
    status: Callable[[str], None] = ignore,
    fewer: Mapping[str, int] | None = None,
) -> Timings:
    """Run all systems in turn, once to warm up and then `repeats` times, or `fewer` for some.

    Every second turn is in reverse order, so that a machine that slows down does so for all of
    them.
    """
    most = dict.fromkeys(systems, repeats) | dict(fewer or {})
    timings: dict[str, list[Spent]] = {name: [] for name in systems}
    for repeat in range(repeats + 1):
        for name in list(systems)[:: -1 if repeat % 2 else 1]:
            if repeat > most[name]:
                continue
            status(f"{name}: repeat {repeat} of {repeats}")
            started = Spent.until_now()
            made = systems[name]()
            spent = made if isinstance(made, Spent) else Spent.until_now(made) - started
            timings[name].append(spent)
    return {name: spent[1:] for name, spent in timings.items()}


def per_second(timings: Timings, clock: Literal["wall", "cpu"]) -> dict[str, float]:
    """Median tokens per second of each system."""
    return {
        name: median(spent.rate(clock) for spent in repeats) for name, repeats in timings.items()
    }


Ratio: TypeAlias = tuple[str, str, Sequence[str]]
"""Name, numerator, and denominators, of which the largest that was measured is taken."""


def quotients(rates: Rates, named: Iterable[Ratio]) -> dict[str, float]:
    """Those ratios whose systems were measured."""
    found = {}
    for name, over, under in named:
        measured = [rates[each] for each in under if each in rates]
        if over in rates and measured:
            found[name] = rates[over] / max(measured)
    return found


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

    def table(self, bounds: Iterable[Row] = (), more: Iterable[Row] = ()) -> Table:
        """The table to be printed, with rows after the rates and after the ratios."""
        wall, cpu = self.per_wall_second, self.per_cpu_second
        rates = [(name, round(wall[name]), round(cpu[name])) for name in wall]
        ratios = [(name, ratio, self.ratios_cpu[name]) for name, ratio in self.ratios_wall.items()]
        columns = ("tokens per second", "wall clock", "CPU time")
        return make_table(self.title, columns, rates, bounds, ratios, more)


Row: TypeAlias = Sequence[str | float | None]


def make_table(title: str, columns: Sequence[str], *sections: Iterable[Row]) -> Table:
    """A table whose figures are at the right.

    Numbers with a fraction have two decimals; None is an empty cell, as are those that a row
    lacks.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for section in sections:
        for row in section:
            table.add_row(*map(_cell, row))
        table.add_section()
    return table


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def hardware(models: ModelConfig) -> dict[str, Any]:
    """Processor, versions, load, date; and the GPU, where the models are on one."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in psutil.getloadavg()],
        **_gpu(models.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "optimal_sampling": __version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = ""
    model = re.search(r"model name\s*: (.+)", facts)
    return model[1] if model else platform.processor() or platform.machine()


def _gpu(name: str) -> dict[str, Any]:
    import torch

    from optimal_sampling.engines.device import resolve_device

    device = resolve_device(name)
    if device.type != "cuda":
        return {}
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    command = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    status, text = subprocess.getstatusoutput(command)
    return "unknown" if status else text.partition("\n")[0]


def run_bench(options: BenchOptions, console: Console) -> int:
    """Run a subcommand: tables, then one line of JSON. Returns the exit code."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = hardware(getattr(options, "models", ModelConfig()))
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    module, function = options.function.split(":")
    run = getattr(import_module(f"optimal_sampling.bench.{module}"), function)
    with console.status("loading", spinner="dots") as status:
        report = Report(console.print, status.update)
        report.save = partial(_save, options, facts, report)
        run(options, report)
    console.file.write(_line(options, facts, report))
    report.save()
    return 1 if report.failed else 0


def _line(options: BenchOptions, facts: dict[str, Any], report: Report) -> str:
    """The line of JSON."""
    result = {
        "benchmark": options.name,
        "hardware": facts,
        "models": report.models,
        "results": report.results,
    }
    return json.dumps(result) + "\n"


def _save(options: BenchOptions, facts: dict[str, Any], report: Report) -> None:
    """Write the line to the output, if one was named. Raises StorageError."""
    if options.output is None:
        return
    path, line = expand_user(options.output), _line(options, facts, report)
    try:
        if path.exists() and not path.is_file():
            path.write_text(line)  # a device or a pipe, which must not be replaced
        else:
            write_atomically(path, line)
    except OSError as error:
        raise StorageError(f"cannot write the output {options.output!r}: {error}") from error
