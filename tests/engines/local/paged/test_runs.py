"""Runs of pages against a pretend memory, in which every page says what was written to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.engines.local.paged.runs import Runs

PAGES = 12


class PretendMemory:
    """Follows the copies, page by page, and knows what every row should hold."""

    def __init__(self, first):
        self.runs = Runs(PAGES, first)
        self.first = first
        self.memory = [None] * (first + PAGES)
        self.rows = []
        self.written = 0

    def resize(self, wanted):
        for copy in self.runs.resize(wanted):
            moved = self.memory[copy.source : copy.source + copy.pages]
            self.memory[copy.target : copy.target + copy.pages] = moved
        self.rows = [
            (self.rows[i] if i < len(self.rows) else [])[:pages] for i, pages in enumerate(wanted)
        ]
        self.check()
        for row, run in enumerate(self.runs.rows):
            for page in range(len(self.rows[row]), run.pages):
                self.written += 1
                self.memory[run.start + page] = self.written
                self.rows[row].append(self.written)
        self.check()

    def check(self):
        taken = [page for run in self.runs.rows for page in range(run.start, run.end)]
        assert len(set(taken)) == len(taken), "a page belongs to two rows"
        assert all(self.first <= page < self.first + PAGES for page in taken)
        for row, run in zip(self.rows, self.runs.rows, strict=True):
            assert self.memory[run.start : run.start + len(row)] == row, "a row lost what it held"


def wanted_pages():
    """Rows and their pages, never more than there are."""
    rows = st.lists(st.integers(0, 6), max_size=6)
    return rows.filter(lambda pages: sum(pages) <= PAGES)


@given(st.lists(wanted_pages(), max_size=12), st.integers(0, 2))
def test_rows_keep_what_they_hold(steps, first):
    """Guards: a run moved over another, or copied in the wrong order; memory lost to gaps."""
    memory = PretendMemory(first)
    for wanted in steps:
        memory.resize(wanted)
        assert [run.pages for run in memory.runs.rows] == wanted


def test_rows_swap():
    memory = PretendMemory(1)
    memory.resize([2, 3, 1])
    memory.runs.swap(0, 2)
    memory.rows[0], memory.rows[2] = memory.rows[2], memory.rows[0]
    memory.resize([3, 3])
    assert [run.pages for run in memory.runs.rows] == [3, 3]


def test_growth_in_place_copies_nothing():
    runs = Runs(PAGES)
    assert runs.resize([2]) == []
    assert runs.resize([5]) == []


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="13 pages are wanted, and there are 12"):
        Runs(PAGES).resize([6, 7])
