"""Which tokens of a step each of the two models sees, where the prompts of a request differ.

vLLM plans for the longer prompt, of L tokens; the shorter has D fewer. Its tokens are aligned at the end: when vLLM's
plan is at position p, the model with the shorter prompt is at p - D, and where that is negative it has nothing to do.
So decoding, drafts, chunks of a prompt and a start from scratch after a preemption need no case of their own. Its keys
and values lie in the request's own blocks, at its own positions: every layer has its own memory there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Lane", "Span", "lane_of"]


@dataclass(frozen=True, slots=True)
class Span:
    """One request's share of a step: `scheduled` tokens of vLLM's plan, after `computed` ones."""

    scheduled: int
    computed: int
    prompt_length: int
    """Of the prompt that vLLM plans for."""
    own_ids: Int[Tensor, " own"] | None = None
    """The prompt of the model that this lane is for, where it is not that one."""

    @property
    def shift(self) -> int:
        """How many tokens this model is behind vLLM's plan."""
        return 0 if self.own_ids is None else self.prompt_length - len(self.own_ids)


@dataclass(frozen=True)
class Lane:
    """What one model sees of a step. `rows`: the places of its tokens in vLLM's flat batch."""

    input_ids: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    rows: Int[Tensor, " tokens"]
    requests: list[int]
    """Requests that have a token here."""
    query_lengths: list[int]
    lengths: list[int]
    """Tokens of each of these requests after the step."""
    owner: Int[Tensor, " tokens"]
    """Index into `requests` of every token."""


def lane_of(spans: Sequence[Span], input_ids: Int[Tensor, " tokens"]) -> Lane:
    """The tokens of one model; `input_ids` are those of vLLM's plan, request after request."""
    device = input_ids.device
    starts = np.cumsum([0, *(span.scheduled for span in spans)])
    rows, positions, requests, counts, lengths = [], [], [], [], []
    replaced: list[tuple[int, Tensor]] = []
    taken = 0
    for index, span in enumerate(spans):
        end = span.computed + span.scheduled - span.shift
        begin = max(0, span.computed - span.shift)
        count = end - begin
        if count <= 0:
            continue
        rows.append(np.arange(starts[index + 1] - count, starts[index + 1]))
        positions.append(np.arange(begin, end))
        if span.own_ids is not None and begin < len(span.own_ids):
            replaced.append((taken, span.own_ids[begin:end]))
        requests.append(index)
        counts.append(count)
        lengths.append(end)
        taken += count
    where = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)).to(
        device
    )
    ids = input_ids[where]
    for place, own in replaced:
        ids[place : place + len(own)] = own.to(device=device, dtype=ids.dtype)
    flat = np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)
    owner = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device)
    return Lane(ids, torch.from_numpy(flat).to(device), where, requests, counts, lengths, owner)
