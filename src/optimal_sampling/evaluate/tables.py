"""Scores of checkpoints on benchmarks as data, and that data as JSON, Markdown and rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType

from optimal_sampling.evaluate.statistics import CheckpointScores, Metric

__all__ = ["Evaluation", "json_text", "markdown_text", "rich_table", "summarize"]


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one benchmark."""

    checkpoint: str
    benchmark: str
    scores: CheckpointScores
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Stored with the scores: temperature, top-p, system prompt, thinking, hashes, ..."""


def summarize(
    evaluations: Sequence[Evaluation], metrics: Sequence[Metric], baseline: str | None = None
) -> dict[str, Any]:
    """All that the tables show, as plain numbers, strings, lists and dicts.

    `baseline`: checkpoint that the paired differences are against; by default the first one.
    Raises ConfigError for an unknown baseline, or a metric with k above the samples.
    """
    raise NotImplementedError


def json_text(summary: Mapping[str, Any]) -> str:
    """The summary as indented JSON, with a newline at its end."""
    raise NotImplementedError


def markdown_text(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: scores by benchmark, then the paired differences."""
    raise NotImplementedError


def rich_table(summary: Mapping[str, Any]) -> RenderableType:
    """The summary for a terminal."""
    raise NotImplementedError
