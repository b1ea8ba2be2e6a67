"""Attention of a few queries per row over long keys, in Triton: split-KV with packed heads.

FlashAttention 2 gives one thread block to a query head and a row, so a verification of 5 tokens
reads a KV head's keys once per query head, and fills a fraction of the GPU. Here the query heads
that share a KV head are the rows of one matrix, and the keys of a row are split over several
thread blocks whose results are combined (Flash-Decoding, Dao et al. 2023). Imports Triton.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

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


class Inputs(NamedTuple):
    """What is read. (A tuple in Triton has a `values` of its own.)"""

    query: object
    key: object
    value: object
    starts: object
    used: object


class Parts(NamedTuple):
    """What is written of every part of the keys."""

    output: object
    """Not normalised."""
    top: object
    """The largest score."""
    total: object
    """The sum of the weights relative to it."""


class Strides(NamedTuple):
    """From one token to the next, and from one head to the next."""

    query_token: object
    query_head: object
    key_token: object
    key_head: object
    value_token: object
    value_head: object


def split_count(rows: int, kv_heads: int, max_keys: int) -> int:
    """Thread blocks per row and KV head. A function of shapes, so that a CUDA graph can hold it."""
    wanted = -(-BLOCKS_WANTED // (rows * kv_heads))
    most = max(1, max_keys // (2 * KEYS_AT_ONCE))
    return min(wanted, most, MOST_SPLITS)


def warps_for(queries: int) -> int:
    """Enough that the outputs of all queries stay in registers."""
    return 4 if queries <= 32 else 8


def stages_for(dim: int) -> int:
    """Blocks of keys and values that are loaded ahead: as many as shared memory holds."""
    return 3 if dim <= 128 else 2


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
        Inputs(query, keys, values, starts, used),
        Parts(partial, weights[0], weights[1]),
        scale * LOG2_E,
        Strides(*query.stride()[:2], *keys.stride()[:2], *values.stride()[:2]),
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
        num_stages=stages_for(padded_dim),
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
    inputs,
    parts,
    scale,
    strides,
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
    """One part of the keys of one row and KV head."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(inputs.used + row).to(tl.int32)
    first = tl.load(inputs.starts + row).to(tl.int64)
    begin, end = _keys_of_part(length, split, WIDTH, KEYS, SPLITS, WINDOW)

    m = tl.arange(0, QUERIES)
    column = tl.arange(0, PADDED_DIM)
    head = kv_head * GROUP + m // WIDTH
    token = row * WIDTH + m % WIDTH
    position = length - WIDTH + m % WIDTH
    real = m < GROUP * WIDTH
    q = _vectors(
        inputs.query, token * strides.query_token + head * strides.query_head, column, real, DIM
    )

    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    output = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    for start in range(begin, end, KEYS):
        index = start + tl.arange(0, KEYS)
        exists = index < end
        at = first + index
        key_at = at * strides.key_token + kv_head * strides.key_head
        k = _vectors(inputs.key, key_at, column, exists, DIM)
        scores = tl.dot(q, tl.trans(k)) * scale
        p, shrink, top = _weights(scores, _visible(index, exists, position, WINDOW), top)
        value_at = at * strides.value_token + kv_head * strides.value_head
        v = _vectors(inputs.value, value_at, column, exists, DIM)
        total = total * shrink + tl.sum(p, 1)
        output = output * shrink[:, None] + tl.dot(p.to(v.dtype), v)

    part = (token * HEADS + head) * SPLITS + split
    tl.store(parts.top + part, top, mask=real)
    tl.store(parts.total + part, total, mask=real)
    mask = real[:, None] & (column < DIM)[None]
    tl.store(parts.output + part[:, None] * DIM + column[None], output, mask=mask)


@triton.jit
def _keys_of_part(
    length,
    split,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The first key that a part reads, and the one after its last."""
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(0, length - WIDTH - WINDOW + 1)
    share = tl.cdiv(tl.cdiv(length - lowest, SPLITS), KEYS) * KEYS
    begin = lowest + split * share
    return begin, tl.minimum(begin + share, length)


@triton.jit
def _vectors(source, at, column, exists, DIM: tl.constexpr):
    """Vectors that begin at these places, padded with zeros; zeros where none exists."""
    mask = exists[:, None] & (column < DIM)[None]
    return tl.load(source + at[:, None] + column[None], mask=mask, other=0.0)


@triton.jit
def _visible(index, exists, position, WINDOW: tl.constexpr):
    """Which keys each query sees."""
    visible = exists[None] & (index[None] <= position[:, None])
    if WINDOW > 0:
        visible = visible & (index[None] > position[:, None] - WINDOW)
    return visible


@triton.jit
def _weights(scores, visible, top):
    """Weights relative to the largest score, the factor of those before, and that score."""
    scores = tl.where(visible, scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf is NaN
    p = tl.exp2(scores - finite[:, None])
    return p, tl.exp2(top - finite), highest


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
