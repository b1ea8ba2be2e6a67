"""Check of a model on texts longer than every length at which it changes, on a small copy of it.

Windows, chunks, rotary factors and attention temperatures show only on long texts. The small copy
(`shrinking.py`) has them all within some dozen tokens, so that the stock model can be asked.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.layers import fuse_norms
from optimal_sampling.engines.local.rotary import split_by_row
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shrinking import POSITIONS, VOCAB, small_model, text_model
from optimal_sampling.engines.local.slots.slot_runner import SlotRunner
from optimal_sampling.engines.local.stock_runner import Batching, StockRunner
from optimal_sampling.errors import ModelError

__all__ = [
    "Layer",
    "SmallCopy",
    "call_problem",
    "check_small_copy",
    "reason_of",
    "stock_layers",
    "stock_logits",
]

RECORDER = "optimal_sampling_recorder"
"""Transformers finds the attention function that records masks under this name."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Largest accepted difference to the stock logits, relative to the largest logit."""
OWN_CACHE = 2e-3
"""The same for a model with its own cache: recurrent states are float32 in most."""
BATCHED = 1e-4
"""The same between a row of a batch and a row alone, both with the model's own cache."""
LATE = 3
"""Forward passes after which every other row starts, where rows share them."""
SHORT, LONG, GROWING = range(3)
"""Rows of the mixed batch: one stays short, one is past every length, one grows past them."""
PROMPTS = {SHORT: 4, LONG: 44, GROWING: 6}
NEW = {SHORT: 3, LONG: 8, GROWING: 20}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What the stock model hands to one layer's attention."""

    index: int
    mask: Float[Tensor, "heads queries keys"] | None
    window: int | None
    length: int

    @property
    def implemented(self) -> Bool[Tensor, "queries keys"]:
        """Which keys `attention.attend` lets a query see."""
        keys = torch.arange(self.length)
        seen = keys <= keys[:, None]
        if self.window is not None:
            seen &= keys > keys[:, None] - self.window
        return seen

    def problem(self) -> str:
        """How the stock mask differs from the implemented one; empty where it does not."""
        if self.mask is None:
            return ""
        low = torch.finfo(self.mask.dtype).min / 2
        if self.mask.shape[-2:] != (self.length, self.length):
            return f"layer {self.index} attends over {self.mask.shape[-1]} of {self.length} keys"
        if ((self.mask > low) & (self.mask != 0)).any():
            return f"layer {self.index} adds a bias to its attention scores"
        different = ((self.mask > low) != self.implemented).any(0).nonzero()
        if not len(different):
            return ""
        query = int(different[0, 0])
        stock = (self.mask > low).any(0)[query].nonzero().flatten().tolist()
        ours = self.implemented[query].nonzero().flatten().tolist()
        return (
            f"layer {self.index} has a mask that this engine does not implement (token {query} sees"
            f" tokens {_span(stock)}, and would see {_span(ours)})"
        )


def _span(tokens: list[int]) -> str:
    if not tokens:
        return "none"
    whole = tokens == list(range(tokens[0], tokens[-1] + 1))
    return f"{tokens[0]}-{tokens[-1]}" if whole else ", ".join(map(str, tokens))


@contextmanager
def _quiet() -> Iterator[None]:
    """Small models make Transformers warn of sizes, which says nothing of the model itself."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        yield


def reason_of(error: Exception) -> str:
    """Why a model's own code failed, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    if isinstance(error, TypeError) and "NoneType" in last:
        return (
            "its code reads the attention mask itself, to select keys (sparse attention), and a"
            f" plugged-in attention function has none ({last})"
        )
    return last


def call_problem(called: list[int], config: Any) -> str:
    """How the calls of the attention function differ from one per layer; empty if they do not."""
    layers: int = config.num_hidden_layers
    counts = Counter(called)
    if sorted(called) == list(range(layers)):
        return ""
    kinds = sorted(set(getattr(config, "layer_types", None) or [config.model_type]))
    where = f"(layers of kind {', '.join(kinds)})"
    if set(counts) == set(range(layers)):
        times = max(counts.values())
        return f"calls a plugged-in attention function {times} times in a layer {where}"
    return f"calls a plugged-in attention function in {len(counts)} of its {layers} layers {where}"


class SmallCopy:
    """A small random copy of a model, with the logits of its own uncached forward pass.

    Raises ModelError where no such copy can be made or run.
    """

    def __init__(self, model_class: Any, config: Any, role: str) -> None:
        self.start = f"the {role} model is a {model_class.__name__}"
        try:
            with _quiet():
                self._make(model_class, config)
        except Exception as error:
            raise ModelError(
                f"{self.start}, of which no small copy can be run to check it on long texts:"
                f" {reason_of(error)}"
            ) from error
        self.scale = max(1.0, *(float(x.abs().max()) for x in self.expected.values()))

    def _make(self, model_class: Any, config: Any) -> None:
        """In float64, or in float32 where the model's code has no float64."""
        for dtype in (torch.float64, torch.float32):
            self.model = small_model(model_class, config, dtype)
            self.attention = self.model.config._attn_implementation
            try:
                self.expected = {row: stock_logits(self.model, *_text(row)) for row in PROMPTS}
                self.tolerance = TOLERANCE[dtype]
                return
            except RuntimeError:
                if dtype == torch.float32:
                    raise

    def check_attention(self) -> None:
        """Raise ModelError unless it runs with our attention: mixed rows, chunks, growth."""
        with _quiet():
            for layer in stock_layers(self.model, POSITIONS - 8):
                if problem := layer.problem():
                    raise ModelError(f"{self.start}, whose {problem}")
            attention.register()
            self.model.set_attn_implementation(attention.NAME)
            fuse_norms(self.model)
            split_by_row(self.model)
            self._compare_rows()

    def _calls(self) -> str:
        """How the model does not call the attention function once per layer."""
        runner = SlotRunner(self.model, VOCAB)
        cache = runner.open_cache((0,), 0, 1)
        cache.make_room(np.array([[POSITIONS]]), 0)
        _, _, plan = runner.forward(cache, torch.tensor([[4]]), np.array([0]))
        config = self.model.config.get_text_config(decoder=True)
        assert plan is not None
        return call_problem(plan.layers_called, config)

    def check_own_cache(self) -> Batching:
        """Which rows may share forward passes, with the model's own cache, and keep their logits.

        Raises ModelError unless each row alone has those of the uncached forward pass.
        """
        with _quiet():
            self.model.set_attn_implementation(self.attention)
            try:
                alone = self._own_logits("single")
            except Exception as error:
                message = f"{self.start}, which cannot be run with its own cache"
                raise ModelError(f"{message}: {reason_of(error)}") from error
            difference = self._difference(dict(enumerate(alone[::2])))
            allowed = OWN_CACHE * self.scale
            if difference > allowed:
                raise ModelError(
                    f"{self.start}, whose logits with its own cache differ from those without (by"
                    f" {difference:.3g} in a small copy of it; allowed: {allowed:.3g}), so that it"
                    " is not known which are right"
                )
            kinds: tuple[Batching, ...] = ("padded", "merged", "by_length")
            return next((kind for kind in kinds if self._same_rows(alone, kind)), "single")

    def _same_rows(self, alone: list[Float[Tensor, "n vocab"]], batching: Batching) -> bool:
        """Whether rows that share forward passes have the logits that they have alone."""
        try:
            found = self._own_logits(batching)
        except (RuntimeError, ValueError, IndexError):  # its cache cannot drop or pad rows
            return False
        pairs = zip(found, alone, strict=True)
        worst = [float((one - other).abs().max()) for one, other in pairs]
        return bool(np.nanmax(worst) <= BATCHED * self.scale and np.isfinite(worst).all())

    def _difference(self, found: dict[int, Tensor]) -> float:
        parts = [(x - self.expected[row]).abs().max().item() for row, x in found.items()]
        return max(parts) if all(np.isfinite(parts)) else float("inf")

    def _compare_rows(self) -> None:
        """The rows of a mixed batch, then each row alone, which tells what is wrong."""
        allowed = self.tolerance * self.scale
        try:
            calls = self._calls()
            together = self._difference(_logits(self.model, tuple(PROMPTS), 7))
            if together <= allowed and not calls:
                return
            alone = {
                row: self._difference(_logits(self.model, (row,), POSITIONS)) for row in PROMPTS
            }
        except Exception as error:
            message = f"{self.start}, which the local engine cannot run: {reason_of(error)}"
            raise ModelError(message) from error
        if calls:
            raise ModelError(f"{self.start}, which {calls}")
        if max(alone.values()) <= allowed:
            kind = "depend on what shares its batch or on how its prompt is cut into chunks"
        elif alone[SHORT] <= allowed:
            kind = "differ from its own forward pass on longer texts"
        else:
            kind = "differ from its own forward pass"
        raise ModelError(
            f"{self.start}, whose logits {kind} (by {together:.3g} in a small copy of it; allowed:"
            f" {allowed:.3g})"
        )

    def _own_logits(self, batching: Batching) -> list[Float[Tensor, "n vocab"]]:
        """Logits after each prefix of every row's text, each row twice, by `StockRunner`.

        Where rows share forward passes, the second of each two starts `LATE`, or one of a batch
        ends before the other.
        """
        runner = StockRunner(self.model, VOCAB, batching)
        runner.few = POSITIONS  # texts of all lengths start together, where any may
        if runner.merges and not runner.can_merge:
            raise ValueError("a cache of a kind that cannot be merged")
        rows = [row for row in PROMPTS for _ in range(2)]
        texts = [_text(row) for row in rows]
        cache = runner.open_cache((0,), 0, 0)
        at = np.array([prompt - 1 for _, prompt in texts])
        ends = np.array([len(ids) for ids, _ in texts])
        ends[1] -= 1  # one row of a batch ends before the other
        begins = np.array([0, LATE if runner.merges else 0] * len(PROMPTS))
        found: list[list[Tensor]] = [[] for _ in rows]
        for step in range(4 * POSITIONS):
            if (at >= ends).all():
                break
            idle = np.flatnonzero((at >= ends) | (step < begins))
            working = [int(i) for i in set(range(len(rows))) - set(idle)]
            # at the start, and past a rotary switch, all is read
            chunks = [
                Chunk(i, 0, texts[i][0][: at[i]])
                for i in working
                if not found[i] or at[i] == runner.rope_switch
            ]
            tokens = [[ids[min(p, len(ids) - 1)]] for (ids, _), p in zip(texts, at, strict=True)]
            logits = runner.forward(cache, torch.tensor(tokens), at, idle.tolist(), chunks).logits
            for i in working:
                found[i].append(logits[i, 0])
                at[i] += 1
        return [torch.stack(part) for part in found]


def check_small_copy(model: Any, role: str) -> None:
    """Raise ModelError unless a small copy of the model runs with the plugged-in attention.

    Once for each configuration: what is found does not depend on the weights.
    """
    model_class, config = text_model(type(model), model.config)
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _found:
        try:
            SmallCopy(model_class, config, "{role}").check_attention()
            _found[key] = ""
        except ModelError as error:
            _found[key] = str(error)
    if _found[key]:
        raise ModelError(_found[key].replace("{role}", role))


_found: dict[tuple[Any, str], str] = {}
"""What `check_small_copy` found."""


def _text(row: int) -> tuple[list[int], int]:
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(4, VOCAB, (PROMPTS[row] + NEW[row],), generator=generator).tolist()
    return ids, PROMPTS[row]


def stock_logits(model: Any, ids: list[int], prompt: int) -> Float[Tensor, "new vocab"]:
    """The model's own logits after each prefix of `prompt` tokens or more, uncached."""
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
    texts = [torch.tensor([ids[:end]]) for end in range(prompt, len(ids) + 1)]
    logits = [model(input_ids=text, use_cache=False).logits[0, -1] for text in texts]
    return torch.stack(logits)


def stock_layers(model: Any, length: int) -> list[Layer]:
    """What the stock model hands to every attention layer for a text of `length` tokens."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    layers: list[Layer] = []

    def record(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        mask = attention_mask
        window = kwargs.get("sliding_window")
        layers.append(Layer(module.layer_idx, None if mask is None else mask[0], window, length))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(RECORDER, record)
    AttentionMaskInterface.register(RECORDER, eager_mask)
    model.set_attn_implementation(RECORDER)
    model(input_ids=torch.arange(length)[None] % VOCAB, use_cache=False)
    return layers


def _logits(model: Any, rows: tuple[int, ...], chunk: int) -> dict[int, Float[Tensor, "n vocab"]]:
    """Logits after each prefix of every row's text: chunks, then 1 or 3 tokens at a time."""
    runner = SlotRunner(model, VOCAB)
    cache = runner.open_cache((0,), 0, len(rows))
    cache.make_room(np.array([[POSITIONS] for _ in rows]), 0)
    texts, prompts = zip(*map(_text, rows), strict=True)
    known, cached, long = list(prompts), [0 for _ in rows], [False for _ in rows]
    switch = runner.rope_switch or POSITIONS
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(4 * POSITIONS):
        for i, count in enumerate(known):
            if count > switch and not long[i]:
                cached[i], long[i] = 0, True
        done = [count > len(ids) for ids, count in zip(texts, known, strict=True)]
        if all(done):
            break
        pending = [n - 1 - c for n, c in zip(known, cached, strict=True)]
        idle = [i for i in range(len(rows)) if pending[i] > 0 or done[i]]
        chunks = [
            Chunk(i, cached[i], ids[cached[i] : cached[i] + min(chunk, pending[i])], long[i])
            for i, ids in enumerate(texts)
            if pending[i] > 0 and not done[i]
        ]
        ready = [i for i in range(len(rows)) if i not in idle]
        room = [switch - known[i] + 1 for i in ready if not long[i]]
        width = min([3 if step % 3 == 2 else 1, *room])
        tokens = [(ids + [0] * width)[c : c + width] for ids, c in zip(texts, cached, strict=True)]
        start = np.array([min(c, POSITIONS - width) for c in cached])
        logits = runner.forward(cache, torch.tensor(tokens), start, idle, chunks).logits
        for part in chunks:
            cached[part.row] += len(part.ids)
        for i in ready:
            kept = min(width, len(texts[i]) - cached[i])
            found[i].extend(logits[i, :kept])
            cached[i] += kept
            known[i] += kept
    return {row: torch.stack(found[i]) for i, row in enumerate(rows)}
