"""Split-KV attention in Triton's interpreter. `test_split_attention.py` runs it."""

from __future__ import annotations

import pytest
import torch

from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.paged.attention_backends import PagePlan, split_or
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape
from optimal_sampling.engines.local.paged.split_attention import split_attention, split_count
from tests.engines.local.paged.conftest import fake_operator, one_segment


def reference(query, keys, values, starts, used, scale, window):
    """The same in float64, row by row."""
    width = len(query) // len(used)
    parts = []
    for row, (first, count) in enumerate(zip(starts.tolist(), used.tolist(), strict=True)):
        seen = slice(first, first + count)
        queries = query[row * width : (row + 1) * width]
        limits = (-1 if window is None else window - 1, 0)
        whole = (queries.double(), keys[seen].double(), values[seen].double())
        parts.append(one_segment(*whole, scale, limits))
    return torch.cat(parts)


def case(width, heads, kv_heads, dim, lengths):
    """Queries as attention gets them (a transposed view), and a memory with foreign rows in it."""
    generator = torch.Generator().manual_seed(width * 100 + dim)
    capacity = max(lengths) + 7
    memory = (len(lengths) * capacity + 3, kv_heads, dim)
    keys = torch.randn(memory, generator=generator)
    values = torch.randn(memory, generator=generator)
    query = torch.randn(heads, len(lengths) * width, dim, generator=generator).transpose(0, 1)
    starts = torch.arange(len(lengths)) * capacity + 3
    return query, keys, values, starts.int(), torch.tensor(lengths).int()


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "dim", "lengths"),
    [
        (1, 4, 1, 16, [1, 70, 200]),
        (1, 7, 7, 24, [64, 65]),
        (5, 8, 1, 32, [5, 6, 300]),
        (5, 14, 2, 16, [128, 17]),
        (17, 7, 1, 16, [17, 150]),
    ],
)
def test_equals_attention_in_float64(width, heads, kv_heads, dim, lengths, splits):
    """Guards: a mask off by one, a split without keys, padded heads, dimensions and splits."""
    arguments = case(width, heads, kv_heads, dim, lengths)
    for window in (None, 1, 40):
        found = split_attention(*arguments, dim**-0.5, window, splits)
        expected = reference(*arguments, dim**-0.5, window)
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


def test_foreign_keys_are_not_read():
    """Guards: NaN beyond a row's end, or in another row, that reaches a text through 0 * NaN."""
    query, keys, values, starts, used = case(5, 4, 2, 16, [5, 90])
    expected = reference(query, keys, values, starts, used, 0.25, None)
    own = torch.zeros(len(keys), dtype=torch.bool)
    for first, count in zip(starts.tolist(), used.tolist(), strict=True):
        own[first : first + count] = True
    keys[~own], values[~own] = torch.nan, torch.nan
    found = split_attention(query, keys, values, starts, used, 0.25, None, 4)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


def test_the_number_of_splits_fills_a_gpu_and_leaves_each_some_keys():
    """Guards: splits of fewer than 128 keys, or a thousand thread blocks where rows are many."""
    assert split_count(1, 2, 512) == 4
    assert split_count(32, 2, 2048) == 5
    assert split_count(256, 8, 1 << 15) == 1
    assert split_count(1, 1, 1 << 17) == 32


def plan_of(counts, chunks, starts, used):
    """Plan of a pass with segments of these numbers of queries, the first `chunks` of prompts."""
    tokens = sum(counts)
    ends = torch.tensor([0, *counts]).cumsum(0)
    zeros = torch.zeros(tokens, dtype=torch.long)
    numbers = torch.cat([zeros, zeros, ends, starts.long(), torch.zeros(1).long(), used.long()])
    rows = sum(counts[chunks:])
    shape = BatchShape(tokens, len(counts), max(counts), int(used.max()), rows, chunks)
    return PagePlan(None, Batch(shape, zeros, numbers), None)


class Watched:
    """Flash Attention that keeps what it is asked for."""

    def __init__(self):
        self.plans = []

    def __call__(self, call, keys, values, plan):
        self.plans.append(plan)
        left = -1 if call.window is None else call.window - 1
        return fake_operator(
            call.query.transpose(0, 1).contiguous(), keys, values, plan.query_ends,
            plan.key_starts, plan.batch.shape.max_queries, plan.batch.shape.max_keys, 0.0, False,
            False, scale=call.scaling, window_size_left=left, window_size_right=0,
            seqused_k=plan.keys_used,
        )[0]  # fmt: skip


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("width", [1, 5])
def test_rows_take_it_beside_chunks_too(width, window):
    """Guards: a prompt chunk read as if every row had as many queries; a scale of None; the keys
    of another segment, where chunks come before rows or a chunk is empty.
    """
    query, keys, values, starts, used = case(width, 4, 2, 16, [9, 70, 33, 40])
    whole = Watched()
    rows = Watched()
    for counts, chunks in (([width] * 4, 0), ([7, 0, width, width], 2), ([3] + [width] * 3, 1)):
        plan = plan_of(counts, chunks, starts, used)
        generator = torch.Generator().manual_seed(chunks)
        query = torch.randn(4, sum(counts), 16, generator=generator)
        call = AttentionCall(0, query, None, window, None, None)
        expected = whole(call, keys, values, plan)
        found = split_or(rows)(call, keys, values, plan)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    assert [plan.batch.shape.tokens for plan in rows.plans] == [7, 3], "the chunks alone"


def test_rows_with_too_many_queries_do_not_take_it():
    """Guards: more query heads of one KV head than a thread block holds."""
    _, keys, values, starts, used = case(5, 4, 2, 16, [9, 70])
    for counts, chunks in (([5, 5], 0), ([4, 5], 1)):
        flash = Watched()
        query = torch.randn(64, sum(counts), 16)
        call = AttentionCall(0, query, None, None, None, None)
        plan = plan_of(counts, chunks, starts, used)
        found = split_or(flash)(call, keys[:, :1], values[:, :1], plan)
        torch.testing.assert_close(found, Watched()(call, keys[:, :1], values[:, :1], plan))
        assert len(flash.plans) == 1 + chunks
