"""Check of a model on texts longer than every length at which it changes, on a small random copy of it.

Windows, chunks, rotary factors and attention temperatures show only on long texts. The small copy
(`shrinking.py`) has them all within some dozen tokens, so that the stock model can be asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.engines.local import attention
from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import KVCache
from optimal_sampling.engines.local.norms import fuse_norms
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shrinking import POSITIONS, VOCAB, small_model
from optimal_sampling.errors import ModelError

__all__ = ["Layer", "check_small_copy", "stock_layers", "stock_logits"]

RECORDER = "optimal_sampling_recorder"
"""Transformers finds the attention function that records masks under this name."""
TOLERANCE = 1e-4
"""Largest accepted difference to the stock logits in float64, relative to the largest logit."""
SHORT, LONG, GROWING = range(3)
"""Rows of the mixed batch: one that stays short, one past every length, one that grows past them."""
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


def check_small_copy(model_class: Any, config: Any, role: str) -> None:
    """Raise ModelError unless a small copy gives its stock logits: mixed rows, chunks, growth."""
    name = model_class.__name__
    start = f"the {role} model is a {name}"
    try:
        with _quiet():
            model = small_model(model_class, config)
            expected = {row: stock_logits(model, *_text(row)) for row in PROMPTS}
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError(
            f"{start}, of which no small copy can be run to check it on long texts: {first[0]}"
        ) from error
    with _quiet():
        for layer in stock_layers(model, POSITIONS - 8):
            if problem := layer.problem():
                raise ModelError(f"{start}, whose {problem}; it would be sampled wrongly")
        _compare(model, expected, start)


def _text(row: int) -> tuple[list[int], int]:
    ids = torch.randint(4, VOCAB, (PROMPTS[row] + NEW[row],), generator=_generator(row)).tolist()
    return ids, PROMPTS[row]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock_logits(model: Any, ids: list[int], prompt: int) -> Float[Tensor, "new vocab"]:
    """The model's own logits of the token after each prefix of `prompt` tokens or more, uncached."""
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


def _compare(model: Any, expected: dict[int, Tensor], start: str) -> None:
    """The rows of a mixed batch, then each row alone, which tells what is wrong."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    fuse_norms(model)
    allowed = TOLERANCE * max(1.0, *(float(logits.abs().max()) for logits in expected.values()))

    def difference(rows: tuple[int, ...], chunk: int) -> float:
        found = _logits(model, rows, chunk)
        parts = [(found[row] - expected[row]).abs().max().item() for row in rows]
        return max(parts) if all(np.isfinite(parts)) else float("inf")

    try:
        together = difference((SHORT, LONG, GROWING), 7)
        if together <= allowed:
            return
        alone = {row: difference((row,), POSITIONS) for row in PROMPTS}
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ModelError(f"{start}, which the local engine cannot run: {first[0]}") from error
    if max(alone.values()) <= allowed:
        kind = "depend on what shares its batch or on how its prompt is cut into chunks"
    elif alone[SHORT] <= allowed:
        kind = "differ from its own forward pass on longer texts"
    else:
        kind = "differ from its own forward pass"
    raise ModelError(
        f"{start}, whose logits {kind} (by {together:.3g} in a small copy of it; allowed:"
        f" {allowed:.3g}); it would be sampled wrongly"
    )


def _logits(model: Any, rows: tuple[int, ...], chunk: int) -> dict[int, Float[Tensor, "n vocab"]]:
    """Logits after each prefix of every row's text: prompts in chunks, then 1 or 3 tokens at a time."""
    runner, cache = ModelRunner(model, VOCAB), KVCache()
    cache.reshape(len(rows), POSITIONS)
    texts = [_text(row) for row in rows]
    cached = [0 for _ in rows]
    found: list[list[Tensor]] = [[] for _ in rows]
    for step in range(POSITIONS):
        width = 3 if step % 3 == 2 else 1
        pending = [prompt - 1 - c for (_, prompt), c in zip(texts, cached, strict=True)]
        done = [c >= len(ids) for (ids, _), c in zip(texts, cached, strict=True)]
        if all(done):
            break
        idle = [i for i in range(len(rows)) if pending[i] > 0 or done[i]]
        chunks = [
            Chunk(i, cached[i], ids[cached[i] : cached[i] + min(chunk, pending[i])])
            for i, (ids, _) in enumerate(texts)
            if pending[i] > 0
        ]
        tokens = [(ids + [0] * width)[c : c + width] for (ids, _), c in zip(texts, cached, strict=True)]
        start = np.array([min(c, POSITIONS - width) for c in cached])
        logits = runner.forward(cache, torch.tensor(tokens), start, idle, chunks)
        for part in chunks:
            cached[part.slot] += len(part.ids)
        for i, (ids, _) in enumerate(texts):
            if i not in idle:
                kept = min(width, len(ids) - cached[i])
                found[i].extend(logits[i, :kept])
                cached[i] += kept
    return {row: torch.stack(found[i]) for i, row in enumerate(rows)}
