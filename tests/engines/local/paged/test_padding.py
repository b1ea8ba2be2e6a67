"""Passes with prompt chunks, padded to few shapes: the same logits, and few recordings."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from optimal_sampling.bench.host import HostEngine
from optimal_sampling.bench.subcommands import HostOptions
from optimal_sampling.engines.local.paged.cuda_graphs import RECORD_AT
from optimal_sampling.engines.local.paged.padding import (
    BUCKETS,
    NO_CHUNKS,
    bucket_for,
    pad_chunks,
    rounded_keys,
)
from optimal_sampling.engines.local.paged.page_cache import lay_out
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.local.conftest import engine_of, tiny_model, vocabulary
from tests.engines.local.paged.conftest import FakeRecorder
from tests.engines.local.paged.test_paged_engine import paged_engine


def ids_of(count, seed=0):
    return torch.randint(12, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def chunk(row, start, count):
    return Chunk(row, start, ids_of(count, row))


CASES = {
    "ragged": [chunk(0, 0, 40), chunk(2, 0, 3), chunk(5, 0, 1)],
    "a bucket filled to the last token": [chunk(0, 0, 100), chunk(2, 0, 28)],
    "as many chunks as a bucket has beside the surplus": [chunk(i, 0, 2 + i) for i in range(7)],
    "so many that the next bucket is taken": [chunk(i, 0, 2 + i) for i in range(8)],
    "more than 256 tokens": [chunk(3, 0, 250), chunk(1, 0, 90)],
    "in the middle of texts": [chunk(4, 0, 9), chunk(6, 11, 30)],
}


def passes(runner, chunks, width, recorded):
    """Logits of one pass with chunks, as often as it takes to record it, and of one after it."""
    runner.new_recorder = FakeRecorder if recorded else None
    runner.drop_caches()
    cache = runner.open_cache((0,), 40 * PAGE, 8)
    cache.make_room(np.full((8, 1), 300), width)
    begin = torch.tensor([ids_of(12, seed) for seed in range(8)])
    runner.forward(cache, begin, np.zeros(8, np.int64))
    reading = sorted({c.row for c in chunks})
    start = np.full(8, 12)
    tokens = torch.tensor([ids_of(width, 20 + seed) for seed in range(8)])
    busy = [row for row in range(8) if row not in reading]
    found = [
        runner.forward(cache, tokens, start, reading, chunks).logits[busy]
        for _ in range(RECORD_AT + 2)
    ]
    for c in chunks:
        start[c.row] = c.start + len(c.ids)
    found.append(runner.forward(cache, tokens, start).logits)
    graphs = runner.graphs.get(cache)
    cache.release()
    return found, graphs


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_padded_chunks_give_the_same_logits(name, width, flash_on_cpu):
    """Guards: surplus tokens that reach a text or its pages; a segment's end that is off by the
    surplus; rows that read the keys of a chunk; replays that differ from what was recorded.
    """
    runner = engine_of(tiny_model(1), tiny_model(2), fused_layers=False).pair.runners["teacher"]
    runner.longest = 3000
    expected, _ = passes(runner, CASES[name], width, recorded=False)
    found, graphs = passes(runner, CASES[name], width, recorded=True)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=2e-5)  # other shapes of products
    assert all(torch.equal(found[0], ours) for ours in found[1:-1])
    assert [shape.chunks > 0 for shape in graphs._recorded] == [True]


@pytest.mark.parametrize("kind", ["Qwen3", "Mistral"])
def test_padded_chunks_in_fused_layers(kind, flash_on_cpu):
    """Guards: surplus tokens in programs of fused layers, and in windows of attention."""
    changes = {"sliding_window": 20} if kind == "Mistral" else {}
    models = [tiny_model(seed, kind=kind, **changes) for seed in (1, 2)]
    runner = engine_of(*models).pair.runners["teacher"]
    assert runner.decoder is not None
    runner.longest = 3000
    expected, _ = passes(runner, CASES["ragged"], 5, recorded=False)
    found, _ = passes(runner, CASES["ragged"], 5, recorded=True)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_surplus_tokens_write_scratch_and_see_no_key():
    """Guards: tokens that are written to a row's pages; keys beyond the scratch page."""
    manager = PageManager((0,), 1, 20)
    manager.reserve(np.full((3, 1), 300), 0)
    chunks = [chunk(0, 4, 10), chunk(2, 0, 100)]
    numbers, shape = lay_out(manager, np.array([0, 7, 0]), 1, (0, 2), chunks)
    numbers, shape = pad_chunks(numbers, shape, bucket_for(chunks))
    assert (shape.tokens, shape.segments, shape.chunks, shape.outputs) == (131, 11, 8, 3)
    assert shape.max_queries == 128
    positions, write, ends, starts, keys = np.split(numbers, np.cumsum(shape.sizes)[:-1])
    assert positions[:110].tolist() == [*range(4, 14), *range(100)]
    assert positions[128:].tolist() == [0, 7, 0]
    assert (write[:110] >= PAGE).all()
    assert write[110:].tolist() == [0] * 19 + [manager.starts[1] + 7, 0]
    assert ends.tolist() == [0, 10, 110, *[128] * 6, 129, 130, 131]
    assert keys.tolist() == [14, 100, *[0] * 6, 1, 8, 1]
    assert (starts > 0).tolist() == [True, True, *[False] * 7, True, False, False]


def test_buckets_and_keys():
    """Guards: chunks that a bucket does not hold; a shape for every number of keys."""
    assert bucket_for([]) == NO_CHUNKS
    assert bucket_for([chunk(0, 0, 128)]) == BUCKETS[0]
    assert bucket_for([chunk(0, 0, 129)]) == BUCKETS[1]
    assert bucket_for([chunk(0, 0, 1024)]) == BUCKETS[-1]
    assert bucket_for([chunk(0, 0, 1025)]) is None
    assert bucket_for([chunk(i, 0, 1) for i in range(31)]) == BUCKETS[2]
    assert bucket_for([chunk(i, 0, 1) for i in range(32)]) is None
    assert [rounded_keys(keys) for keys in (1, 512, 513, 5000)] == [512, 512, 1024, 8192]
    assert [rounded_keys(keys, 8) for keys in (1, 2048, 2049)] == [2048, 2048, 8192]


def test_what_no_bucket_holds_runs_unrecorded(flash_on_cpu):
    """Guards: chunks cut off, or a recording for every number of tokens, beyond the buckets."""
    models = [tiny_model(seed, max_position_embeddings=3000) for seed in (1, 2)]
    options = {"vocab": vocabulary(context=3000), "draft_tokens": 0, "batch_size": 40}
    short = [Request(f"s{i}", 0, 0, (1, 2, 3), (4, 5), 3) for i in range(40)]
    long = [Request("l", 0, 0, tuple(ids_of(2500)), tuple(ids_of(2600, 1)), 3)]
    requests = [*short, *long]
    expected = by_key(paged_engine(*models, recorded=False, **options).generate(requests))
    engine = paged_engine(*models, prefill_chunk=4096, **options)
    done = by_key(engine.generate(requests))
    assert {k: c.token_ids for k, c in done.items()} == {
        k: c.token_ids for k, c in expected.items()
    }
    shapes = [s for r in engine.pair.runners.values() for g in r.graphs.values() for s in g._seen]
    assert not [shape for shape in shapes if shape.chunks], "40 chunks, then one of 2,500 tokens"


def test_chunks_whose_recording_is_out_of_memory_run_unrecorded(flash_on_cpu):
    """Guards: other shapes, or texts, lost with a recording that memory does not hold."""

    class Small(FakeRecorder):
        def __call__(self, forward):
            at = forward.__code__.co_freevars.index("inputs")
            if forward.__closure__[at].cell_contents.shape.chunks:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(forward)

    models = tiny_model(1), tiny_model(2)
    requests = [Request(str(i), i, 0, (1, 2), (3,), 2 + i % 7) for i in range(24)]
    options = {"draft_tokens": 0, "batch_size": 4}
    expected = by_key(paged_engine(*models, recorded=False, **options).generate(requests))
    engine = paged_engine(*models, **options)
    for runner in engine.pair.runners.values():
        runner.new_recorder = Small
    done = by_key(engine.generate(requests))
    assert {k: c.token_ids for k, c in done.items()} == {
        k: c.token_ids for k, c in expected.items()
    }
    recordings = engine.pair.recorded_graphs
    assert not recordings.off
    assert recordings.skipped > 0
    assert recordings.count > 0


def uneven(count, prompt, new):
    """Prompts and limits from an eighth of these to all of it, as `bench gpu` has them."""
    draw = random.Random(0)
    requests = []
    for i in range(count):
        ids = (1,) * draw.randint(prompt // 8, prompt)
        requests.append(Request(str(i), i, 0, ids, ids, draw.randint(new // 8, new)))
    return requests


@pytest.mark.parametrize(("drafts", "plain_most"), [(0, 7), (4, 8)])
def test_shapes_of_a_long_run_are_few(drafts, plain_most, monkeypatch):
    """Guards: a recording for every combination of chunks; rounds with prompts that are eager."""
    engine = HostEngine.of(32, drafts, HostOptions(prompt_tokens=128, new_tokens=200))
    beyond = Counter()
    forward = PageRunner.forward

    def counted(self, cache, tokens, start, idle=(), chunks=()):
        beyond[self, bool(chunks), bucket_for(chunks) is None] += 1
        return forward(self, cache, tokens, start, idle, chunks)

    monkeypatch.setattr(PageRunner, "forward", counted)
    assert len(list(engine.generate(uneven(256, 128, 200)))) == 256
    for runner in engine.pair.runners.values():
        [graphs] = runner.graphs.values()
        mixed = {shape: count for shape, count in graphs._seen.items() if shape.chunks}
        assert len(graphs._seen) - len(mixed) <= plain_most
        assert len(mixed) <= 3
        passes = beyond[runner, True, False] + beyond[runner, True, True]
        unrecorded = sum(mixed.values()) + beyond[runner, True, True]
        assert passes > 90
        assert unrecorded <= 7


def test_gathering_follows_what_is_recorded(flash_on_cpu):
    """Guards: rows that wait for others where rounds with prompts cost little more than others,
    and slow rounds for every text where nothing is recorded.
    """
    engine = paged_engine(tiny_model(1), tiny_model(2))
    runner = engine.pair.runners["teacher"]
    assert runner.gather == 1 / 16
    list(engine.generate([Request("a", 0, 0, (1,), (2,), 2)]))
    for graphs in runner.graphs.values():
        graphs.off = "a model that waits for the host"
    assert runner.gather == 1 / 8
    runner.new_recorder = None
    assert runner.gather == 0
