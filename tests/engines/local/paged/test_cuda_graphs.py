"""Which shapes are recorded, kept and given up, with a recorder that needs no GPU."""

import pytest
import torch

from optimal_sampling.engines.local.paged.cuda_graphs import RECORD_AT, RECORD_BESIDE, Graphs
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape


class Recorder:
    """Counts recordings; those whose number `fails` names raise as a recording on a GPU does."""

    def __init__(self, fails=()):
        self.recorded = 0
        self.fails = dict(fails)

    def __call__(self, forward):
        self.recorded += 1
        cause = self.fails.get(self.recorded)
        try:
            if cause is not None:
                raise cause
            forward()
        finally:
            if cause is not None:  # the end of a recording that has failed fails too
                raise RuntimeError("operation failed due to a previous error during capture\nmore")
        return forward


def batch(tokens, value=0):
    shape = BatchShape(tokens, tokens, 1, 512, tokens)
    return Batch(
        shape, torch.full((tokens,), value), torch.zeros(5 * tokens + 2, dtype=torch.int64)
    )


def doubled(given):
    return 2.0 * given.ids[:, None]


def run(graphs, tokens, times=1):
    for value in range(times):
        assert torch.equal(graphs(batch(tokens, value)), torch.full((tokens, 1), 2.0 * value))


def test_a_shape_that_comes_often_is_recorded_once():
    """Guards: a recording per call; results of the recording's own inputs."""
    recorder = Recorder()
    graphs = Graphs(doubled, recorder)
    run(graphs, 4, RECORD_AT - 1)
    assert recorder.recorded == 0
    assert not graphs.settled(batch(4).shape)
    run(graphs, 4, 5)
    assert recorder.recorded == 1
    assert graphs.settled(batch(4).shape)


def test_a_prepared_shape_is_recorded_before_it_comes():
    """Guards: recordings at start-up that the rounds do not use."""
    recorder = Recorder()
    graphs = Graphs(doubled, recorder)
    graphs.prepare(batch(4, 7))
    graphs.prepare(batch(4, 8))
    assert recorder.recorded == 1
    run(graphs, 4, 3)
    assert recorder.recorded == 1


def test_the_shape_used_least_recently_makes_way():
    """Guards: no recordings after the first so many shapes, for as long as the process lives."""
    recorder = Recorder()
    graphs = Graphs(doubled, recorder, most=2)
    for tokens in (1, 2):
        run(graphs, tokens, RECORD_AT)
    run(graphs, 1)
    run(graphs, 3, RECORD_AT)
    assert recorder.recorded == 3
    assert graphs.recordings.count == 2
    run(graphs, 1)
    run(graphs, 3)
    assert recorder.recorded == 3, "1 and 3 are still there"
    run(graphs, 2, RECORD_AT - 1)
    assert recorder.recorded == 3, "2 was dropped, and is counted anew"
    run(graphs, 2)
    assert recorder.recorded == 4


def test_out_of_memory_skips_one_shape():
    """Guards: one large shape that switches recording off for all others."""
    recorder = Recorder({1: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")})
    graphs = Graphs(doubled, recorder)
    run(graphs, 8, RECORD_AT + 2)
    run(graphs, 4, RECORD_AT + 2)
    assert recorder.recorded == 2
    assert graphs.recordings.count == 1
    assert graphs.recordings.skipped == 1
    assert str(graphs.recordings) == "1 shapes recorded, 1 not: out of memory"
    assert graphs.settled(batch(8).shape)


@pytest.mark.parametrize("message", ["operation not permitted: .item() waits\nmore", ""])
def test_the_first_error_is_named(message):
    """Guards: the error of ending a recording in place of what broke it."""
    graphs = Graphs(doubled, Recorder({1: ValueError(message)}))
    run(graphs, 4, RECORD_AT + 2)
    assert graphs.off == (message.partition("\n")[0] or "ValueError")
    assert graphs.settled(batch(5).shape)
    assert str(graphs.recordings) == f"off, because recording failed: {graphs.off}"


def shape(rows=4, keys=512, width=1, chunk_tokens=0, chunks=0):
    tokens = rows * width
    most = max(width, chunk_tokens)
    return BatchShape(tokens + chunk_tokens, rows + chunks, most, keys, tokens, chunks)


def test_a_larger_recorded_shape_stands_in_until_a_shape_is_worth_a_recording():
    """Guards: passes kernel by kernel whenever a batch grows smaller or texts longer."""
    graphs = Graphs(doubled, Recorder())
    assert graphs.stand_in(batch(4).shape) is None, "nothing is recorded"
    for tokens in (8, 6):
        graphs.prepare(batch(tokens))
    found = [graphs.stand_in(batch(4).shape) for _ in range(RECORD_BESIDE)]
    assert found == [batch(6).shape] * (RECORD_BESIDE - 1) + [None]
    run(graphs, 4)
    assert graphs.settled(batch(4).shape)
    assert graphs.stand_in(batch(4).shape) is None
    assert graphs.stand_in(batch(9).shape) is None, "all that are recorded are smaller"


def test_without_memory_for_a_recording_a_larger_one_stands_in_for_good():
    """Guards: a shape that runs kernel by kernel for the whole run."""
    graphs = Graphs(doubled, Recorder({2: torch.OutOfMemoryError("CUDA out of memory")}))
    graphs.prepare(batch(8))
    graphs.prepare(batch(4))
    found = {graphs.stand_in(batch(4).shape) for _ in range(2 * RECORD_BESIDE)}
    assert found == {batch(8).shape}


@pytest.mark.parametrize(
    ("larger", "holds"),
    [
        (shape(), True),
        (shape(rows=8), True),
        (shape(keys=1024), True),
        (shape(rows=3), False),
        (shape(keys=256), False),
        (shape(rows=8, width=2), False),
        (shape(chunk_tokens=128, chunks=8), False),
    ],
)
def test_what_a_shape_holds(larger, holds):
    """Guards: rows, keys, tokens or chunks that a graph has no room for, or misreads."""
    assert larger.holds(shape()) == holds
    mixed = shape(chunk_tokens=128, chunks=8)
    assert shape(rows=9, chunk_tokens=128, chunks=8).holds(mixed)
    assert not shape(chunk_tokens=256, chunks=8).holds(mixed)
    assert not shape(chunk_tokens=128, chunks=16).holds(mixed)
