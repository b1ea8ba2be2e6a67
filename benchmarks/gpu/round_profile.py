"""Where a round's time goes on a GPU: 20 lockstep rounds and 20 with 4 drafts, at 32 x 512.

    PYTHONPATH=src python3 benchmarks/gpu/round_profile.py [--output profile.json]
    PYTHONPATH=src python3 benchmarks/gpu/round_profile.py --tiny    whether the script runs

Qwen2.5-3B and 1.5B with random weights; acceptance of drafts is emulated at 0.9. Prints kernels by
kind and by name, the time in which the GPU waits, the kernels of one recorded pass, both against
the same without a round ahead, and lockstep with one model after the other. On a CPU there are no
kernels to count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile

from forward_check import Pass
from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.harness import hardware
from optimal_sampling.bench.instruments import MeasuredEngine
from optimal_sampling.bench.workload import Variant
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.run import GenerationLoop

__all__ = ["Change", "Kernel", "Profile", "change_loop", "kind_of", "main", "unchanged", "waiting"]

ACCEPTANCE = 0.9
WARM_ROUNDS = 16
"""Rounds before those that count: shapes that come often have been recorded."""
NAMES_SHOWN = 14
PROGRAMS = {
    "mixture": "optimal_sampling.distribution.gpu.programs",
    "attention": "optimal_sampling.engines.local.paged.split_attention",
}
"""Modules of Triton programs, by kind. Other Triton programs are of the layers."""
WORDS = {
    "attention": ("flash", "attend", "combine"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv"),
    "copies": ("memcpy", "memset", "copy"),
    "other PyTorch": ("at::native", "at_cuda", "cub::"),
}
"""Kinds by parts of a kernel's name, the first that fits."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the GPU; nanoseconds."""

    name: str
    start: int
    end: int


@dataclass
class Profile:
    """What some rounds did."""

    rounds: int
    wall: float
    """Seconds of all, without the profiler."""
    kernels: list[Kernel] = field(default_factory=list)
    graph_launches: int = 0

    def facts(self) -> dict[str, Any]:
        """Per round: milliseconds of wall clock, of kernels by kind, of idle GPU."""
        per_round = 1e6 * self.rounds
        facts: dict[str, Any] = {
            "rounds": self.rounds,
            "ms": 1e3 * self.wall / self.rounds,
            "kernels": len(self.kernels) / self.rounds,
            "graph_launches": self.graph_launches / self.rounds,
        }
        if not self.kernels:
            return facts
        busy, gaps = busy_and_gaps(self.kernels)
        window = max(each.end for each in self.kernels) - self.kernels[0].start
        kinds: dict[str, int] = defaultdict(int)
        for kernel in self.kernels:
            kinds[kind_of(kernel.name)] += kernel.end - kernel.start
        total = sum(kinds.values())
        return facts | {
            "profiled_ms": window / per_round,
            "busy_ms": busy / per_round,
            "idle_ms": (window - busy) / per_round,
            "longest_gaps_us": [
                round(gap / 1e3, 1) for gap in sorted(gaps)[: -self.rounds - 1 : -1]
            ],
            "kernel_ms": total / per_round,
            "at_once": total / busy,
            "by_kind_ms": {kind: spent / per_round for kind, spent in sorted(kinds.items())},
        }

    def by_name(self) -> list[tuple[str, float, float]]:
        """(name, microseconds per round, times per round), the largest first."""
        spent: dict[str, list[int]] = defaultdict(list)
        for kernel in self.kernels:
            spent[kernel.name].append(kernel.end - kernel.start)
        rows = [
            (name, sum(each) / 1e3 / self.rounds, len(each) / self.rounds)
            for name, each in spent.items()
        ]
        return sorted(rows, key=lambda row: -row[1])


def busy_and_gaps(kernels: Sequence[Kernel]) -> tuple[int, list[int]]:
    """Nanoseconds in which any kernel runs, and the pauses between; kernels in order of start."""
    busy, gaps, end = 0, [], kernels[0].start
    for kernel in kernels:
        if kernel.start > end:
            gaps.append(kernel.start - end)
        busy += max(0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return busy, gaps


def kind_of(name: str) -> str:
    """What a kernel is for."""
    for kind, module in PROGRAMS.items():
        with contextlib.suppress(ImportError):
            if name in vars(import_module(module)):
                return kind
    lowered = name.lower()
    for kind, words in WORDS.items():
        if any(word in lowered for word in words):
            return kind
    return "layers (Triton) and others"


class Window:
    """A `stop` of an engine that measures some rounds in the middle of a run and then ends it."""

    def __init__(self, rounds: int, profiled: bool, device: torch.device) -> None:
        self.rounds = rounds
        self.device = device
        cuda = device.type == "cuda"
        activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        self.profiler = profile(activities=[activity]) if profiled and cuda else None
        self.wall = 0.0

    def __call__(self, rounds: int) -> bool:
        """Called before each round."""
        if rounds == WARM_ROUNDS:
            self._wait()
            if self.profiler is not None:
                self.profiler.__enter__()
            self.wall = -time.perf_counter()
        if rounds < WARM_ROUNDS + self.rounds:
            return False
        self._wait()
        self.wall += time.perf_counter()
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
        return True

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def events_of(profiler: Any) -> tuple[list[Kernel], int]:
    """Kernels in order of start, and how many recorded graphs were launched."""
    found, launches = [], 0
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            start = event.start_ns()
            found.append(Kernel(event.name(), start, start + event.duration_ns()))
        launches += event.name() == "cudaGraphLaunch"
    return sorted(found, key=lambda kernel: kernel.start), launches


def unchanged(loop: GenerationLoop) -> None:
    """As it is."""


def in_turn(loop: GenerationLoop) -> None:
    """Run one model after the other."""
    loop.sampler.overlap.works = False


def waiting(loop: GenerationLoop) -> None:
    """Queue no round before the tokens of the one before are known."""
    loop.runs_ahead = False


Change: TypeAlias = Callable[[GenerationLoop], None]


def change_loop(engine: MeasuredEngine, change: Change) -> None:
    """Change the loops of an engine."""
    make = engine._new_loop

    def new_loop() -> GenerationLoop:
        loop = make()
        change(loop)
        return loop

    engine._new_loop = new_loop  # type: ignore[method-assign]


@dataclass
class Profiler:
    """One pair of models, and the work that is profiled."""

    pair: RandomPair
    batch: int
    tokens: int
    rounds: int

    def measure(self, drafts: int, change: Change) -> Profile:
        """Rounds of a run, timed, and then those of another under the profiler."""
        plain = self._run(drafts, change, profiled=False)
        traced = self._run(drafts, change, profiled=True) if self.cuda else plain
        kernels, launches = events_of(traced.profiler) if traced.profiler else ([], 0)
        return Profile(self.rounds, plain.wall, kernels, launches)

    @property
    def cuda(self) -> bool:
        """Whether there are kernels to see."""
        return self.pair.device.type == "cuda"

    def _run(self, drafts: int, change: Change, profiled: bool) -> Window:
        workload = self.pair.workload(self.batch, self.tokens)
        variant = Variant(draft_tokens=drafts, acceptance=ACCEPTANCE)
        engine = self.pair.engine(workload, self.batch, variant)
        change_loop(engine, change)
        window = Window(self.rounds, profiled, self.pair.device)
        engine.stop = window
        engine.record(workload.requests)
        return window

    def recorded_passes(self) -> dict[str, dict[str, float]]:
        """Kernels and microseconds of one replay, by model and width."""
        found = {}
        for role, width in (("student", 1), ("teacher", 1), ("teacher", 5)):
            runner = self.pair.loaded().pair.runners[role]
            if not (isinstance(runner, PageRunner) and self.cuda):
                continue
            one = Pass.of(runner, (self.batch, width), 600, self.batch * 8 * PAGE)
            one.record()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                one()
                torch.cuda.synchronize()
            kernels, _ = events_of(profiler)
            spent = sum(kernel.end - kernel.start for kernel in kernels) / 1e3
            layers = runner.model.config.num_hidden_layers
            one.close()
            found[f"{role}, width {width}"] = {
                "kernels": len(kernels),
                "per_layer": len(kernels) / layers,
                "us": spent,
            }
        return found


def show(title: str, measured: Profile) -> dict[str, Any]:
    """Print a profile; returns its facts."""
    facts = measured.facts()
    print(f"\n{title}")
    for name, value in facts.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"  {name:<16} {text}")
    rows = measured.by_name()[:NAMES_SHOWN]
    for name, spent, times in rows:
        print(f"  {spent:9.1f} us {times:7.1f} x  {name[:80]}")
    return facts | {"by_name": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, print, and end with a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever there is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--teacher-shape", default="Qwen2.5-3B")
    parser.add_argument("--student-shape", default="Qwen2.5-1.5B")
    parser.add_argument("--output", type=Path, help="file that the line of JSON is written to")
    asked = parser.parse_args(arguments)
    models = ModelConfig(device=asked.device)
    shapes = ("tiny", "tiny") if asked.tiny else (asked.teacher_shape, asked.student_shape)
    pair = RandomPair(models, *shapes, prompt_tokens=8 if asked.tiny else 128)
    if pair.device.type == "cpu" and not asked.tiny:
        parser.error("there is no GPU here: --tiny tries the script")
    profiler = Profiler(pair, *((3, 200) if asked.tiny else (32, 512)), asked.rounds)
    result: dict[str, Any] = {"hardware": hardware(models), "models": pair.names}
    print(", ".join(f"{name} {value}" for name, value in result["hardware"].items()))
    for name, value in pair.loaded().notes().items():
        print(f"{name}: {value}")
    for title, drafts, change in named_runs():
        result[title] = show(title, profiler.measure(drafts, change))
    result["recorded passes"] = profiler.recorded_passes()
    for name, facts in result["recorded passes"].items():
        print(f"\none recorded pass, {name}: {facts}")
    line = json.dumps(result)
    print(line)
    if asked.output is not None:
        asked.output.write_text(line + "\n")
    return 0


def named_runs() -> Iterable[tuple[str, int, Change]]:
    """(title, drafts, what is changed)"""
    yield "lockstep, both models at once", 0, unchanged
    yield "lockstep, no round ahead", 0, waiting
    yield "lockstep, one after the other", 0, in_turn
    yield "4 drafts", 4, unchanged
    yield "4 drafts, no round ahead", 4, waiting


if __name__ == "__main__":
    sys.exit(main())
