"""Options of `optimal-sampling bench`, what it prints, and the line of JSON it ends with."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any, Literal

import psutil
import tyro
from rich.console import Console

from optimal_sampling import __version__
from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import ConfigError

__all__ = ["BenchOptions", "run_bench"]


@dataclass(frozen=True)
class BenchOptions:
    """Measure on this machine, in one run: ratios of interleaved repeats, medians."""

    what: Annotated[Literal["speed", "drafts", "scaling", "solver"], tyro.conf.Positional] = "speed"
    """speed: q* beside both models alone and Transformers. drafts: by draft length. scaling: by number of prompts.
    solver: noise, alpha, draw and diagnostics without a model."""
    models: ModelConfig = field(default_factory=ModelConfig)
    num_prompts: int = 512
    """Synthetic prompts at batch 32; batch 1 takes a sixteenth of them. `scaling` starts with a quarter."""
    repeats: int = 5
    """Counted repeats of every row."""
    threads: int | None = None
    """Threads of PyTorch; unset: as the environment says."""

    def __post_init__(self) -> None:
        if min(self.num_prompts, self.repeats, self.threads or 1) < 1:
            raise ConfigError("num_prompts, repeats and threads must be at least 1")


def hardware() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in psutil.getloadavg()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "optimal_sampling": __version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run_bench(options: BenchOptions, console: Console) -> int:
    """Measure, print tables, end with one line of JSON; the exit code."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = hardware()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    with console.status("loading", spinner="dots") as status:
        measured = _measure(options, console, lambda text: status.update(text))
    line = {"benchmark": options.what, "hardware": facts, "models": _names(options.models), "results": measured}
    console.file.write(json.dumps(line) + "\n")
    return 0


def _names(models: ModelConfig) -> dict[str, str]:
    return {"teacher": models.teacher, "student": models.student, "dtype": models.dtype}


def _measure(options: BenchOptions, console: Console, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    from optimal_sampling.bench.drafts import draft_settings, measure_drafts
    from optimal_sampling.bench.scaling import measure_growth, scaling_table
    from optimal_sampling.bench.solver import measure_solver, solver_table
    from optimal_sampling.bench.speed import measure_setting, settings, speed_table
    from optimal_sampling.bench.workload import Bench

    if options.what == "solver":
        costs = measure_solver(options.repeats, tell)
        console.print(solver_table(costs))
        return [cost.as_json() for cost in costs]
    bench = Bench(options.models)
    if options.what == "scaling":
        growth = measure_growth(bench, max(1, options.num_prompts // 4), tell)
        console.print(scaling_table(growth))
        return [g.as_json() for g in growth]
    speed = options.what == "speed"
    measure = measure_setting if speed else measure_drafts
    results = []
    for setting in settings(options.num_prompts) if speed else draft_settings(options.num_prompts):
        result = measure(bench, setting, options.repeats, tell)
        console.print(speed_table(result))
        results.append(result.as_json())
    return results
