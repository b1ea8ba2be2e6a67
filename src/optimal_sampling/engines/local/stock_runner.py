"""A model run with its own forward pass and its own cache, as Transformers' `generate` runs it.

For models whose attention cannot be plugged in: recurrent and hybrid ones, and those with an
attention of their own. One token per row and round; no drafts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.memory import BlockManager, Lengths
from optimal_sampling.engines.local.rotary import join_rows
from optimal_sampling.engines.local.row_group import Group, StockRow, filler_mask, merge
from optimal_sampling.engines.local.runner import Cache, ForwardPass, ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["MEASURED_ROWS", "Batching", "StockCache", "StockRunner"]

Batching: TypeAlias = Literal["single", "by_length", "merged", "padded"]
"""Which rows share forward passes.

`single`: none. `by_length`: those that start in one round with texts of one length. `merged`: these
start together, and later all rows go together, with filler before the shorter texts. `padded`:
texts of different lengths also start together.
"""

PROBE = (8, 24)
"""Lengths of the texts whose caches are measured."""
PROBE_TEXTS = (3, 7, 24)
"""Lengths of the texts that are read together and alone."""
MEASURED_ROWS = 8
"""Rows of the batch whose speed is measured."""
STRETCH = 2.0
"""Texts start together that are at most so many times as long as the shortest of them."""
FEW = 64
"""Texts of at most so many tokens start together in any case."""


class StockManager(BlockManager):
    """Memory of the rows of a model's own cache: `bytes_per_row`, and more per token.

    `aligned`: every row takes as much as the longest.
    """

    def __init__(
        self, contexts: tuple[int, ...], bytes_per_token: int, bytes_per_row: int, aligned: bool
    ) -> None:
        super().__init__(contexts, bytes_per_token)
        self.bytes_per_row = bytes_per_row
        self.aligned = aligned
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
        tokens = len(rows) * rows.max(initial=0) if self.aligned else rows.sum()
        return len(rows) * self.bytes_per_row + int(tokens) * self.bytes_per_token


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

    Where rows share forward passes, their logits are those of a batch, equal to a single row up to
    rounding; with `single` to the bit.
    """

    drafts = False
    few = FEW

    def __init__(self, model: Any, vocab_size: int, batching: Batching = "single") -> None:
        super().__init__(model, vocab_size)
        join_rows(model)  # rows of which some are past a switch are never merged
        self.batching = batching
        few, many = (self._cache_bytes(count) for count in PROBE)
        self.bytes_per_token = -(-(many - few) // (PROBE[1] - PROBE[0]))
        self.bytes_per_row = max(0, few - PROBE[0] * self.bytes_per_token)
        """Of the cache of one row, for any number of tokens: recurrent states."""

    def open_cache(self, contexts: tuple[int, ...], tokens: int, sequences: int) -> StockCache:
        """Rows bring their own memory, so neither number matters."""
        sizes = self.bytes_per_token, self.bytes_per_row
        return StockCache(StockManager(contexts, *sizes, aligned=self.merges))

    @property
    def merges(self) -> bool:
        """Whether rows that started apart go together later."""
        return self.batching in ("merged", "padded")

    @torch.inference_mode()
    def _cache_bytes(self, count: int) -> int:
        """Bytes of one row's cache after `count` tokens."""
        group, _ = self._start([StockRow([0] * count)])
        return sum(map(_tensor_bytes, group.kwargs.values()))

    @property
    @torch.inference_mode()
    def can_merge(self) -> bool:
        """Whether the model's cache is of a kind that `row_group` can join and pad."""
        group, _ = self._start([StockRow([0, 0])])
        return group.joins(group)

    @torch.inference_mode()
    def sharing_error(self) -> float:
        """Largest difference of logits between texts of several lengths together and each alone.

        Relative to the largest logit, or to 1 where that is smaller.
        """
        vocab = self.embeddings
        texts = [[(5 + i) % vocab for i in range(length)] for length in PROBE_TEXTS]
        together = self._logits_after(texts)
        alone = torch.cat([self._logits_after([text]) for text in texts])
        return float((together - alone).abs().max() / alone.abs().max().clamp(min=1))

    def _logits_after(self, texts: list[list[int]]) -> Float[Tensor, "texts vocab"]:
        """After the last token of each, which is read in a forward pass of its own."""
        rows = [StockRow(text[:-1]) for text in texts]
        self._run(rows)
        for row, text in zip(rows, texts, strict=True):
            row.pending.append(text[-1])
        found = self._run(rows)
        return torch.stack([found[row] for row in rows]).float()

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
            self._step(group)[1].sum().item()  # waits for a GPU
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
        steps = [self._step(group) for group in self._continued(rows)]
        steps += [self._start(part) for part in self._parts(new)]
        found: dict[StockRow, Tensor] = {}
        for group, logits in steps:
            for row, values in zip(group.rows, logits, strict=True):
                found[row] = values[: self.vocab_size]
                row.length += len(row.pending)
                row.pending.clear()
        return found

    def _continued(self, rows: list[StockRow]) -> list[Group]:
        """The groups of those rows that have one, without the rows that have ended."""
        working = set(rows)
        groups = list(dict.fromkeys(row.group for row in rows if row.group is not None))
        before = [len(group.rows) for group in groups]
        for group in groups:
            group.keep([row for row in group.rows if row in working])
        if not self.merges:
            return groups
        joined: list[list[Group]] = []
        for group in groups:
            same = next((others for others in joined if others[0].joins(group)), None)
            joined.append([group]) if same is None else same.append(group)
        merged = [merge(parts) if len(parts) > 1 else parts[0] for parts in joined]
        if before != [len(group.rows) for group in merged]:
            for group in merged:
                group.align()
        return merged

    def _parts(self, rows: list[StockRow]) -> list[list[StockRow]]:
        """Which new rows start together."""
        if self.batching == "single":
            return [[row] for row in rows]
        parts: list[list[StockRow]] = []
        for row in sorted(rows, key=lambda row: len(row.pending)):
            if parts and len(row.pending) <= self._most(len(parts[-1][0].pending)):
                parts[-1].append(row)
            else:
                parts.append([row])
        return parts

    def _most(self, shortest: int) -> float:
        """Tokens of the longest text that may start with a text of `shortest`."""
        return max(self.few, STRETCH * shortest) if self.batching == "padded" else shortest

    def _start(self, rows: list[StockRow]) -> tuple[Group, Float[Tensor, "rows vocab"]]:
        """Read the texts of new rows."""
        lengths = [len(row.pending) for row in rows]
        width = max(lengths)
        # filled with the row's own first token, which can spoil no other row's numbers
        filled = [[row.pending[0]] * (width - len(row.pending)) + row.pending for row in rows]
        ids = torch.tensor(filled, device=self.device)
        mask = filler_mask(torch.tensor(lengths, device=self.device), width)
        group = Group(rows, ids, self._prepared(ids, mask))
        for row in rows:
            row.group = group
        inputs = self.model.prepare_inputs_for_generation(
            ids, is_first_iteration=True, **group.kwargs
        )
        return group, self._forward(group, inputs)

    def _prepared(
        self, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> dict[str, Any]:
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
            attention_mask=mask,
            generation_config=config,
            custom_generate=keep,
        )
        return kept

    def _step(self, group: Group) -> tuple[Group, Float[Tensor, "rows vocab"]]:
        """Read one more token of each row."""
        last = torch.tensor([row.pending for row in group.rows], device=self.device)
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
