"""`ContextRows`: one model over rows of KV memory, each of which holds one context of tokens.

The hypotheses of a text share most of their tokens. A row keeps the latest context; for another
one, the tokens that both begin with stay, and only the others are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.engines.bytes.laws import LawReader
from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.runner import Cache, ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["ByteModel", "ContextRows", "PassCounts"]


@dataclass(slots=True)
class PassCounts:
    """What one model computed in a run."""

    passes: int = 0
    """Forward passes of all rows together."""
    contexts: int = 0
    """Contexts whose next token's law was computed."""
    tokens: int = 0
    """Tokens of completions that were read."""


@dataclass(slots=True, eq=False)
class _Row:
    prompt: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    """Of the completion."""
    held: int = 0
    """Tokens of prompt and context whose keys and values are in the cache."""
    long: bool = False


class ContextRows:
    """`index`: number of the model among those that share the memory. `chunk`: most tokens beside
    the last ones that one pass reads.
    """

    def __init__(
        self, runner: ModelRunner[Any], index: int, tokens: int, rows: int, chunk: int
    ) -> None:
        self.runner = runner
        self.cache: Cache = runner.open_cache((index,), tokens, rows)
        self.chunk = chunk
        self.counts = PassCounts()
        self._rows: list[_Row] = []

    def place(self, row: int, prompt: tuple[int, ...]) -> None:
        """Row `row` begins with this prompt; nothing of it is read yet."""
        self._rows[row : row + 1] = [_Row(prompt)]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """The last row, `source`, takes the place of row `target`."""
        if source != target:
            self.cache.move(source, target, self._rows[source].held)
            self._rows[target] = self._rows[source]
        self._rows.pop()

    def clear(self, row: int) -> None:
        """Zero a row that may hold NaN."""
        self.cache.clear(row)

    @torch.inference_mode()
    def evaluate(self, wanted: Mapping[int, tuple[int, ...]]) -> dict[int, Float[Tensor, " vocab"]]:
        """Logits after each row's context; rows whose prompt is not read to its end give none."""
        chunks: list[Chunk] = []
        last, start = np.zeros((2, len(self._rows)), dtype=np.int64)
        complete = []
        left = self.chunk
        for row, context in wanted.items():
            state = self._rows[row]
            ids = self._missing(state, context)
            read = min(len(ids) - 1, left)
            if read:
                chunks.append(Chunk(row, state.held, ids[:read], state.long))
                left -= read
                state.held += read
            if read == len(ids) - 1:
                complete.append(row)
                last[row], start[row] = ids[-1], state.held
                state.held += 1
        logits = self._forward(last[:, None], start, complete, chunks)
        self.counts.contexts += len(complete)
        return {row: logits[row, 0] for row in complete}

    @torch.inference_mode()
    def evaluate_ends(
        self, wanted: Mapping[int, tuple[tuple[int, ...], int]]
    ) -> dict[int, Float[Tensor, "ends vocab"]]:
        """Logits after the last `count` tokens of each row's (context, count), in one pass.

        The prompts have been read before. Rows with fewer than others repeat their last token,
        which is then forgotten: caches need room for as many more tokens as the largest count.
        """
        width = max(count for _, count in wanted.values())
        chunks: list[Chunk] = []
        tokens = np.zeros((len(self._rows), width), dtype=np.int64)
        start = np.zeros(len(self._rows), dtype=np.int64)
        for row, (context, count) in wanted.items():
            state = self._rows[row]
            whole = len(state.prompt) + len(context)
            state.held = min(state.held, whole - count)
            ids = self._missing(state, context)
            if len(ids) > count:
                chunks.append(Chunk(row, state.held, ids[:-count]))
            start[row] = whole - count
            tokens[row] = ids[-count:] + ids[-1:] * (width - count)
            state.held = whole
        logits = self._forward(tokens, start, list(wanted), chunks)
        self.counts.contexts += sum(count for _, count in wanted.values())
        return {row: logits[row, :count] for row, (_, count) in wanted.items()}

    def takes_ends(self, row: int, context: tuple[int, ...], width: int) -> bool:
        """Whether so many last tokens have the same logits in one pass as one by one."""
        if self.runner.rope_switch is not None:
            return False
        end = len(self._rows[row].prompt) + len(context) + width
        return not end - 2 * width < self.runner.kv_boundary < end

    def _missing(self, state: _Row, context: tuple[int, ...]) -> list[int]:
        """The tokens that the row does not hold; at least the last one. Others are forgotten."""
        whole = len(state.prompt) + len(context)
        shared = min(len(context), len(state.context))
        while context[:shared] != state.context[:shared]:
            shared -= 1
        switch = self.runner.rope_switch
        long = switch is not None and whole > switch
        held = min(state.held, len(state.prompt) + shared, whole - 1)
        state.held = held if long == state.long else 0
        state.long = long
        state.context = context
        within = state.held - len(state.prompt)
        self.counts.tokens += len(context) - max(0, within)
        if within >= 0:
            return list(context[within:])
        return [*state.prompt[state.held :], *context]

    def _forward(
        self, tokens: np.ndarray, start: np.ndarray, complete: list[int], chunks: list[Chunk]
    ) -> Float[Tensor, "rows width vocab"]:
        """One pass; rows that are not `complete` take part in its shape only."""
        self.counts.passes += 1
        idle = sorted(set(range(len(self._rows))) - set(complete))
        ids = to_device(tokens, self.runner.device)
        return self.runner.forward(self.cache, ids, start, idle, chunks).logits


@dataclass(frozen=True, slots=True, eq=False)
class ByteModel:
    """One model of a run."""

    contexts: ContextRows
    laws: LawReader
