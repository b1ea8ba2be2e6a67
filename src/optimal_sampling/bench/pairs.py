"""The pair that the options name: models or shapes."""

from __future__ import annotations

from optimal_sampling.bench.options import BenchOptions
from optimal_sampling.bench.shapes import ShapeBench
from optimal_sampling.bench.workload import Bench

__all__ = ["make_bench"]


def make_bench(options: BenchOptions) -> Bench:
    """Raises ConfigError, ModelError. Weights are loaded at the first use."""
    if options.shapes is None:
        return Bench(options.models)
    teacher, student = options.shapes
    return ShapeBench(
        options.models,
        teacher,
        student,
        same_weights=options.same_weights,
        acceptance=None if options.same_weights else options.acceptance,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
    )
