"""A model run with its own forward pass and its own cache, as Transformers' `generate` runs it.

For models whose attention cannot be plugged in: recurrent and hybrid ones, and those with an
attention of their own. One token per row and round; no drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.memory import BlockManager, Lengths
from optimal_sampling.engines.local.rotary import join_rows
from optimal_sampling.engines.local.runner import Cache, ForwardPass, ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["MEASURED_ROWS", "StockCache", "StockRunner"]

PROBE = (8, 24)
"""Lengths of the texts whose caches are measured."""
MEASURED_ROWS = 8
"""Rows of the batch whose speed is measured."""


@dataclass(slots=True, eq=False)
class StockRow:
    """One row: the tokens that no forward pass has seen, and the group in which the others were."""

    pending: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens that the model's cache holds."""
    group: Group | None = None


@dataclass(slots=True, eq=False)
class Group:
    """Rows that go through the model together; all of one length, so that nothing is padded."""

    rows: list[StockRow]
    ids: Int[Tensor, "rows tokens"]
    kwargs: dict[str, Any]
    """What `generate` hands from one forward pass to the next, the cache among it."""

    def keep(self, rows: list[StockRow]) -> None:
        """Drop every row but these, which are in the group's order."""
        if len(rows) == len(self.rows):
            return
        index = torch.tensor([self.rows.index(row) for row in rows], device=self.ids.device)
        count = len(self.rows)
        self.ids = self.ids[index]
        for name, value in self.kwargs.items():
            if hasattr(value, "reorder_cache"):
                value.reorder_cache(index)
            elif isinstance(value, Tensor) and value.shape[:1] == (count,) and count > 1:
                self.kwargs[name] = value[index]
        self.rows = rows


class StockManager(BlockManager):
    """Memory of rows that each have a cache of their own: `bytes_per_row`, and more per token."""

    def __init__(self, contexts: tuple[int, ...], bytes_per_token: int, bytes_per_row: int) -> None:
        super().__init__(contexts, bytes_per_token)
        self.bytes_per_row = bytes_per_row
        self._rows = np.zeros(0, dtype=np.int64)

    @property
    def held(self) -> int:
        """Bytes of the rows for which memory was reserved."""
        return self._bytes(self._rows)

    def bytes_needed(self, lengths: Lengths, width: int) -> int:
        """Bytes of these sequences' rows."""
        return self._bytes(self.row_lengths(lengths, width))

    def has_room(self, lengths: Lengths, width: int) -> bool:
        """Rows grow with every token."""
        return np.array_equal(self._rows, self.row_lengths(lengths, width))

    def reserve(self, lengths: Lengths, width: int) -> None:
        """Count these rows as held."""
        self._rows = self.row_lengths(lengths, width)

    def release(self) -> None:
        """No row is left."""
        self._rows = self._rows[:0]

    def _bytes(self, rows: Int[np.ndarray, " rows"]) -> int:
        return len(rows) * self.bytes_per_row + int(rows.sum()) * self.bytes_per_token


class StockCache(Cache):
    """The rows of one model by slot. A row's memory is the model's own cache."""

    def __init__(self, manager: StockManager) -> None:
        self.manager: StockManager = manager
        self.rows: dict[int, StockRow] = {}

    def row(self, slot: int, start: int) -> StockRow:
        """The row whose next token has position `start`. A new one where it is 0."""
        if start == 0 or slot not in self.rows:
            self.rows[slot] = StockRow()
        row = self.rows[slot]
        if row.length + len(row.pending) != start:
            raise ValueError(
                f"slot {slot} holds {row.length + len(row.pending)} tokens, not {start}"
            )
        return row

    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` becomes what row `source` is, which ends; `count` tokens are cached."""
        self.clear(target)
        if count:  # else it has no row yet
            self.rows[target] = self.rows.pop(source)

    def clear(self, row: int) -> None:
        """Forget a row."""
        self.rows.pop(row, None)

    def make_room(self, lengths: Lengths, width: int) -> None:
        """Rows allocate memory themselves."""
        self.manager.reserve(lengths, width)

    def release(self) -> None:
        """Forget all rows."""
        self.rows.clear()
        self.manager.release()

    def shrink(self, slots: int) -> None:
        """Forget the rows from `slots` on."""
        for slot in [s for s in self.rows if s >= slots]:
            del self.rows[slot]


class StockRunner(ModelRunner[StockCache]):
    """Forward passes over the rows of a `StockCache`.

    `batched`: rows that start in one round with texts of one length go through the model
    together. Their logits are those of a batch, equal to a single row up to rounding; otherwise
    to the bit.
    """

    drafts = False

    def __init__(self, model: Any, vocab_size: int, batched: bool = False) -> None:
        super().__init__(model, vocab_size)
        join_rows(model)  # no forward pass here has rows of several lengths
        self.batched = batched
        few, many = (self._cache_bytes(count) for count in PROBE)
        self.bytes_per_token = -(-(many - few) // (PROBE[1] - PROBE[0]))
        self.bytes_per_row = max(0, few - PROBE[0] * self.bytes_per_token)
        """Of the cache of one row, for any number of tokens: recurrent states."""

    def open_cache(self, contexts: tuple[int, ...], tokens: int, sequences: int) -> StockCache:
        """Rows bring their own memory, so neither number matters."""
        return StockCache(StockManager(contexts, self.bytes_per_token, self.bytes_per_row))

    @torch.inference_mode()
    def _cache_bytes(self, count: int) -> int:
        """Bytes of one row's cache after `count` tokens."""
        group, _ = self._start([StockRow([0] * count)])
        return sum(map(_tensor_bytes, group.kwargs.values()))

    @torch.inference_mode()
    def slowdown(self) -> float:
        """Time of one token of `MEASURED_ROWS` rows, one by one over that in one batch."""
        return MEASURED_ROWS * self._step_seconds(1) / self._step_seconds(MEASURED_ROWS)

    def _step_seconds(self, rows: int) -> float:
        """Of one token of as many rows in one batch: the fastest of five."""
        group, _ = self._start([StockRow([0]) for _ in range(rows)])
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            self._step(group, group.rows)[1].sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    @torch.inference_mode()
    def forward(
        self,
        cache: StockCache,
        tokens: Int[Tensor, "rows 1"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> ForwardPass:
        """Logits after `tokens`, at positions `start` of slots 0, 1, ...; chunks come before them.

        Chunks wait for the first token after them: a recurrent model reads a prompt in one pass.
        The logits of idle rows mean nothing.
        """
        for chunk in chunks:
            cache.row(chunk.row, chunk.start).pending.extend(chunk.ids)
        cache.shrink(len(tokens))
        ids, working = tokens[:, 0].tolist(), {}
        for slot in sorted(set(range(len(tokens))) - set(idle)):
            row = cache.row(slot, int(start[slot]))
            row.pending.append(ids[slot])
            working[slot] = row
        logits = self._run(list(working.values()))
        output = torch.zeros(len(tokens), 1, self.vocab_size, dtype=self.model.dtype)
        output = output.to(self.device)
        for slot, row in working.items():
            output[slot, 0] = logits[row]
        return ForwardPass(output)

    def _run(self, rows: list[StockRow]) -> dict[StockRow, Float[Tensor, " vocab"]]:
        new = [row for row in rows if row.group is None]
        groups = {id(row.group): row.group for row in rows if row.group is not None}
        members = {key: [r for r in group.rows if r in rows] for key, group in groups.items()}
        steps = [self._step(group, members[key]) for key, group in groups.items()]
        steps += [self._start(part) for part in self._parts(new)]
        found: dict[StockRow, Tensor] = {}
        for group, logits in steps:
            for row, values in zip(group.rows, logits, strict=True):
                found[row] = values[: self.vocab_size]
                row.length += len(row.pending)
                row.pending.clear()
        return found

    def _parts(self, rows: list[StockRow]) -> list[list[StockRow]]:
        """Which new rows start together."""
        if not self.batched:
            return [[row] for row in rows]
        lengths = sorted({len(row.pending) for row in rows})
        return [[row for row in rows if len(row.pending) == length] for length in lengths]

    def _start(self, rows: list[StockRow]) -> tuple[Group, Float[Tensor, "rows vocab"]]:
        """Read the texts of new rows."""
        ids = torch.tensor([row.pending for row in rows], device=self.device)
        group = Group(rows, ids, self._prepared(ids))
        for row in rows:
            row.group = group
        inputs = self.model.prepare_inputs_for_generation(
            ids, is_first_iteration=True, **group.kwargs
        )
        return group, self._forward(group, inputs)

    def _prepared(self, ids: Int[Tensor, "rows tokens"]) -> dict[str, Any]:
        """What `generate` would hand to the first forward pass: a new cache, positions, masks."""
        from transformers import GenerationConfig

        kept: dict[str, Any] = {}

        def keep(
            model: Any, input_ids: Tensor, generation_config: Any = None, **kwargs: Any
        ) -> Tensor:
            ours = ("logits_processor", "stopping_criteria", "synced_gpus", "streamer")
            kept.update({k: v for k, v in kwargs.items() if k not in ours})
            return input_ids

        # set here, because a checkpoint's generation_config.json may say otherwise
        config = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            cache_implementation="dynamic",
            pad_token_id=0,
        )
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            custom_generate=keep,
        )
        return kept

    def _step(
        self, group: Group, rows: list[StockRow]
    ) -> tuple[Group, Float[Tensor, "rows vocab"]]:
        """Read one more token of each row."""
        group.keep(rows)
        last = torch.tensor([row.pending for row in rows], device=self.device)
        group.ids = torch.cat([group.ids, last], 1)
        cached = group.kwargs.get("use_cache", True)
        inputs = self.model.prepare_inputs_for_generation(
            group.ids, next_sequence_length=1 if cached else None, **group.kwargs
        )
        return group, self._forward(group, inputs)

    def _forward(self, group: Group, inputs: dict[str, Any]) -> Float[Tensor, "rows vocab"]:
        outputs = self.model(**inputs, return_dict=True)
        group.kwargs = self.model._update_model_kwargs_for_generation(outputs, group.kwargs)
        logits: Tensor = outputs.logits[:, -1]
        return logits


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a cache, whatever its class."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_tensor_bytes, value))
    if type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
        return sum(_tensor_bytes(v) for k, v in vars(value).items() if "config" not in k)
    return 0
