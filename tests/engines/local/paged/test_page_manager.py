"""Extents of pages against a pretend memory, in which every page says what was written to it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.engines.local.paged.page_manager import PAGE, ExtentAllocator, PageManager

PAGES = 12


class PretendMemory:
    """Follows the copies, page by page, and knows what every row should hold."""

    def __init__(self, first):
        self.extents = ExtentAllocator(PAGES, first)
        self.first = first
        self.memory = [None] * (first + PAGES)
        self.rows = []
        self.written = 0

    def resize(self, wanted):
        for copy in self.extents.resize(wanted):
            moved = self.memory[copy.source : copy.source + copy.pages]
            self.memory[copy.target : copy.target + copy.pages] = moved
        self.rows = [
            (self.rows[i] if i < len(self.rows) else [])[:pages] for i, pages in enumerate(wanted)
        ]
        self.check()
        for row, extent in enumerate(self.extents.rows):
            for page in range(len(self.rows[row]), extent.pages):
                self.written += 1
                self.memory[extent.start + page] = self.written
                self.rows[row].append(self.written)
        self.check()

    def check(self):
        taken = [page for extent in self.extents.rows for page in range(extent.start, extent.end)]
        assert len(set(taken)) == len(taken), "a page belongs to two rows"
        assert all(self.first <= page < self.first + PAGES for page in taken)
        for row, extent in zip(self.rows, self.extents.rows, strict=True):
            assert self.memory[extent.start : extent.start + len(row)] == row, (
                "a row lost what it held"
            )


def wanted_pages():
    """Rows and their pages, never more than there are."""
    rows = st.lists(st.integers(0, 6), max_size=6)
    return rows.filter(lambda pages: sum(pages) <= PAGES)


@given(st.lists(wanted_pages(), max_size=12), st.integers(0, 2))
def test_rows_keep_what_they_hold(steps, first):
    """Guards: an extent moved over another, or copied in the wrong order; memory lost to gaps."""
    memory = PretendMemory(first)
    for wanted in steps:
        memory.resize(wanted)
        assert [extent.pages for extent in memory.extents.rows] == wanted


def test_rows_swap():
    memory = PretendMemory(1)
    memory.resize([2, 3, 1])
    memory.extents.swap(0, 2)
    memory.rows[0], memory.rows[2] = memory.rows[2], memory.rows[0]
    memory.resize([3, 3])
    assert [extent.pages for extent in memory.extents.rows] == [3, 3]


def test_growth_in_place_copies_nothing():
    extents = ExtentAllocator(PAGES)
    assert extents.resize([2]) == []
    assert extents.resize([5]) == []


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="13 pages are wanted, and there are 12"):
        ExtentAllocator(PAGES).resize([6, 7])


def test_there_is_room_until_a_row_outgrows_its_pages():
    """Guards: a round queued ahead that would move rows, or that keeps the pages of ended rows."""
    manager = PageManager((0,), 1, 3)
    manager.reserve(np.array([[PAGE - 3], [5]]), 1)
    assert manager.has_room(np.array([[PAGE - 1], [7]]), 1)
    assert not manager.has_room(np.array([[PAGE], [7]]), 1)
    assert not manager.has_room(np.array([[PAGE - 1]]), 1)
    assert not manager.has_room(np.array([[5], [5], [5]]), 1)
