"""Keys and values of one model in pages of one memory that never moves, and passes over it.

A row holds its token p at `manager.start(row) + p`. The first page is scratch: what idle rows
compute is written there, and only idle rows read it. As the memory stays where it is, CUDA graphs
that were recorded over it stay valid.

The flat tokens of a forward pass are prompt chunks, then `width` tokens of every row. Each chunk
and each row is a *segment*: consecutive queries that see the keys of their row up to and including
their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.memory import Lengths
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.runner import FlatCache
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["Batch", "BatchShape", "PageCache", "lay_out"]


class PageCache(FlatCache):
    """Memory of `pages` pages and one of scratch. `pool`: where it goes when it is released."""

    def __init__(self, manager: PageManager, pool: list[PageCache]) -> None:
        super().__init__()
        self.manager: PageManager = manager
        self.pages = manager.pages
        self._pool = pool

    @property
    def tokens(self) -> int:
        """All pages, and the scratch page."""
        return (self.pages + 1) * PAGE

    def make_room(self, lengths: Lengths, width: int) -> None:
        """Make the manager's copies."""
        for copy in self.manager.reserve(lengths, width):
            source = slice(copy.source * PAGE, (copy.source + copy.pages) * PAGE)
            target = slice(copy.target * PAGE, (copy.target + copy.pages) * PAGE)
            for memory in self.memories():
                memory[target] = memory[source].clone()  # they may overlap

    def layer(
        self, layer: int
    ) -> tuple[Float[Tensor, "all heads key_dim"], Float[Tensor, "all heads value_dim"]]:
        """Keys and values of all pages of a layer."""
        return self._keys[layer], self._values[layer]

    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` takes over the extent of `source`; nothing is copied."""
        self.manager.move(source, target)

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a row's pages."""
        extent = self.manager.allocator.rows[row]
        for memory in self.memories():
            memory[extent.start * PAGE : extent.end * PAGE] = 0

    def release(self) -> None:
        """Free all rows. The memory is kept for the next run."""
        self.manager.allocator.resize([])
        self._pool.append(self)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a recorded forward pass is fixed to; all other numbers may change between replays."""

    tokens: int
    segments: int
    max_queries: int
    max_keys: int
    outputs: int
    """Tokens at the end whose logits are wanted: those of the rows."""
    chunks: int = 0
    """Segments of prompt chunks, which come before the rows."""

    @property
    def sizes(self) -> list[int]:
        """Of the parts of `Batch.numbers`."""
        tokens, segments = self.tokens, self.segments
        return [tokens, tokens, segments + 1, segments + 1, segments]

    @property
    def rows(self) -> int:
        """Segments that decode."""
        return self.segments - self.chunks

    @property
    def width(self) -> int:
        """Tokens of each row."""
        return self.outputs // self.rows

    def holds(self, other: BatchShape) -> bool:
        """Whether the other one is this with idle rows left out, and fewer keys."""
        rows, fewer = self.segments - self.chunks, other.segments - other.chunks
        return (
            rows >= fewer
            and self.max_keys >= other.max_keys
            and self.max_queries == other.max_queries
            and self.chunks == other.chunks
            and self.tokens - self.outputs == other.tokens - other.outputs
            and self.outputs * fewer == other.outputs * rows
        )

    def parts(self) -> tuple[BatchShape, BatchShape]:
        """The chunks alone, and the rows alone."""
        tokens = self.tokens - self.outputs
        first = replace(self, tokens=tokens, segments=self.chunks, outputs=tokens)
        return first, BatchShape(self.outputs, self.rows, self.width, self.max_keys, self.outputs)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Inputs of one forward pass as integers. All but the ids are one tensor, for one copy."""

    shape: BatchShape
    ids: Int[Tensor, " tokens"]
    numbers: Int[Tensor, " numbers"]

    def split(self) -> tuple[Int[Tensor, " count"], ...]:
        """Parts of `numbers`, in order.

        Positions of the tokens in their texts; indices of the cache at which they are stored;
        cumulative numbers of queries per segment, from 0; indices of each segment's first key, and
        a number that is unused; numbers of keys that each segment's last query sees.
        """
        parts: tuple[Tensor, ...] = self.numbers.split(self.shape.sizes)  # type: ignore[no-untyped-call]
        return parts

    def set_back(self, behind: Int[Tensor, " rows"]) -> None:
        """Let the first rows start so many tokens earlier. Only of a batch without chunks."""
        tokens, segments = self.shape.tokens, self.shape.segments
        places = self.numbers[: 2 * tokens].view(2, segments, -1)  # in the text, in the cache
        places[:, : len(behind)] -= behind[:, None]
        keys_used = self.numbers[-segments:]
        keys_used[: len(behind)] -= behind

    def parts(self) -> tuple[Batch, Batch]:
        """The chunks alone, and the rows alone."""
        before, after = self.shape.parts()
        tokens, chunks = before.tokens, before.segments
        positions, write, ends, starts, keys = self.split()
        shared = slice(chunks + 1)  # the last chunk's end is the first row's start
        first = [positions[:tokens], write[:tokens], ends[shared], starts[shared], keys[:chunks]]
        rest = [positions[tokens:], write[tokens:], ends[chunks:] - tokens, starts[chunks:]]
        return (
            Batch(before, self.ids[:tokens], torch.cat(first)),
            Batch(after, self.ids[tokens:], torch.cat([*rest, keys[chunks:]])),
        )


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
    bases, firsts = np.zeros_like(start), start.copy()
    held = memory.starts[: len(start)]
    bases[: len(held)] = held
    if len(idle):
        scratch = list(idle)
        bases[scratch] = firsts[scratch] = 0
    positions = (firsts[:, None] + np.arange(width)).ravel()
    origins = np.repeat(bases, width)
    write = (positions + origins) * (origins > 0)
    counts, most = [width] * len(start), width
    if chunks:
        read = [np.arange(c.start, c.start + len(c.ids)) for c in chunks]
        places = [held[c.row] + part for c, part in zip(chunks, read, strict=True)]
        positions, write = np.concatenate([*read, positions]), np.concatenate([*places, write])
        bases = np.concatenate([held[[c.row for c in chunks]], bases])
        firsts = np.concatenate([[c.start for c in chunks], firsts])
        counts = [len(c.ids) for c in chunks] + counts
        most = max(counts)
    ends = np.cumsum([0, *counts])
    keys = firsts + counts
    shape = BatchShape(
        tokens=len(positions),
        segments=len(bases),
        max_queries=most,
        max_keys=int(keys.max()),
        outputs=len(start) * width,
        chunks=len(chunks),
    )
    return np.concatenate([positions, write, ends, bases, [0], keys]), shape
