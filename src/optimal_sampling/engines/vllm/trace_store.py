"""Traces of requests in vLLM's worker until they are fetched, and a summary of their alphas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from optimal_sampling.types import weighted_mean

__all__ = ["TraceRows", "TraceStore", "Traces", "alpha_summary"]

TraceRows = list[list[float]]
"""Values of TRACE_FIELDS, one list per token."""

Traces = dict[str, tuple[TraceRows, str]]
"""Rows and error ("" for none) by request."""


class TraceStore:
    """Rows of TRACE_FIELDS by request and token index.

    By index, so that a token that is computed again after a preemption counts once. Traces of
    finished requests that are never fetched (the client has disconnected) are dropped, oldest
    first, above `capacity` tokens.
    """

    def __init__(self, capacity: int = 1 << 17) -> None:
        self.capacity = capacity
        self.rows: dict[str, dict[int, list[float]]] = {}
        self.errors: dict[str, str] = {}
        self._finished: dict[str, int] = {}
        """Finished requests, oldest first, and what each counts against `capacity`."""
        self._finished_total = 0

    def add(self, request_id: str, first: int, rows: Sequence[list[float]]) -> None:
        """Add rows of consecutive tokens, the first at index `first` of the completion."""
        stored = self.rows.setdefault(request_id, {})
        stored.update(enumerate(rows, first))

    def fail(self, request_id: str, message: str) -> None:
        """Record an error of a request; the first one is kept."""
        self.errors.setdefault(request_id, message)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Mark requests that draw no more tokens."""
        for request_id in request_ids:
            known = request_id in self.rows or request_id in self.errors
            if known and request_id not in self._finished:
                count = len(self.rows.get(request_id, ())) + 1
                self._finished[request_id] = count
                self._finished_total += count
        while self._finished_total > self.capacity:
            self._drop(next(iter(self._finished)))

    def take(self, request_ids: Iterable[str]) -> Traces:
        """Remove and return the traces of these requests, rows in the order of tokens."""
        taken: Traces = {}
        for request_id in request_ids:
            stored = self.rows.get(request_id, {})
            rows = [stored[index] for index in sorted(stored)]
            taken[request_id] = rows, self.errors.get(request_id, "")
            self._drop(request_id)
        return taken

    def take_by_prefix(self, prefixes: Iterable[str]) -> Traces:
        """`take` by prefix of the request id: vLLM's server appends to the id a request has."""
        taken: Traces = {}
        known = [*self.rows, *self.errors]
        for prefix in prefixes:
            request_id = next((each for each in known if each.startswith(prefix)), prefix)
            taken[prefix] = self.take([request_id])[request_id]
        return taken

    def _drop(self, request_id: str) -> None:
        self._finished_total -= self._finished.pop(request_id, 0)
        self.rows.pop(request_id, None)
        self.errors.pop(request_id, None)


def alpha_summary(
    alpha: Sequence[float], clamped: Sequence[float], curvature: Sequence[float]
) -> dict[str, float]:
    """Statistics over tokens that have an alpha; NaN without any. `std` is the population's.

    `weighted_mean`, with `curvature` as weights, is alpha where the models differ. `count` is of
    all tokens.
    """
    count, weighted = len(alpha), weighted_mean(alpha, curvature)
    alpha = [value for value in alpha if not math.isnan(value)]
    return {
        "mean": statistics.fmean(alpha) if alpha else math.nan,
        "weighted_mean": weighted,
        "std": statistics.pstdev(alpha) if alpha else math.nan,
        "min": min(alpha, default=math.nan),
        "max": max(alpha, default=math.nan),
        "count": count,
        "clamped": statistics.fmean(clamped) if clamped else math.nan,
    }
