"""Passes with prompt chunks padded to few shapes, so that each can be a recorded CUDA graph.

Tokens and number of the chunks are rounded up to a `Bucket`. The surplus tokens are one idle
segment: they see no key, and write the scratch page. Surplus segments behind it have no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from optimal_sampling.engines.local.paged.page_cache import BatchShape
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["BUCKETS", "NO_CHUNKS", "Bucket", "bucket_for", "pad_chunks", "rounded_keys"]


class Bucket(NamedTuple):
    """Tokens of all chunks, and segments that they are divided into."""

    tokens: int
    segments: int


NO_CHUNKS = Bucket(0, 0)
BUCKETS = (Bucket(128, 8), Bucket(256, 16), Bucket(512, 32), Bucket(1024, 32))
"""Passes over more tokens take a GPU as long as their launch takes the host.

An attention backend launches a thread block per segment, head and 128 tokens of the longest
segment that there might be, so segments cost something although they are empty.
"""
LEAST_KEYS = 512


def bucket_for(chunks: Sequence[Chunk]) -> Bucket | None:
    """The smallest that holds these chunks and a segment of surplus tokens; None: none does."""
    if not chunks:
        return NO_CHUNKS
    tokens = sum(len(chunk.ids) for chunk in chunks)
    return next((b for b in BUCKETS if b.tokens >= tokens and b.segments > len(chunks)), None)


def rounded_keys(keys: int, chunks: int = 0) -> int:
    """A power of two; every other one where there are chunks, as shapes are more then."""
    rounded, step = (4 * LEAST_KEYS, 4) if chunks else (LEAST_KEYS, 2)
    while rounded < keys:
        rounded *= step
    return rounded


def pad_chunks(
    numbers: Int[np.ndarray, " numbers"], shape: BatchShape, bucket: Bucket
) -> tuple[Int[np.ndarray, " padded"], BatchShape]:
    """`Batch.numbers` and their shape with the chunks padded to a bucket that holds them."""
    if bucket == NO_CHUNKS:
        return numbers, shape
    tokens, chunks = shape.tokens - shape.outputs, shape.chunks
    surplus = bucket.tokens - tokens
    segments = bucket.segments - chunks
    positions, write, ends, starts, keys = np.split(numbers, np.cumsum(shape.sizes)[:-1])
    padded = [
        np.insert(positions, tokens, np.zeros(surplus, np.int64)),
        np.insert(write, tokens, np.zeros(surplus, np.int64)),
        np.concatenate(
            [ends[: chunks + 1], np.full(segments, bucket.tokens), ends[chunks + 1 :] + surplus]
        ),
        np.insert(starts, chunks, np.zeros(segments, np.int64)),
        np.insert(keys, chunks, np.zeros(segments, np.int64)),
    ]
    made = replace(
        shape,
        tokens=shape.tokens + surplus,
        segments=shape.segments + segments,
        max_queries=max(bucket.tokens, shape.max_queries),
        chunks=bucket.segments,
    )
    return np.concatenate(padded), made
