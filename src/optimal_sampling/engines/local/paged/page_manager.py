"""Which pages of one cache every row holds. No tensors.

A row holds one *extent*: neighbouring pages. So an attention backend needs only the place where
the extent starts, which is all that PyTorch's own Flash Attention takes. An extent that grows may
have to move, which copies it; with pages of 256 tokens that is seldom. Where no gap is wide
enough the memory is compacted, so whatever adds up to less than the memory fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from optimal_sampling.engines.local.memory import BlockManager, Lengths

__all__ = ["PAGE", "SPARE", "Copy", "Extent", "ExtentAllocator", "PageManager"]

PAGE = 256
"""Tokens per page: the smallest that the flash-attn package takes."""
SPARE = 4
"""Pages to a multiple of which a row is rounded up while there are enough."""


@dataclass(slots=True)
class Extent:
    """Neighbouring pages: `start`, `start + 1`, ..."""

    start: int
    pages: int

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.start + self.pages


@dataclass(frozen=True, slots=True)
class Copy:
    """Pages `source`... are to be copied to `target`...; the two may overlap."""

    source: int
    target: int
    pages: int


class PageManager(BlockManager):
    """Extents of all rows in `pages` pages, and page 0, which is scratch."""

    def __init__(self, contexts: tuple[int, ...], bytes_per_token: int, pages: int) -> None:
        super().__init__(contexts, bytes_per_token)
        self.pages = pages
        self.allocator = ExtentAllocator(pages, first=1)

    @property
    def held(self) -> int:
        """Bytes of the pages that rows hold; the memory of all pages is there from the start."""
        return self._bytes(int(self.allocator.counts.sum()))

    def bytes_needed(self, lengths: Lengths, width: int) -> int:
        """Bytes of whole pages."""
        return self._bytes(int(self._pages(lengths, width).sum()))

    def fits(self, lengths: Lengths, width: int) -> bool:
        """Whether there are enough pages."""
        return bool(self._pages(lengths, width).sum() <= self.pages)

    def has_room(self, lengths: Lengths, width: int) -> bool:
        """Whether the rows are as many as there were, and the pages of each are enough."""
        needed = self.row_lengths(lengths, width)
        return len(needed) == len(self.allocator.rows) and bool((needed <= self.rooms).all())

    def reserve(self, lengths: Lengths, width: int) -> list[Copy]:
        """Resize all extents. Returns the copies to make, one after the other."""
        pages = self._pages(lengths, width)
        # without spare pages, rows of equal length would all move in the same round
        roomy = -(-pages // SPARE) * SPARE
        return self.allocator.resize(roomy if roomy.sum() <= self.pages else pages)

    def move(self, source: int, target: int) -> None:
        """Exchange the extents of two rows."""
        self.allocator.swap(source, target)

    @property
    def starts(self) -> Int[np.ndarray, " rows"]:
        """Index of each row's first token in a layer's memory."""
        return self.allocator.starts * PAGE

    @property
    def rooms(self) -> Int[np.ndarray, " rows"]:
        """Tokens that each row's pages hold."""
        return self.allocator.counts * PAGE

    def _pages(self, lengths: Lengths, width: int) -> Int[np.ndarray, " rows"]:
        return -(-self.row_lengths(lengths, width) // PAGE)

    def _bytes(self, pages: int) -> int:
        return pages * PAGE * self.bytes_per_token


class ExtentAllocator:
    """Extents of rows 0, 1, ... in pages `first` to `first + pages - 1`."""

    def __init__(self, pages: int, first: int = 0) -> None:
        self.pages = pages
        self.first = first
        self.rows: list[Extent] = []
        self._table: Int[np.ndarray, "starts_and_counts rows"] | None = None

    @property
    def starts(self) -> Int[np.ndarray, " rows"]:
        """First page of each row."""
        starts: Int[np.ndarray, " rows"] = self._extents()[0]
        return starts

    @property
    def counts(self) -> Int[np.ndarray, " rows"]:
        """Pages of each row."""
        counts: Int[np.ndarray, " rows"] = self._extents()[1]
        return counts

    def _extents(self) -> Int[np.ndarray, "starts_and_counts rows"]:
        """Made once per change of the rows: most rounds change none."""
        if self._table is None:
            pairs = [(extent.start, extent.pages) for extent in self.rows]
            self._table = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return self._table

    def resize(self, wanted: Int[np.ndarray, " rows"] | list[int]) -> list[Copy]:
        """Give row i `wanted[i]` pages and free the rows beyond.

        Returns the copies to make, one after the other. Raises ValueError where more pages are
        wanted than there are.
        """
        if np.array_equal(wanted, self.counts):
            return []
        wanted = np.asarray(wanted).tolist()
        if sum(wanted) > self.pages:
            raise ValueError(f"{sum(wanted)} pages are wanted, and there are {self.pages}")
        self._table = None
        for extent, pages in zip(self.rows, wanted, strict=False):
            extent.pages = min(extent.pages, pages)
        del self.rows[len(wanted) :]
        self.rows += [Extent(self.first, 0) for _ in range(len(wanted) - len(self.rows))]
        copies: list[Copy] = []
        for row, pages in enumerate(wanted):
            if pages > self.rows[row].pages:
                copies += self._grow(row, pages)
        return copies

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows' extents."""
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        self._table = None

    def _grow(self, row: int, pages: int) -> list[Copy]:
        """In place where the pages behind are free, else in the first gap, else by compaction."""
        extent, gaps = self.rows[row], self._gaps()
        more = pages - extent.pages
        if extent.pages and any(g.start == extent.end and g.pages >= more for g in gaps):
            extent.pages = pages
            return []
        for gap in gaps:
            if gap.pages >= pages:
                moved = [Copy(extent.start, gap.start, extent.pages)] if extent.pages else []
                self.rows[row] = Extent(gap.start, pages)
                return moved
        return self._compact(row, pages)

    def _occupied(self) -> list[Extent]:
        return sorted((e for e in self.rows if e.pages), key=lambda e: e.start)

    def _gaps(self) -> list[Extent]:
        """Free pages, in order."""
        gaps, place = [], self.first
        for extent in [*self._occupied(), Extent(self.first + self.pages, 0)]:
            if extent.start > place:
                gaps.append(Extent(place, extent.start - place))
            place = extent.end
        return gaps

    def _compact(self, row: int, pages: int) -> list[Copy]:
        """Push all extents to the front, then those behind `row` back by what it lacks."""
        copies, place = [], self.first
        for extent in self._occupied():
            if extent.start != place:
                copies.append(Copy(extent.start, place, extent.pages))
                extent.start = place
            place = extent.end
        growing = self.rows[row]
        if not growing.pages:
            growing.start = place
        return copies + self._push_back(growing, pages)

    def _push_back(self, growing: Extent, pages: int) -> list[Copy]:
        """The extents behind `growing` make room for it to have `pages`, the last of them first."""
        extra, copies = pages - growing.pages, []
        behind = [e for e in self._occupied() if e is not growing and e.start >= growing.end]
        for extent in reversed(behind):
            copies.append(Copy(extent.start, extent.start + extra, extent.pages))
            extent.start += extra
        growing.pages = pages
        return copies
