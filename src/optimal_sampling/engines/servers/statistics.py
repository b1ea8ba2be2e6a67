"""What is counted of the requests to a model's servers. No HTTP."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Latencies", "ServerStatistics", "figures_text"]

_STEP = math.log(1.05)
_SHORTEST = 1e-5  # seconds


@dataclass
class Latencies:
    """Histogram of durations with classes 5% apart, so its size does not grow with the run."""

    counts: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    """Seconds of all durations."""

    def add(self, seconds: float) -> None:
        """One more duration."""
        self.total += seconds
        self.counts[round(math.log(max(seconds, _SHORTEST)) / _STEP)] += 1

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the durations do not exceed, to 2.5%; NaN for none."""
        wanted = math.ceil(self.counts.total() * percent / 100)
        reached = 0
        for place in sorted(self.counts):
            reached += self.counts[place]
            if reached >= wanted:
                return math.exp(place * _STEP)
        return math.nan


@dataclass
class ServerStatistics:
    """Counts since the start, over all servers of a model."""

    requests: int = 0
    """Requests that were answered."""
    retries: int = 0
    """Attempts after one that failed."""
    idle_cuts: int = 0
    """Idle connections that a server had closed, noticed on use. Sent again at once."""
    failed: int = 0
    """Requests that failed for good."""
    comparisons: int = 0
    """Of a server with what it was at the start, after it was lost sight of; those that were
    answered."""
    left_out: int = 0
    """Times that a server was left out: it refused all requests, or had another model."""
    errors: Counter[str] = field(default_factory=Counter)
    """Failed attempts by kind."""
    latencies: Latencies = field(default_factory=Latencies)
    """Of attempts that were answered, waiting for a place among those in flight left out."""

    def clear(self) -> None:
        """Count from zero."""
        vars(self).update(vars(ServerStatistics()))

    def answered(self, seconds: float) -> None:
        """Count a request that was answered."""
        self.requests += 1
        self.latencies.add(seconds)

    def figures(self) -> dict[str, float]:
        """All counts by name; latencies in milliseconds."""
        figures: dict[str, float] = {
            "requests": self.requests,
            "retries": self.retries,
            "idle_cuts": self.idle_cuts,
            "failed": self.failed,
            "comparisons": self.comparisons,
            "left_out": self.left_out,
        }
        figures |= {f"errors_{kind}": count for kind, count in sorted(self.errors.items())}
        if self.requests:
            for percent in (50, 90, 99):
                figures[f"latency_p{percent}_ms"] = 1e3 * self.latencies.percentile(percent)
        return figures


def figures_text(figures: Mapping[str, float]) -> str:
    """The figures of a served model in a line. Counts of zero are left out."""
    parts = []
    for name, value in figures.items():
        title = name.removesuffix("_ms").replace("_", " ")
        if name.endswith("_ms"):
            parts.append(f"{title} {value:,.0f} ms" if value >= 10 else f"{title} {value:.2g} ms")
        elif value:
            parts.append(f"{title} {value:,.0f}")
    return ", ".join(parts)
