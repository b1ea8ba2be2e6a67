"""Which pages of one memory every row holds. Plain Python; knows nothing of tensors.

A row holds one *run* of neighbouring pages. So a kernel needs only where the run starts: PyTorch's own Flash Attention
takes that, and no table of scattered pages. The price is that a run may have to move when it grows, which copies it;
with pages of 256 tokens that is seldom, and memory is compacted where no gap is wide enough, so whatever adds up to
less than the memory fits.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Copy", "Run", "Runs"]


@dataclass(slots=True)
class Run:
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


class Runs:
    """The runs of rows 0, 1, ... in pages `first` to `first + pages - 1`."""

    def __init__(self, pages: int, first: int = 0) -> None:
        self.pages = pages
        self.first = first
        self.rows: list[Run] = []

    def resize(self, wanted: list[int]) -> list[Copy]:
        """Give row i `wanted[i]` pages and free the rows beyond. Returns the copies to make, one after the other.

        Raises ValueError where the pages wanted are more than there are.
        """
        if sum(wanted) > self.pages:
            raise ValueError(f"{sum(wanted)} pages are wanted, and there are {self.pages}")
        for run, pages in zip(self.rows, wanted, strict=False):
            run.pages = min(run.pages, pages)
        del self.rows[len(wanted) :]
        self.rows += [Run(self.first, 0) for _ in range(len(wanted) - len(self.rows))]
        copies: list[Copy] = []
        for row, pages in enumerate(wanted):
            if pages > self.rows[row].pages:
                copies += self._grow(row, pages)
        return copies

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows' runs."""
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    def _grow(self, row: int, pages: int) -> list[Copy]:
        """In place where the pages behind the run are free, else in the first gap, else after closing all gaps."""
        run = self.rows[row]
        gaps = self._gaps()
        if run.pages and any(
            gap.start == run.end and gap.pages >= pages - run.pages for gap in gaps
        ):
            run.pages = pages
            return []
        for gap in gaps:
            if gap.pages >= pages:
                moved = [Copy(run.start, gap.start, run.pages)] if run.pages else []
                self.rows[row] = Run(gap.start, pages)
                return moved
        return self._compact(row, pages)

    def _gaps(self) -> list[Run]:
        """Free pages, in order."""
        gaps, place = [], self.first
        for run in sorted((r for r in self.rows if r.pages), key=lambda r: r.start):
            if run.start > place:
                gaps.append(Run(place, run.start - place))
            place = run.end
        if place < self.first + self.pages:
            gaps.append(Run(place, self.first + self.pages - place))
        return gaps

    def _compact(self, row: int, pages: int) -> list[Copy]:
        """Push all runs to the front, then those behind `row` back by what it lacks."""
        copies, place = [], self.first
        for run in sorted((r for r in self.rows if r.pages), key=lambda r: r.start):
            if run.start != place:
                copies.append(Copy(run.start, place, run.pages))
                run.start = place
            place = run.end
        growing = self.rows[row]
        if not growing.pages:
            growing.start = place
        return copies + self._push_back(growing, pages)

    def _push_back(self, growing: Run, pages: int) -> list[Copy]:
        """The runs behind `growing` make room for it to have `pages`, the last of them first."""
        extra, copies = pages - growing.pages, []
        behind = [r for r in self.rows if r.pages and r is not growing and r.start >= growing.end]
        for run in sorted(behind, key=lambda r: -r.start):
            copies.append(Copy(run.start, run.start + extra, run.pages))
            run.start += extra
        growing.pages = pages
        return copies
