"""The attention function that Transformers models call inside our forward passes.

One forward pass is one flat row of tokens: padding, then prompt chunks, then `width` tokens of every dense row. The
function stores keys and values, then attends group by group; `AttentionPlan` says which queries form a group and what
they may see. Nothing here knows of sequences or of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optimal_sampling.engines.local.kv_cache import KVCache
from optimal_sampling.engines.local.shapes import round_up

__all__ = ["NAME", "AttentionPlan", "Call", "Group", "Plan", "register"]

NAME = "optimal_sampling"
"""Under this name Transformers finds the function."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One layer's call."""

    layer: int
    query: Float[Tensor, "heads tokens key_dim"]
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Plan(Protocol):
    """What one forward pass needs to attend; the model hands it through to every layer unread."""

    layers_called: list[int]

    def attend(
        self,
        call: Call,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, and attend."""


@dataclass(eq=False)
class Group:
    """Queries that attend in one call: the same number for each of several slots, over `length` keys."""

    slots: slice | Tensor
    positions: Int[Tensor, "rows queries"]
    length: int
    queries: Int[Tensor, "rows queries"] | None = None
    """Indices into the flat tokens. None: the last rows * queries tokens, in order (the dense rows)."""
    returns: Int[Tensor, " tokens"] | None = None
    """Which of this group's flattened outputs go back, in the order of the flat tokens. None: all."""
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "rows queries length"]:
        """0 where a query may look, -inf elsewhere: causal, and at most `window` keys back."""
        if window not in self._masks:
            keys = torch.arange(self.length, device=self.positions.device)
            last = self.positions[..., None]
            seen = keys <= last
            if window is not None:
                seen &= keys > last - window
            blocked = torch.full((), float("-inf"), dtype=dtype, device=last.device)
            self._masks[window] = torch.where(seen, torch.zeros_like(blocked), blocked)
        return self._masks[window]


@dataclass(eq=False)
class AttentionPlan:
    """The `Plan` over slots, with PyTorch's SDPA."""

    cache: KVCache
    write: Int[Tensor, " tokens"]
    padding: int
    """Leading tokens that are neither chunk nor dense."""
    chunks: tuple[Group, ...]
    dense: tuple[Group, ...]
    """One group, or two over short and long keys (`ShapeRules.kv_boundary`) of which `is_long` selects."""
    is_long: Bool[Tensor, " rows"] | None
    query_multiple: int
    layers_called: list[int] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)
    """Features of attention that the model used and that not every kernel has."""

    def attend(
        self,
        call: Call,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, then attend group by group."""
        self.needs |= {
            name
            for name, x in (("soft caps", call.softcap), ("sinks", call.sinks))
            if x is not None
        }
        self.cache.write(call.layer, self.write, key.transpose(0, 1), value.transpose(0, 1))
        parts = [self._chunk(call, group) for group in self.chunks]
        parts += self._dense(call)
        if self.padding:
            parts.insert(
                0, call.query.new_zeros(self.padding, call.query.shape[0], value.shape[-1])
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _dense(self, call: Call) -> list[Float[Tensor, "tokens heads value_dim"]]:
        outputs = []
        for group in self.dense:
            rows, width = group.positions.shape
            query = call.query[:, call.query.shape[1] - rows * width :]
            query = query.reshape(query.shape[0], rows, width, -1).transpose(0, 1)
            outputs.append(_over_group(self, call, query, group, packed=True).transpose(1, 2))
        if not outputs:
            return []
        output = outputs[0]
        if self.is_long is not None:
            output = torch.where(self.is_long[:, None, None, None], outputs[1], output)
        return [output.reshape(-1, *output.shape[2:])]

    def _chunk(self, call: Call, group: Group) -> Float[Tensor, "tokens heads value_dim"]:
        assert group.queries is not None
        query = call.query[:, group.queries].transpose(0, 1)
        output = _over_group(self, call, query, group, packed=False).transpose(1, 2)
        return output.reshape(-1, *output.shape[2:])[group.returns]


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens key_dim"],
    key: Float[Tensor, "1 kv_heads tokens key_dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: Plan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **unused: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Transformers' attention interface. `softcap` and `s_aux` (attention sinks) as in Gemma 2 and gpt-oss."""
    assert plan is not None, "it does not hand keyword arguments through to its attention layers"
    layer: int = module.layer_idx  # type: ignore[assignment]
    plan.layers_called.append(layer)
    call = Call(layer, query[0], scaling, sliding_window, softcap, s_aux)
    return plan.attend(call, key[0], value[0])[None], None


def register() -> None:
    """Make the function known to Transformers under NAME. No mask function under that name: no mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def _over_group(
    plan: AttentionPlan,
    call: Call,
    query: Float[Tensor, "rows heads queries key_dim"],
    group: Group,
    packed: bool,
) -> Float[Tensor, "rows heads queries value_dim"]:
    keys, values = plan.cache.read(call.layer, group.slots, group.length)
    mask = group.mask(call.window, query.dtype)
    if call.softcap is not None or call.sinks is not None:
        return _explicit(call, query, keys, values, mask)
    if packed:
        return _packed(query, keys, values, mask, call.scaling, plan.query_multiple)
    if query.device.type == "cpu":
        return F.scaled_dot_product_attention(
            query, keys, values, mask[:, None], scale=call.scaling, enable_gqa=True
        )
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, mask[:, None], scale=call.scaling)


def _packed(
    query: Float[Tensor, "rows heads queries key_dim"],
    keys: Tensor,
    values: Tensor,
    mask: Float[Tensor, "rows queries length"],
    scaling: float | None,
    multiple: int,
) -> Float[Tensor, "rows heads queries value_dim"]:
    """The query heads that share a key/value head become queries of it, so that no key is copied per head."""
    rows, heads, width, dim = query.shape
    kv_heads = keys.shape[1]
    per_head = heads // kv_heads
    packed = query.reshape(rows, kv_heads, per_head * width, dim)
    wide = (
        mask[:, None]
        if per_head == 1
        else mask[:, None, None].expand(-1, 1, per_head, -1, -1).flatten(2, 3)
    )
    padding = round_up(per_head * width, multiple) - per_head * width
    if padding:
        packed = F.pad(packed, (0, 0, 0, padding))
        wide = F.pad(wide, (0, 0, 0, padding))
    output = F.scaled_dot_product_attention(packed, keys, values, wide, scale=scaling)
    return output[:, :, : per_head * width].reshape(rows, heads, width, -1)


def _explicit(
    call: Call,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Float[Tensor, "rows queries length"],
) -> Float[Tensor, "rows heads queries value_dim"]:
    """Written out, for what the fused kernels lack: scores capped by tanh, and a sink that only takes weight."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    scores = (
        query
        @ keys.transpose(-1, -2)
        * (query.shape[-1] ** -0.5 if call.scaling is None else call.scaling)
    )
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores + mask[:, None]
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values
