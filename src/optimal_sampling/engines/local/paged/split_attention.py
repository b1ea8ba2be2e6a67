"""Attention of a few queries per row over long keys, in Triton: split-KV with packed heads.

FlashAttention 2 gives one thread block to a query head and a row, so a verification of 5 tokens
reads a KV head's keys once per query head, and fills a fraction of the GPU. Here the query heads
that share a KV head are the rows of one matrix, and the keys of a row are split over several
thread blocks whose results are combined (Flash-Decoding, Dao et al. 2023). Imports Triton.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_QUERIES", "split_attention", "split_count"]

MOST_QUERIES = 128
"""Queries of one KV head and row (query heads of its group x width) that fit one thread block."""
KEYS_AT_ONCE = 64
BLOCKS_WANTED = 264
"""Thread blocks that fill a GPU of 132 multiprocessors twice."""
MOST_SPLITS = 32
LOG2_E = 1.4426950408889634


def split_count(rows: int, kv_heads: int, max_keys: int) -> int:
    """Thread blocks per row and KV head. A function of shapes, so that a CUDA graph can hold it."""
    wanted = -(-BLOCKS_WANTED // (rows * kv_heads))
    most = max(1, max_keys // (2 * KEYS_AT_ONCE))
    return min(wanted, most, MOST_SPLITS)


def warps_for(queries: int) -> int:
    """Enough that the outputs of all queries stay in registers."""
    return 4 if queries <= 32 else 8


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    used: Tensor,
    scale: float,
    window: int | None = None,
    splits: int = 1,
) -> Tensor:
    """Causal attention of the last queries of every row; all rows have as many.

    query: [rows * width, heads, dim]. keys and values: [all, kv_heads, dim]. starts: [rows], the
    index of each row's first key. used: [rows], keys that a row's last query sees. window: keys
    that a query sees, its own included; None: all. Returns [rows * width, heads, dim].
    """
    tokens, heads, dim = query.shape
    rows = used.shape[0]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    width = tokens // rows
    partial = query.new_empty(tokens, heads, splits, dim, dtype=torch.float32)
    weights = query.new_empty(2, tokens, heads, splits, dtype=torch.float32)
    padded_dim = max(16, triton.next_power_of_2(dim))
    queries = max(16, triton.next_power_of_2(group * width))
    _attend[rows, kv_heads, splits](
        query,
        keys,
        values,
        starts,
        used,
        partial,
        weights[0],
        weights[1],
        scale * LOG2_E,
        *query.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        WIDTH=width,
        GROUP=group,
        HEADS=heads,
        DIM=dim,
        PADDED_DIM=padded_dim,
        QUERIES=queries,
        KEYS=KEYS_AT_ONCE,
        SPLITS=splits,
        WINDOW=window or 0,
        num_warps=warps_for(queries),
        num_stages=3 if padded_dim <= 128 else 2,
    )
    return _combined(partial, weights, query.dtype)


def _combined(partial: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Outputs of all parts as one. partial: [tokens, heads, splits, dim]; weights: [2, ...]."""
    tokens, heads, splits, dim = partial.shape
    output = partial.new_empty(tokens, heads, dim, dtype=dtype)
    _combine[tokens, heads](
        partial,
        weights[0],
        weights[1],
        output,
        HEADS=heads,
        DIM=dim,
        PADDED_DIM=max(16, triton.next_power_of_2(dim)),
        SPLITS=splits,
        PADDED_SPLITS=triton.next_power_of_2(splits),
        num_warps=2,
    )
    return output


@triton.jit
def _attend(
    query,
    keys,
    values,
    starts,
    used,
    partial,
    tops,
    sums,
    scale,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One part of the keys of one row and KV head: unnormalised output, maximum and sum."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(used + row).to(tl.int32)
    first = tl.load(starts + row).to(tl.int64)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(0, length - WIDTH - WINDOW + 1)
    share = tl.cdiv(tl.cdiv(length - lowest, SPLITS), KEYS) * KEYS
    begin = lowest + split * share
    end = tl.minimum(begin + share, length)

    m = tl.arange(0, QUERIES)
    column = tl.arange(0, PADDED_DIM)
    head = kv_head * GROUP + m // WIDTH
    token = row * WIDTH + m % WIDTH
    position = length - WIDTH + m % WIDTH
    real = m < GROUP * WIDTH
    in_dim = column < DIM
    query_at = token * query_token + head * query_head
    q = tl.load(
        query + query_at[:, None] + column[None], mask=real[:, None] & in_dim[None], other=0.0
    )

    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    output = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    for start in range(begin, end, KEYS):
        index = start + tl.arange(0, KEYS)
        exists = index < end
        at = first + index
        loaded = exists[:, None] & in_dim[None]
        key_at = at * key_token + kv_head * key_head
        k = tl.load(keys + key_at[:, None] + column[None], mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        visible = exists[None] & (index[None] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (index[None] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf is NaN
        p = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        value_at = at * value_token + kv_head * value_head
        v = tl.load(values + value_at[:, None] + column[None], mask=loaded, other=0.0)
        total = total * shrink + tl.sum(p, 1)
        output = output * shrink[:, None] + tl.dot(p.to(v.dtype), v)
        top = highest

    part = (token * HEADS + head) * SPLITS + split
    tl.store(tops + part, top, mask=real)
    tl.store(sums + part, total, mask=real)
    tl.store(
        partial + part[:, None] * DIM + column[None], output, mask=real[:, None] & in_dim[None]
    )


@triton.jit
def _combine(
    partial,
    tops,
    sums,
    output,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """One query of one head: the parts, weighted by their share of the softmax."""
    at = tl.program_id(0) * HEADS + tl.program_id(1)
    split = tl.arange(0, PADDED_SPLITS)
    column = tl.arange(0, PADDED_DIM)
    exists = split < SPLITS
    in_dim = column < DIM
    part = at * SPLITS + split
    top = tl.load(tops + part, mask=exists, other=-float("inf"))
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(tl.load(sums + part, mask=exists, other=0.0) * share, 0)
    parts = tl.load(
        partial + part[:, None] * DIM + column[None],
        mask=exists[:, None] & in_dim[None],
        other=0.0,
    )
    mixed = tl.sum(parts * share[:, None], 0) / total
    tl.store(output + at * DIM + column, mixed.to(output.dtype.element_ty), mask=in_dim)
