"""What `optimal-sampling bench` prints, and the line of JSON it ends with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from optimal_sampling.bench.hardware import hardware
from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.report import Report, Show, Tell

__all__ = ["run_bench"]


def run_bench(options: BenchOptions, console: Console) -> int:
    """Measure, print tables, end with one line of JSON; the exit code."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = hardware(options.models)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    with console.status("loading", spinner="dots") as status:
        report = _commands()[options.what](options, console.print, lambda text: status.update(text))
    line = json.dumps(
        {
            "benchmark": options.what,
            "hardware": facts,
            "models": report.models,
            "results": report.results,
        }
    )
    console.file.write(line + "\n")
    if options.output is not None:
        Path(options.output).write_text(line + "\n")
    return 1 if report.failed else 0


def _commands() -> dict[str, Callable[[BenchOptions, Show, Tell], Report]]:
    from optimal_sampling.bench import drafts, gpu, identity, memory, scaling, selfdistil, speed

    return {
        "speed": speed.run,
        "drafts": drafts.run,
        "selfdistil": selfdistil.run,
        "scaling": scaling.run,
        "memory": memory.run,
        "identity": identity.run,
        "solver": _solver,
        "gpu": gpu.run,
    }


def _solver(options: BenchOptions, show: Show, tell: Tell) -> Report:
    from optimal_sampling.bench.solver import measure_solver, solver_table

    costs = measure_solver(options.repeats, tell)
    show(solver_table(costs))
    return Report({}, [cost.as_json() for cost in costs])
