"""One ragged forward pass laid out as integers: which token is where, and which keys it sees.

The flat tokens are prompt chunks, then `width` tokens of every dense row. Chunks and dense rows are *segments*:
queries in a row that see the keys of their row up to and including themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.local.paged.cache import PagedCache
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["Batch", "Shape", "lay_out"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a recorded forward pass depends on, beside the numbers that may change between replays."""

    tokens: int
    segments: int
    max_queries: int
    max_keys: int
    outputs: int
    """Tokens at the end whose logits are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The inputs of one forward pass. `numbers` holds all integers but the ids, so that they are one copy."""

    shape: Shape
    ids: Int[Tensor, " tokens"]
    numbers: Int[Tensor, " numbers"]

    def _part(self, first: int, count: int) -> Int[Tensor, " count"]:
        return self.numbers[first : first + count]

    @property
    def positions(self) -> Int[Tensor, " tokens"]:
        """Of the tokens in their texts."""
        return self._part(0, self.shape.tokens)

    @property
    def write(self) -> Int[Tensor, " tokens"]:
        """Flat indices of the cache at which keys and values are stored."""
        return self._part(self.shape.tokens, self.shape.tokens)

    @property
    def query_ends(self) -> Int[Tensor, " segments+1"]:
        """Cumulative numbers of queries, from 0."""
        return self._part(2 * self.shape.tokens, self.shape.segments + 1)

    @property
    def key_starts(self) -> Int[Tensor, " segments+1"]:
        """Flat index of each segment's first key; the last number means nothing."""
        return self._part(2 * self.shape.tokens + self.shape.segments + 1, self.shape.segments + 1)

    @property
    def keys_used(self) -> Int[Tensor, " segments"]:
        """Number of keys that each segment's last query sees."""
        return self._part(2 * self.shape.tokens + 2 * self.shape.segments + 2, self.shape.segments)


def lay_out(
    cache: PagedCache,
    start: Int[np.ndarray, " rows"],
    width: int,
    idle: Sequence[int],
    chunks: Sequence[Chunk],
) -> tuple[Int[np.ndarray, " numbers"], Shape]:
    """`Batch.numbers` of these chunks and of `width` tokens per dense row from position `start` on.

    Idle rows read the scratch page, and write its first token.
    """
    rows = len(start)
    used = set(range(rows)) - set(idle)
    base = np.array([cache.start(row) if row in used else 0 for row in range(rows)])
    first = np.where([row in used for row in range(rows)], start, 0)
    bases = np.concatenate([[cache.start(c.slot) for c in chunks], base]).astype(np.int64)
    firsts = np.concatenate([[c.start for c in chunks], first]).astype(np.int64)
    counts = np.concatenate([[len(c.ids) for c in chunks], np.full(rows, width)]).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
    positions = within + np.repeat(firsts, counts)
    write = positions + np.repeat(bases, counts)
    keys = firsts + counts
    write[np.repeat(bases == 0, counts)] = 0
    shape = Shape(int(ends[-1]), len(counts), int(counts.max()), int(keys.max()), rows * width)
    return np.concatenate([positions, write, ends, bases, [0], keys]), shape
