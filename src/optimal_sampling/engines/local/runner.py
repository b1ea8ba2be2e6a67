"""A model that can be run, and its KV cache: the interface of every kind of memory."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.attention import AttentionPlan
from optimal_sampling.engines.local.memory import BlockManager, Lengths
from optimal_sampling.engines.local.rotary import LONG, split_by_row
from optimal_sampling.engines.local.scheduler import Chunk, RoundPlan, Sequence

__all__ = [
    "Cache",
    "CachedModel",
    "Carried",
    "FlatCache",
    "ForwardPass",
    "ModelRunner",
    "Recordings",
]


class Cache(ABC):
    """What one model keeps of every row's text. `manager` says which rows fit."""

    manager: BlockManager

    @abstractmethod
    def make_room(self, lengths: Lengths, width: int) -> None:
        """Memory for these sequences and `width` more tokens each; what they hold is kept."""

    @abstractmethod
    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` becomes what row `source` is, of which the first `count` tokens matter."""

    @abstractmethod
    def clear(self, row: int) -> None:
        """Zero a row that may hold NaN: NaN with attention weight 0 would still be NaN."""

    @abstractmethod
    def release(self) -> None:
        """Free all rows at the end of a run."""


class FlatCache(Cache):
    """Per layer a flat memory of keys and one of values, made at the layer's first `write`."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of a layer's memory."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one row over all layers, once every layer has written."""
        return sum(m.shape[1] * m.shape[2] * m.element_size() for m in self.memories())

    @property
    def head_dims(self) -> set[int]:
        """Dimensions of the heads of keys and values, over all layers."""
        return {memory.shape[-1] for memory in self.memories()}

    def memories(self) -> list[Float[Tensor, "tokens heads dim"]]:
        """Keys, then values, of all layers that have written."""
        return [*self._keys.values(), *self._values.values()]

    def allocate(
        self,
        layer: int,
        keys: Float[Tensor, "_ heads key_dim"],
        values: Float[Tensor, "_ heads value_dim"],
    ) -> None:
        """Make a layer's memory for keys and values like these, where it has none."""
        if layer not in self._keys:
            # zeros, not empty: a masked key has weight 0, and 0 * NaN is NaN
            made = [part.new_zeros(self.tokens, *part.shape[1:]) for part in (keys, values)]
            self._keys[layer], self._values[layer] = made  # both, or none where memory is out

    def write(
        self,
        layer: int,
        index: Int[Tensor, " tokens"],
        keys: Float[Tensor, "tokens heads key_dim"],
        values: Float[Tensor, "tokens heads value_dim"],
    ) -> None:
        """Store the tokens of one forward pass at these indices."""
        self.allocate(layer, keys, values)
        self._keys[layer].index_copy_(0, index, keys)
        self._values[layer].index_copy_(0, index, values)

    def free(self) -> None:
        """Give the memory back, also where something still refers to this cache."""
        self._keys.clear()
        self._values.clear()


@dataclass(frozen=True, slots=True)
class Recordings:
    """Shapes of forward passes that were recorded as CUDA graphs."""

    count: int = 0
    skipped: int = 0
    """Those whose recording ran out of memory; they run unrecorded."""
    off: str = ""
    """Why nothing more is recorded; "" where recording goes on."""

    def __add__(self, other: Recordings) -> Recordings:
        off = self.off or other.off
        return Recordings(self.count + other.count, self.skipped + other.skipped, off)

    def __str__(self) -> str:
        if self.off:
            return f"off, because recording failed: {self.off}"
        text = f"{self.count} shapes recorded" if self.count else "on, no shapes recorded yet"
        return text + (f", {self.skipped} not: out of memory" if self.skipped else "")


CacheT = TypeVar("CacheT", bound=Cache)


class ForwardPass(NamedTuple):
    """Result of one forward pass of one model over the rows of its cache."""

    logits: Float[Tensor, "rows width vocab"]
    """In the model's dtype, cut to the shared vocabulary."""
    settled: bool = True
    """A pass of the same shape will not become faster when it is repeated."""
    plan: AttentionPlan | None = None
    """Tells which layers called the attention function; None where a recorded graph ran."""


class Carried(NamedTuple):
    """What a round starts from while the host does not know the tokens of the round before it."""

    last: Int[Tensor, " rows"]
    """The last token of every row."""
    first: Int[Tensor, " rows"]
    """Index of the token after it in its completion."""
    behind: Int[Tensor, " rows"] | None = None
    """Tokens that each row has fewer than `RoundPlan.lengths` says; None: none in any row."""


class ModelRunner(ABC, Generic[CacheT]):
    """A model and the kind of cache that it runs over, which `open_cache` makes.

    A kind of memory is a subclass, a `Cache` and a `BlockManager`. Nothing else depends on it.
    """

    kv_boundary = sys.maxsize
    """Key length at which attention changes its bits."""
    gather = 0.0
    """`Limits.gather` for this kind of memory."""
    runs_ahead = False
    """A pass may be queued before it is known which rows the pass before it ended.

    What it writes for those rows is never read.
    """
    drafts = True
    """Several tokens of a row can go through the model at once, and be forgotten."""

    def __init__(self, model: Any, vocab_size: int, bytes_per_token: int = 0) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.bytes_per_token = bytes_per_token
        """Of the cache, for one token of one row."""
        self.device: torch.device = model.device
        self.rope_switch = split_by_row(model)
        """Longest text with the short rotary factors; None where all texts have the same."""
        self.embeddings: int = model.get_input_embeddings().weight.shape[0]

    @abstractmethod
    def open_cache(self, contexts: tuple[int, ...], tokens: int, sequences: int) -> CacheT:
        """An empty cache for one run.

        `tokens`: this cache's share of the memory budget. `sequences`: most that run at once.
        """

    @abstractmethod
    def forward(
        self,
        cache: CacheT,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Seq[int] = (),
        chunks: Seq[Chunk] = (),
    ) -> ForwardPass:
        """Feed chunks, then `tokens` to rows 0, 1, ... at positions start, start + 1, ...

        Idle rows take part in the shape only: nothing of theirs is stored, and their logits have
        no meaning.
        """

    def forward_behind(
        self,
        cache: CacheT,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        behind: Int[Tensor, " rows"],
    ) -> ForwardPass:
        """`forward` from positions start - behind on. Only for kinds that may run ahead.

        All rows have room up to `start` and `width` more; `behind` is on the device.
        """
        raise NotImplementedError

    def mark_long(
        self, positions: Int[np.ndarray, " tokens"], chunks: Seq[Chunk], padding: int = 0
    ) -> Int[np.ndarray, " tokens"]:
        """Positions of padding, chunks and dense tokens, with `LONG` added where a row is long."""
        if self.rope_switch is None:
            return positions
        long = positions >= self.rope_switch
        first = padding
        for chunk in chunks:
            long[first : first + len(chunk.ids)] = chunk.long
            first += len(chunk.ids)
        marked: Int[np.ndarray, " tokens"] = positions + LONG * long
        return marked

    def drop_caches(self) -> None:
        """Free caches that were kept from earlier runs."""

    def recorded_graphs(self) -> Recordings | None:
        """CUDA graphs recorded; None for a kind that records none."""
        return None

    def prepare(self, cache: CacheT, rows: int, widest: int) -> None:
        """Do before the first round what passes of so many rows need, `widest` tokens at most."""


class CachedModel:
    """One model with its cache, which holds `contexts` of every sequence."""

    def __init__(
        self, runner: ModelRunner[Any], contexts: tuple[int, ...], tokens: int, sequences: int
    ) -> None:
        self.runner = runner
        self.contexts = contexts
        self._columns = slice(contexts[0], contexts[-1] + 1)
        self.cache: Cache = runner.open_cache(contexts, tokens, sequences)

    def prepare(self, sequences: int, widest: int) -> None:
        """As in `ModelRunner`, for so many sequences."""
        self.runner.prepare(self.cache, sequences * len(self.contexts), widest)

    def move(self, source: int, target: int, sequence: Sequence) -> None:
        """Copy a row's contexts, which are those of `sequence`, to another row."""
        width = len(self.contexts)
        for i, context in enumerate(self.contexts):
            self.cache.move(source * width + i, target * width + i, sequence.cached[context])

    def clear(self, row: int) -> None:
        """Zero a row's contexts."""
        width = len(self.contexts)
        for i in range(width):
            self.cache.clear(row * width + i)

    def forward(
        self,
        plan: RoundPlan,
        rows: list[Sequence],
        drafts: Int[Tensor, "rows drafts"],
        offset: int = 0,
        carried: Carried | None = None,
    ) -> tuple[list[Float[Tensor, "rows width vocab"]], bool]:
        """Logits after each row's last known token and after each of its drafts, per context.

        Returns whether the pass was settled too. With an `offset` the last known token and
        `offset - 1` drafts are cached already, and only `drafts` are fed. `carried`: of the round
        before, where `rows` do not have its tokens yet.
        """
        width = len(self.contexts)
        tokens = drafts.repeat_interleave(width, 0) if width > 1 else drafts
        chunks: list[Chunk] = []
        if offset == 0:
            last = self._last(rows, carried)
            tokens = torch.cat([last[:, None], tokens], 1)
            chunks = self._chunks(plan)
        start = plan.lengths[:, self._columns].ravel() + (offset - 1)
        if carried is None or carried.behind is None:
            done = self.runner.forward(self.cache, tokens, start, self._idle(plan), chunks)
        else:
            behind = carried.behind.repeat_interleave(width) if width > 1 else carried.behind
            done = self.runner.forward_behind(self.cache, tokens, start, behind)
        return [done.logits[i::width] for i in range(width)], done.settled

    def _idle(self, plan: RoundPlan) -> list[int]:
        """Rows of this cache that do not decode."""
        if all(plan.ready):
            return []
        width = len(self.contexts)
        not_ready = [row for row, ready in enumerate(plan.ready) if not ready]
        return [row * width + i for row in not_ready for i in range(width)]

    def _last(self, rows: list[Sequence], carried: Carried | None) -> Int[Tensor, " rows"]:
        """The last known token of every row of this cache."""
        if carried is not None:
            width = len(self.contexts)
            return carried.last.repeat_interleave(width) if width > 1 else carried.last
        last = [(s.outputs[c] or s.prompts[c])[-1] for s in rows for c in self.contexts]
        return to_device(np.array(last), self.runner.device)

    def _chunks(self, plan: RoundPlan) -> list[Chunk]:
        """The plan's chunks, addressed by rows of this cache."""
        width = len(self.contexts)
        return [
            replace(chunk, row=chunk.row * width + i)
            for i, context in enumerate(self.contexts)
            for chunk in plan.chunks[context]
        ]
