"""Alpha and its company for each request, kept in the worker until somebody fetches them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["TraceStore"]


class TraceStore:
    """Rows of TRACE_FIELDS by request and token index.

    By index, so that a token which is computed again after a preemption is counted once. Of finished requests that
    nobody asks for, the last `keep` are held.
    """

    def __init__(self, keep: int = 4096) -> None:
        self.keep = keep
        self.rows: dict[str, dict[int, list[float]]] = {}
        self.errors: dict[str, str] = {}
        self._finished: dict[str, None] = {}

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
            if request_id in self.rows or request_id in self.errors:
                self._finished[request_id] = None
        while len(self._finished) > self.keep:
            self._forget(next(iter(self._finished)))

    def take(self, request_ids: Iterable[str]) -> dict[str, tuple[list[list[float]], str]]:
        """Rows in the order of tokens, and the error or "", of each request; they are forgotten here."""
        taken = {}
        for request_id in request_ids:
            kept = self.rows.get(request_id, {})
            taken[request_id] = ([kept[index] for index in sorted(kept)], self.errors.get(request_id, ""))
            self._forget(request_id)
        return taken

    def _forget(self, request_id: str) -> None:
        self._finished.pop(request_id, None)
        self.rows.pop(request_id, None)
        self.errors.pop(request_id, None)
