"""Split-KV attention in Triton's interpreter. `test_split_attention.py` runs it."""

from __future__ import annotations

import pytest
import torch

from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.paged.attention_backends import PagePlan, split_or
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape
from optimal_sampling.engines.local.paged.split_attention import split_attention, split_count
from tests.engines.local.paged.conftest import one_segment


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


def plan_of(counts, width_of_last, starts, used):
    """Plan of a pass with segments of these numbers of queries."""
    tokens = sum(counts)
    ends = torch.tensor([0, *counts]).cumsum(0)
    zeros = torch.zeros(tokens, dtype=torch.long)
    numbers = torch.cat([zeros, zeros, ends, starts.long(), torch.zeros(1).long(), used.long()])
    shape = BatchShape(tokens, len(counts), max(counts), int(used.max()), width_of_last)
    return PagePlan(None, Batch(shape, zeros, numbers), None)


def test_passes_with_few_queries_per_row_take_it_and_others_do_not():
    """Guards: a prompt chunk read as if every row had as many queries; a scale of None."""
    asked = []

    def flash(call, keys, values, plan):
        asked.append(plan)
        return call.query

    attend = split_or(flash)
    for width, heads in ((1, 4), (5, 4)):
        query, keys, values, starts, used = case(width, heads, 2, 16, [9, 70])
        plan = plan_of([width, width], 2 * width, starts, used)
        call = AttentionCall(0, query.transpose(0, 1), None, 30, None, None)
        expected = reference(query, keys, values, starts, used, 16**-0.5, 30)
        found = attend(call, keys, values, plan)
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)
    assert not asked
    chunk = plan_of([7, 3], 3, starts, used)
    attend(call, keys, values, chunk)
    call = AttentionCall(0, torch.zeros(64, 10, 16), None, None, None, None)
    attend(call, keys[:, :1], values, plan_of([5, 5], 10, starts, used))  # 320 queries per KV head
    assert len(asked) == 2
