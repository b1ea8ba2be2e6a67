"""KV caches predicted and measured, growth with the number of prompts, the mixture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimal_sampling.bench.architectures import make_pair
from optimal_sampling.bench.harness import Report, interleave, make_table, per_second
from optimal_sampling.bench.instruments import Recorder, resident_bytes
from optimal_sampling.bench.subcommands import (
    MemoryOptions,
    ScalingOptions,
    Size,
    SolverOptions,
    TopTokensOptions,
    parse_size,
)
from optimal_sampling.bench.workload import ModelPair, Workload
from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step, top_tokens
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["predicted_bytes", "run_memory", "run_scaling", "run_solver", "run_top_tokens"]

OVERSIZE = 8
"""The last row of `memory` has this fraction of the memory that its batch took."""
HUGE_BATCH = 4096
MIB = 2**20


def predicted_bytes(pair: ModelPair, workload: Workload) -> int:
    """Keys and values of all the texts at their longest, for every context."""
    runners = pair.loaded().pair.runners
    student, teacher = runners["student"], runners["teacher"]
    total = 0
    for request in workload.requests:
        tokens = request.max_new_tokens
        total += student.bytes_per_token * (len(request.student_prompt_ids) + tokens)
        total += teacher.bytes_per_token * (len(request.teacher_prompt_ids) + tokens)
    return total


def _record(pair: ModelPair, workload: Workload, batch: int) -> tuple[Recorder, dict[str, float]]:
    """One run, the largest size of its caches, and the peak of memory over that before it.

    That is resident memory on a CPU, and what is allocated on a GPU.
    """
    engine = pair.engine(workload, batch)
    cuda, device = torch.cuda, engine.device
    if device.type == "cpu":
        before = resident_bytes()
    else:
        cuda.reset_peak_memory_stats(device)
        before = cuda.memory_allocated(device)
    done = engine.record(workload.requests)
    peak = done.resident if device.type == "cpu" else cuda.max_memory_allocated(device)
    return done, {"kv_mib": done.kv_bytes / MIB, "grown_mib": (peak - before) / MIB}


def _footprint(pair: ModelPair, size: Size, budget_mib: float | None) -> dict[str, Any]:
    """One row of `memory`, in MiB. `budget_mib`: that of the pair, if it has one."""
    workload = pair.workload(size.batch, size.tokens)
    done, memory = _record(pair, workload, size.batch)
    return {
        "batch": size.batch,
        "tokens": size.tokens,
        "budget_mib": budget_mib,
        "predicted_mib": predicted_bytes(pair, workload) / MIB,
        **memory,
        "most_rows": done.most_rows,
        "preemptions": done.loop.scheduler.preemptions,
        "finished": list(done.lengths.values()).count(size.tokens),
    }


def run_memory(options: MemoryOptions, report: Report) -> None:
    """The subcommand `memory`."""
    pair = make_pair(options)
    report.models = pair.names
    measure_memory(pair, [parse_size(text) for text in options.sizes], report)


def measure_memory(pair: ModelPair, sizes: Sequence[Size], report: Report) -> None:
    """Every size, and the last again in an eighth of its memory, or in that of two texts.

    The report fails where a text did not finish.
    """
    found = report.results
    for size in sizes:
        report.status(f"batch {size}")
        found.append(_footprint(pair, size, None))
    budget = found[-1]["kv_mib"] * max(1 / OVERSIZE, 2 / sizes[-1].batch)
    report.status(f"batch {sizes[-1]} in {budget:.0f} MiB")
    pair.kv_memory_gib = budget / 1024
    found.append(_footprint(pair, sizes[-1], budget))
    columns = ("batch x tokens", "budget", "KV should", "KV took", "grown", "in flight")
    title = f"Memory of a batch of texts of equal length{pair.label}, MiB"
    rows = [
        (str(size), *list(f.values())[2:])
        for size, f in zip((*sizes, sizes[-1]), found, strict=True)
    ]
    report.show(make_table(title, (*columns, "preempted", "finished"), rows))
    report.failed = any(f["finished"] < f["batch"] for f in found)


def run_scaling(options: ScalingOptions, report: Report) -> None:
    """The subcommand `scaling`: 1, 2, 4 and 8 times the prompts, then 8 times at HUGE_BATCH."""
    pair = make_pair(options)
    report.models = pair.names
    first = max(1, options.num_prompts // 4)
    sizes = [*((first * factor, 32) for factor in (1, 2, 4, 8)), (first * 8, HUGE_BATCH)]
    _record(pair, pair.workload(first), 32)  # warm-up
    for prompts, batch in sizes:
        report.status(f"{prompts} prompts at batch {batch}")
        done, memory = _record(pair, pair.workload(prompts), batch)
        report.results.append(
            {
                "prompts": prompts,
                "batch_size": batch,
                "most_rows": done.most_rows,
                "tokens": done.whole.tokens,
                "cpu_seconds": done.whole.cpu,
                "wall_seconds": done.whole.wall,
                **memory,
            }
        )
    columns = ("prompts", "batch", "in flight", "tokens", "CPU s", "wall s", "KV caches MiB")
    more = ("memory grown MiB", "CPU ms / token")
    rows = [(*g.values(), 1e3 * g["cpu_seconds"] / g["tokens"]) for g in report.results]
    report.show(make_table("Growth with the number of prompts", (*columns, *more), rows))


SOLVER_SIZES = ((264, 1, 100), (264, 32, 100), (151_936, 1, 2), (151_936, 32, 1))
"""Vocabulary, batch, calls per repeat: the shipped pair's vocabulary and Qwen2.5's."""
MIXTURES = {
    "fixed alpha": MixtureConfig(alpha_method="fixed"),
    "KL symmetry, alpha in [0.5, 1]": MixtureConfig(),
    "KL symmetry, alpha in [0, 1]": MixtureConfig(alpha_min=0.0),
}


def _random_logits(batch: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Those of the student, and the teacher's: correlated and sharper, as real pairs' are."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(batch, vocab, generator=generator)
    return student, 1.2 * student + torch.randn(batch, vocab, generator=generator)


def measure_solver(size: tuple[int, int, int], repeats: int, report: Report) -> dict[str, Any]:
    """CPU milliseconds of the noise and of one step, and the share of clamped rows.

    `size`: vocabulary, batch, and calls per repeat.
    """
    vocab, batch, calls = size
    student, teacher = _random_logits(batch, vocab)
    keys, position = keys_tensor(range(batch)), torch.arange(1, batch + 1)
    noise = gumbel(keys, position, vocab)

    def repeated(work: Callable[[], object]) -> int:
        for _ in range(calls):
            work()
        return calls

    works = {"noise": partial(repeated, partial(gumbel, keys, position, vocab))}
    for name, mixture in MIXTURES.items():
        draw = partial(step, student, teacher, noise, position, mixture)
        works[name] = partial(repeated, draw)
    drawn = step(student, teacher, noise, position, MixtureConfig())
    report.status(f"vocabulary {vocab}, batch {batch}")
    timings = interleave(works, repeats)
    return {
        "vocab": vocab,
        "batch": batch,
        "clamped": drawn.trace[:, TRACE_FIELDS.index("clamped")].mean().item(),
        "milliseconds": {name: 1e3 / rate for name, rate in per_second(timings, "cpu").items()},
    }


def run_solver(options: SolverOptions, report: Report) -> None:
    """The subcommand `solver`: one thread, no model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [measure_solver(size, options.repeats, report) for size in SOLVER_SIZES]
    finally:
        torch.set_num_threads(threads)
    columns = ("vocabulary", "batch", "clamped", "noise", *MIXTURES)
    rows = [
        (cost["vocab"], cost["batch"], f"{cost['clamped']:.0%}", *cost["milliseconds"].values())
        for cost in costs
    ]
    report.show(make_table("CPU milliseconds per round, one thread", columns, rows))
    report.results = costs


HEAD_WIDTH = 896
"""Width of the random output layers of `top-tokens`: that of Qwen2.5-0.5B."""


def measure_top_tokens(
    size: tuple[int, int, int], width: int, options: TopTokensOptions, report: Report
) -> dict[str, Any]:
    """CPU milliseconds of a draw (noise and step), and of one that keeps top tokens.

    `size`: vocabulary, batch, and calls per repeat. With a `width`, both models' logits are made by
    an output layer of random weights; 0: they are given.
    """
    vocab, batch, calls = size
    keys, position = keys_tensor(range(batch)), torch.arange(1, batch + 1)
    logits = _random_heads(batch, vocab, width) if width else partial(_random_logits, batch, vocab)
    given = logits()
    mixture = MixtureConfig()

    def draw(k: int) -> int:
        for _ in range(calls):
            pair = logits() if width else given
            noise = gumbel(keys, position, vocab)
            drawn = step(*pair, noise, position, mixture)
            if k:
                top_tokens(pair, drawn, mixture, k)
        return calls

    works = {"draw": partial(draw, 0), "with top tokens": partial(draw, options.top_tokens)}
    report.status(f"vocabulary {vocab}, batch {batch}, width {width}")
    rates = per_second(interleave(works, options.repeats), "cpu")
    milliseconds = {name: 1e3 / rate for name, rate in rates.items()}
    ratio = milliseconds["with top tokens"] / milliseconds["draw"]
    cost = {"vocab": vocab, "batch": batch, "width": width}
    return cost | {"milliseconds": milliseconds, "ratio": ratio}


def _random_heads(batch: int, vocab: int, width: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes logits of two models from hidden states, by one random output layer."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab, width, generator=generator) * (3 / width**0.5)
    student = torch.randn(batch, width, generator=generator)
    teacher = 1.2 * student + torch.randn(batch, width, generator=generator) / 3
    return lambda: (student @ head.T, teacher @ head.T)


def run_top_tokens(options: TopTokensOptions, report: Report) -> None:
    """The subcommand `top-tokens`: one thread, no model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = [
            measure_top_tokens(size, width, options, report)
            for width in (0, HEAD_WIDTH)
            for size in SOLVER_SIZES[2:]
        ]
    finally:
        torch.set_num_threads(threads)
    columns = ("vocabulary", "batch", "output layers", "draw", "with top tokens", "ratio")
    rows = [
        (
            each["vocab"],
            each["batch"],
            f"2 of width {each['width']}" if each["width"] else "none, logits given",
            *each["milliseconds"].values(),
            each["ratio"],
        )
        for each in costs
    ]
    title = f"CPU milliseconds per round with {options.top_tokens} top tokens, one thread"
    report.show(make_table(title, columns, rows))
    report.results = costs
