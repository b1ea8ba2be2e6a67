"""Alpha and its company for each request, kept in the worker until somebody fetches them; and what sums them up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

__all__ = ["Rows", "TraceStore", "alpha_summary"]

Rows = list[list[float]]
"""Values of TRACE_FIELDS, token by token."""


class TraceStore:
    """Rows of TRACE_FIELDS by request and token index.

    By index, so that a token which is computed again after a preemption is counted once. Of finished requests that
    nobody asks for (their client has gone), the latest are held that have `keep` tokens together.
    """

    def __init__(self, keep: int = 1 << 17) -> None:
        self.keep = keep
        self.rows: dict[str, dict[int, list[float]]] = {}
        self.errors: dict[str, str] = {}
        self._finished: dict[str, int] = {}
        self._held = 0

    def add(self, request_id: str, first: int, rows: Sequence[list[float]]) -> None:
        """The rows of consecutive tokens, the first of index `first` in its completion."""
        kept = self.rows.setdefault(request_id, {})
        for offset, row in enumerate(rows):
            kept[first + offset] = row

    def fail(self, request_id: str, message: str) -> None:
        """Remember the first error of a request."""
        self.errors.setdefault(request_id, message)

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests draw no more."""
        for request_id in request_ids:
            if (
                request_id in self.rows or request_id in self.errors
            ) and request_id not in self._finished:
                self._finished[request_id] = len(self.rows.get(request_id, ())) + 1
                self._held += self._finished[request_id]
        while self._held > self.keep:
            self._forget(next(iter(self._finished)))

    def take(self, request_ids: Iterable[str]) -> dict[str, tuple[Rows, str]]:
        """Rows in the order of tokens, and the error or "", of each request; they are forgotten here."""
        taken = {}
        for request_id in request_ids:
            kept = self.rows.get(request_id, {})
            taken[request_id] = (
                [kept[index] for index in sorted(kept)],
                self.errors.get(request_id, ""),
            )
            self._forget(request_id)
        return taken

    def take_named(self, beginnings: Iterable[str]) -> dict[str, tuple[Rows, str]]:
        """`take`, of the requests whose names begin so: vLLM's server adds to the name that a request comes with."""
        taken: dict[str, tuple[Rows, str]] = {}
        known = [*self.rows, *self.errors]
        for beginning in beginnings:
            name = next((each for each in known if each.startswith(beginning)), beginning)
            taken[beginning] = self.take([name])[name]
        return taken

    def _forget(self, request_id: str) -> None:
        self._held -= self._finished.pop(request_id, 0)
        self.rows.pop(request_id, None)
        self.errors.pop(request_id, None)


def alpha_summary(alpha: Sequence[float], clamped: Sequence[float]) -> dict[str, float]:
    """Plain numbers over some tokens; NaN where there is none. `std` is the population's."""
    return {
        "mean": statistics.fmean(alpha) if alpha else math.nan,
        "std": statistics.pstdev(alpha) if alpha else math.nan,
        "min": min(alpha, default=math.nan),
        "max": max(alpha, default=math.nan),
        "count": len(alpha),
        "clamped": statistics.fmean(clamped) if clamped else math.nan,
    }
