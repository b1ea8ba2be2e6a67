"""The attention backend over pages against attention in float64, as the engine calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.paged.attention_backends import Backend, PagePlan
from optimal_sampling.engines.local.paged.padding import bucket_for, pad_chunks, rounded_keys
from optimal_sampling.engines.local.paged.page_cache import Batch, PageCache, lay_out
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["CASES", "TINY_CASES", "Case", "Heads", "largest_error"]

ALLOWED = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest accepted error of a segment, relative: root mean squares. A key too few or too many of
10,000 is 1e-2."""


@dataclass(frozen=True)
class Heads:
    """A model's attention heads."""

    query: int
    key: int
    dim: int


@dataclass(frozen=True)
class Case:
    """One forward pass: rows that decode, and chunks of prompts."""

    name: str
    lengths: Sequence[int]
    """Tokens that each row has cached."""
    width: int = 1
    idle: Sequence[int] = ()
    chunks: Sequence[tuple[int, int, int]] = ()
    """(row, first token, tokens)"""
    window: int | None = None
    rounded: bool = False
    """Keys and chunks are rounded up, as for a recorded graph."""


RAGGED = tuple(1 + 97 * i for i in range(32))
CASES = (
    Case("32 ragged rows", RAGGED),
    Case("32 ragged rows, keys rounded up", RAGGED, rounded=True),
    Case("5 tokens a row", RAGGED, width=5),
    Case("idle rows", (700, 0, 2100, 1), idle=(1,)),
    Case("ragged chunks", (900, 0, 0, 40), idle=(1, 2), chunks=((1, 0, 300), (2, 512, 77))),
    Case(
        "ragged chunks, surplus tokens and empty segments",
        (900, 0, 0, 40),
        idle=(1, 2),
        chunks=((1, 0, 300), (2, 512, 77)),
        rounded=True,
    ),
    Case(
        "the same with windows and 5 tokens a row",
        (900, 0, 0, 40),
        width=5,
        idle=(1, 2),
        chunks=((1, 0, 300), (2, 512, 77)),
        window=256,
        rounded=True,
    ),
    Case("few long rows, so several splits", (8100, 5000), rounded=True),
    Case("few long rows, 5 tokens each", (8100, 5000), width=5),
    Case("windows", (900, 3000, 5), width=5, window=256),
)
TINY_CASES = (
    Case("ragged rows", (1, 300, 40), rounded=True),
    Case("5 tokens a row, one idle", (20, 0, 260), width=5, idle=(1,)),
    Case("ragged chunks", (9, 0), idle=(1,), chunks=((1, 3, 30),)),
    Case("chunks rounded up", (9, 0), idle=(1,), chunks=((1, 3, 30),), rounded=True),
    Case("windows", (90, 3), width=5, window=8),
)


def largest_error(
    backend: Backend, case: Case, heads: Heads, device: torch.device, dtype: torch.dtype
) -> float:
    """Largest error of a segment. Raises AssertionError where it is more than ALLOWED."""
    plan = _plan(backend, case, heads, device, dtype)
    tokens = plan.batch.shape.tokens
    query, key, value = (
        torch.randn(count, tokens, heads.dim, device=device).to(dtype)
        for count in (heads.query, heads.key, heads.key)
    )
    call = AttentionCall(0, query, heads.dim**-0.5, case.window, None, None)
    output = plan.attend(call, key, value)
    errors = _errors(output, call, plan)
    if not max(errors) <= ALLOWED[dtype]:
        raise AssertionError(
            f"{case.name}: segments differ from float64 by {errors} of their size; "
            f"allowed: {ALLOWED[dtype]}"
        )
    return max(errors)


def _plan(
    backend: Backend, case: Case, heads: Heads, device: torch.device, dtype: torch.dtype
) -> PagePlan:
    """The plan of the pass, over a memory that is full of random keys and values."""
    ends = [length + case.width for length in case.lengths]
    for row, first, count in case.chunks:
        ends[row] = first + count
    manager = PageManager((0,), 1, sum(-(-end // PAGE) for end in ends))
    cache = PageCache(manager, [])
    cache.make_room([[end] for end in ends], 0)
    every = torch.arange(cache.tokens, device=device)
    filling = torch.randn(2, cache.tokens, heads.key, heads.dim, device=device).to(dtype)
    cache.write(0, every, *filling)
    chunks = [Chunk(row, first, [0] * count) for row, first, count in case.chunks]
    numbers, shape = lay_out(manager, np.array(case.lengths), case.width, case.idle, chunks)
    bucket = bucket_for(chunks)
    if case.rounded and bucket is not None:
        numbers, shape = pad_chunks(numbers, shape, bucket)
        shape = replace(shape, max_keys=rounded_keys(shape.max_keys, shape.chunks))
    ids = torch.zeros(shape.tokens, dtype=torch.int64, device=device)
    return PagePlan(cache, Batch(shape, ids, to_device(numbers, device)), backend)


def _errors(output: Tensor, call: AttentionCall, plan: PagePlan) -> list[float]:
    """Of every segment whose row is not idle."""
    keys, values = plan.cache.layer(0)
    ends, starts, used = (
        part.tolist() for part in (plan.query_ends, plan.key_starts, plan.keys_used)
    )
    errors = []
    for i, count in enumerate(used):
        if starts[i] == 0:
            continue  # the scratch page
        queries = slice(ends[i], ends[i + 1])
        seen = slice(starts[i], starts[i] + count)
        wanted = _reference(call.query[:, queries], keys[seen], values[seen], call)
        difference = output[queries].double() - wanted
        errors.append(float(difference.square().mean().sqrt() / wanted.square().mean().sqrt()))
    return errors


def _reference(query: Tensor, keys: Tensor, values: Tensor, call: AttentionCall) -> Tensor:
    """Attention of a row's last queries in float64. [queries, heads, dim]"""
    repeats = query.shape[0] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(repeats, 1) for x in (keys, values))
    scores = torch.einsum("hqd,khd->hqk", query.double(), keys) * call.scaling
    place = torch.arange(len(keys), device=keys.device)
    own = place[len(keys) - query.shape[1] :, None]
    blocked = place > own
    if call.window is not None:
        blocked |= place <= own - call.window
    weights = scores.masked_fill(blocked, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)
