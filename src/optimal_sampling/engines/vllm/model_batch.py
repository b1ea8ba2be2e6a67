"""Tokens of a step for each of the two models, where the prompts of a request differ.

vLLM plans for the longer prompt, of L tokens; the shorter has D fewer, aligned at the end: when
vLLM's plan is at position p, the model with the shorter prompt is at p - D, and it runs no token
where that is negative. Decoding, drafts, chunked prefill and recomputation after a preemption are
not special cases. Keys and values of the shorter prompt are in the request's own blocks, at its own
positions; every layer has its own memory there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.device import to_device

__all__ = ["ModelBatch", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """One request's part of a step: `scheduled` tokens of vLLM's plan, after `computed` ones."""

    scheduled: int
    computed: int
    prompt_length: int
    """Tokens of the prompt that vLLM plans for."""
    own_ids: Int[Tensor, " own"] | None = None
    """The model's own prompt, where it is not the one that vLLM plans for."""

    @property
    def offset(self) -> int:
        """Number of tokens that the model is behind vLLM's plan."""
        return 0 if self.own_ids is None else self.prompt_length - len(self.own_ids)

    @property
    def is_prefilling(self) -> bool:
        """Whether the first of the tokens that the model runs is one of its own prompt."""
        return self.begin < self.prompt_length - self.offset

    @property
    def begin(self) -> int:
        """Position of the first token that the model runs."""
        return max(0, self.computed - self.offset)

    @property
    def end(self) -> int:
        """Number of the model's tokens after the step. At most `begin` where it runs none."""
        return self.computed + self.scheduled - self.offset

    def prompt_ids(self) -> Int[Tensor, " own"] | None:
        """Tokens of the model's own prompt among those that it runs."""
        if self.own_ids is None or self.begin >= len(self.own_ids):
            return None
        return self.own_ids[self.begin : self.end]


@dataclass(frozen=True)
class ModelBatch:
    """Tokens of a step that one model runs, request after request."""

    input_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    places: Int[Tensor, " tokens"]
    """Indices of the tokens in vLLM's flat batch."""
    requests: list[int]
    """Indices of the requests with a token in this batch."""
    query_lengths: list[int]
    """Tokens of each of these requests in this batch."""
    lengths: list[int]
    """Tokens of each of these requests after the step."""
    is_prefilling: list[bool]
    """Whether the first token of each of these requests is one of its prompt."""
    owners: Int[Tensor, " tokens"]
    """Index into `requests` of every token."""

    @classmethod
    def from_spans(cls, spans: Sequence[Span], input_ids: Int[Tensor, " planned"]) -> ModelBatch:
        """The batch of one model. `input_ids`: tokens of vLLM's plan, request after request."""
        plan_ends = list(accumulate(span.scheduled for span in spans))
        requests = [index for index, span in enumerate(spans) if span.end > span.begin]
        active = [spans[index] for index in requests]
        counts = [span.end - span.begin for span in active]
        device = input_ids.device
        places = to_device(_ranges([plan_ends[index] for index in requests], counts), device)
        return cls(
            input_ids=_replace_prompts(input_ids[places], active, counts),
            positions=to_device(_ranges([span.end for span in active], counts), device),
            places=places,
            requests=requests,
            query_lengths=counts,
            lengths=[span.end for span in active],
            is_prefilling=[span.is_prefilling for span in active],
            owners=to_device(np.repeat(np.arange(len(counts)), counts), device),
        )


def _ranges(ends: Sequence[int], counts: Sequence[int]) -> Int[np.ndarray, " tokens"]:
    """The `count` integers before each end, one range after another."""
    empty = np.zeros(0, dtype=np.int64)
    ranges = [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return np.concatenate([empty, *ranges])


def _replace_prompts(
    ids: Int[Tensor, " tokens"], spans: Sequence[Span], counts: Sequence[int]
) -> Int[Tensor, " tokens"]:
    """`ids` with the model's own prompts in place of those that vLLM plans for."""
    start = 0
    for span, count in zip(spans, counts, strict=True):
        own = span.prompt_ids()
        if own is not None:
            ids[start : start + len(own)] = own.to(device=ids.device, dtype=ids.dtype)
        start += count
    return ids
