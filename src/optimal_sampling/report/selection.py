"""Which samples of a run are on the page: the same ones whatever the order and the moment."""

from __future__ import annotations

import heapq
from hashlib import blake2b
from typing import Any

from optimal_sampling.records.schema import Record
from optimal_sampling.records.verdicts import Graded

__all__ = ["Selection"]


class Selection:
    """The `count` samples whose hash of row and sample number is smallest.

    A random choice, and that of the same rows in runs of one dataset.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[int, str, Record, Graded | None]] = []
        """The largest hash first; ids tell equal hashes apart."""

    def add(self, record: Record, graded: Graded | None) -> None:
        """Offer a sample."""
        key = -_hash(record["row_index"], record["sample_index"]), record["id"]
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, (*key, record, graded))
        elif self.count and key > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (*key, record, graded))

    def samples(self) -> list[tuple[Record, Graded | None]]:
        """The samples in the order of the dataset, tries of stages in their order."""
        chosen = [(record, graded) for _, _, record, graded in self._heap]
        return sorted(chosen, key=lambda each: _order(each[0]))


def _hash(row: int, sample: int) -> int:
    return int.from_bytes(blake2b(f"{row}:{sample}".encode(), digest_size=8).digest())


def _order(record: Record) -> tuple[Any, ...]:
    return record["row_index"], record.get("tries", 0), record["sample_index"], record["id"]
