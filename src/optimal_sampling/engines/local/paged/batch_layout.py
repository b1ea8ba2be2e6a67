"""One ragged forward pass as integers: where each token is stored, and which keys it sees.

The flat tokens are prompt chunks, then `width` tokens of every row. Each chunk and each row is a
*segment*: consecutive queries that see the keys of their row up to and including their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.local.paged.page_manager import PageManager
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["Batch", "BatchShape", "lay_out"]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a recorded forward pass is fixed to; all other numbers may change between replays."""

    tokens: int
    segments: int
    max_queries: int
    max_keys: int
    outputs: int
    """Tokens at the end whose logits are wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Inputs of one forward pass. All integers but the ids are one tensor, for one copy."""

    shape: BatchShape
    ids: Int[Tensor, " tokens"]
    numbers: Int[Tensor, " numbers"]

    def _part(self, first: int, count: int) -> Int[Tensor, " count"]:
        return self.numbers[first : first + count]

    @property
    def positions(self) -> Int[Tensor, " tokens"]:
        """Positions of the tokens in their texts."""
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
        """Index of each segment's first key in the cache; the last number is unused."""
        return self._part(2 * self.shape.tokens + self.shape.segments + 1, self.shape.segments + 1)

    @property
    def keys_used(self) -> Int[Tensor, " segments"]:
        """Number of keys that each segment's last query sees."""
        return self._part(2 * self.shape.tokens + 2 * self.shape.segments + 2, self.shape.segments)


def lay_out(
    memory: PageManager,
    start: Int[np.ndarray, " rows"],
    width: int,
    idle: Sequence[int],
    chunks: Sequence[Chunk],
) -> tuple[Int[np.ndarray, " numbers"], BatchShape]:
    """`Batch.numbers` of these chunks and of `width` tokens per row from position `start` on.

    Idle rows read the scratch page, and write its first token.
    """
    rows = len(start)
    used = np.ones(rows, dtype=bool)
    used[list(idle)] = False
    base = [memory.start(row) if in_use else 0 for row, in_use in enumerate(used)]
    bases = np.array([*(memory.start(c.row) for c in chunks), *base], dtype=np.int64)
    firsts = np.array([*(c.start for c in chunks), *np.where(used, start, 0)], dtype=np.int64)
    counts = np.array([*(len(c.ids) for c in chunks), *[width] * rows], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
    positions = within + np.repeat(firsts, counts)
    write = positions + np.repeat(bases, counts)
    keys = firsts + counts
    write[np.repeat(bases == 0, counts)] = 0
    shape = BatchShape(
        tokens=int(ends[-1]),
        segments=len(counts),
        max_queries=int(counts.max()),
        max_keys=int(keys.max()),
        outputs=rows * width,
    )
    return np.concatenate([positions, write, ends, bases, [0], keys]), shape
