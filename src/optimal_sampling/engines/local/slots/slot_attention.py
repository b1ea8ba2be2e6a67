"""Keys and values of one model in slots of equal length, and attention over them with SDPA.

Slot s holds its token p at index `s * length + p`, so the first slots are a view.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optimal_sampling.engines.local.attention import AttentionCall
from optimal_sampling.engines.local.memory import Lengths, SlotManager, round_up
from optimal_sampling.engines.local.runner import FlatCache

__all__ = ["ChunkGroup", "Group", "SlotCache", "SlotPlan"]


class SlotCache(FlatCache):
    """Changes size by reallocation, layer by layer."""

    def __init__(self, manager: SlotManager) -> None:
        super().__init__()
        self.manager: SlotManager = manager

    @property
    def tokens(self) -> int:
        """All slots, and the scratch token."""
        return self.manager.tokens

    def make_room(self, lengths: Lengths, width: int) -> None:
        """Give every layer the manager's new shape; what fits of the old content is kept."""
        old = self.manager.slots, self.manager.length
        new = self.manager.reserve(lengths, width)
        for memories in (self._keys, self._values):
            for layer in memories:
                memories[layer] = _reshaped(memories[layer], old, new)

    def read(
        self, layer: int, slots: slice | Int[Tensor, " rows"], length: int
    ) -> tuple[
        Float[Tensor, "rows heads length key_dim"],
        Float[Tensor, "rows heads length value_dim"],
    ]:
        """Keys and values of some slots' first `length` tokens: views of a slice, else copies."""
        shape = self.manager.slots, self.manager.length
        keys = _slotted(self._keys[layer], shape)[slots, :length]
        values = _slotted(self._values[layer], shape)[slots, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def move(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot over another's."""
        for slotted in self._slotted_memories():
            slotted[target, :count] = slotted[source, :count]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a slot."""
        for slotted in self._slotted_memories():
            slotted[row] = 0

    def release(self) -> None:
        """Free the memory."""
        self.manager.release()
        self._keys.clear()
        self._values.clear()

    def _slotted_memories(self) -> list[Float[Tensor, "slots length heads dim"]]:
        shape = self.manager.slots, self.manager.length
        return [_slotted(memory, shape) for memory in self.memories()]


def _slotted(memory: Tensor, shape: tuple[int, int]) -> Float[Tensor, "slots length heads dim"]:
    slots, length = shape
    return memory[: slots * length].view(slots, length, *memory.shape[1:])


def _reshaped(
    memory: Float[Tensor, "tokens heads dim"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "more_tokens heads dim"]:
    """The memory in another shape (slots, length); what both shapes have is copied."""
    made = memory.new_zeros(new[0] * new[1] + 1, *memory.shape[1:])
    slots, length = map(min, old, new)
    if slots and length:
        kept = _slotted(memory, old)[:slots, :length]
        _slotted(made, new)[:slots, :length] = kept
    return made


@dataclass(eq=False, kw_only=True)
class Group:
    """Rows that attend in one call over `length` keys: the last tokens of the flat row."""

    slots: slice | Tensor
    positions: Int[Tensor, "rows queries"]
    length: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "rows queries length"]:
        """0 where a query may look, else -inf: causal, and at most `window` keys back."""
        if window not in self._masks:
            keys = torch.arange(self.length, device=self.positions.device)
            last = self.positions[..., None]
            seen = keys <= last
            if window is not None:
                seen &= keys > last - window
            blocked = torch.full((), float("-inf"), dtype=dtype, device=last.device)
            self._masks[window] = torch.where(seen, torch.zeros_like(blocked), blocked)
        return self._masks[window]


@dataclass(eq=False, kw_only=True)
class ChunkGroup(Group):
    """Prompt chunks of similar length, padded to the longest."""

    queries: Int[Tensor, "rows queries"]
    """Indices into the flat tokens."""
    returns: Int[Tensor, " tokens"]
    """Which of the flattened outputs are no padding, in the order of the flat tokens."""


@dataclass(eq=False)
class SlotPlan:
    """`AttentionPlan` of one forward pass over slots."""

    cache: SlotCache
    write: Int[Tensor, " tokens"]
    padding: int
    """Leading tokens that are neither chunk nor decoding."""
    chunks: list[ChunkGroup]
    dense: list[Group]
    """One group, or two over short and long keys (`ShapeRules.kv_boundary`)."""
    is_long: Bool[Tensor, " rows"] | None
    """Selects from two dense groups."""
    query_multiple: int
    layers_called: list[int] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)

    def attend(
        self,
        call: AttentionCall,
        key: Float[Tensor, "kv_heads tokens dim"],
        value: Float[Tensor, "kv_heads tokens dim"],
    ) -> Float[Tensor, "tokens heads dim"]:
        """Store the tokens of this forward pass, then attend group by group."""
        if call.softcap is not None:
            self.needs.add("soft caps")
        if call.sinks is not None:
            self.needs.add("sinks")
        self.cache.write(call.layer, self.write, key.transpose(0, 1), value.transpose(0, 1))
        parts = [self._chunk(call, group) for group in self.chunks]
        if self.dense:
            parts.append(self._dense(call))
        if self.padding:
            heads, dim = call.query.shape[0], value.shape[-1]
            parts.insert(0, call.query.new_zeros(self.padding, heads, dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _dense(self, call: AttentionCall) -> Float[Tensor, "tokens heads value_dim"]:
        outputs = []
        for group in self.dense:
            rows, width = group.positions.shape
            query = call.query[:, call.query.shape[1] - rows * width :]
            query = query.reshape(query.shape[0], rows, width, -1).transpose(0, 1)
            outputs.append(_over_group(self, call, query, group, packed=True).transpose(1, 2))
        output = outputs[0]
        if self.is_long is not None:
            output = torch.where(self.is_long[:, None, None, None], outputs[1], output)
        return output.reshape(-1, *output.shape[2:])

    def _chunk(
        self, call: AttentionCall, group: ChunkGroup
    ) -> Float[Tensor, "tokens heads value_dim"]:
        query = call.query[:, group.queries].transpose(0, 1)
        output = _over_group(self, call, query, group, packed=False).transpose(1, 2)
        return output.reshape(-1, *output.shape[2:])[group.returns]


def _over_group(
    plan: SlotPlan,
    call: AttentionCall,
    query: Float[Tensor, "rows heads queries key_dim"],
    group: Group,
    packed: bool,
) -> Float[Tensor, "rows heads queries value_dim"]:
    keys, values = plan.cache.read(call.layer, group.slots, group.length)
    mask = group.mask(call.window, query.dtype)[:, None]
    if call.softcap is not None or call.sinks is not None:
        return _explicit(call, query, keys, values, mask)
    if packed:
        return _packed(query, keys, values, mask, call.scaling, plan.query_multiple)
    shared_heads = query.device.type == "cpu"
    if not shared_heads:
        keys, values = _repeated(query, keys), _repeated(query, values)
    return F.scaled_dot_product_attention(
        query, keys, values, mask, scale=call.scaling, enable_gqa=shared_heads
    )


def _repeated(
    query: Float[Tensor, "rows heads queries key_dim"],
    memory: Float[Tensor, "rows kv_heads length dim"],
) -> Float[Tensor, "rows heads length dim"]:
    """Each key/value head once for every query head that shares it."""
    return memory.repeat_interleave(query.shape[1] // memory.shape[1], 1)


def _packed(
    query: Float[Tensor, "rows heads queries key_dim"],
    keys: Float[Tensor, "rows kv_heads length key_dim"],
    values: Float[Tensor, "rows kv_heads length value_dim"],
    mask: Float[Tensor, "rows 1 queries length"],
    scaling: float | None,
    multiple: int,
) -> Float[Tensor, "rows heads queries value_dim"]:
    """Query heads that share a key/value head become queries of it: no key is copied per head."""
    rows, heads, width, dim = query.shape
    kv_heads = keys.shape[1]
    per_head = heads // kv_heads
    queries = per_head * width
    packed = query.reshape(rows, kv_heads, queries, dim)
    if per_head > 1:
        mask = mask[:, None].expand(-1, 1, per_head, -1, -1).flatten(2, 3)
    padding = round_up(queries, multiple) - queries
    if padding:
        packed = F.pad(packed, (0, 0, 0, padding))
        mask = F.pad(mask, (0, 0, 0, padding))
    output = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scaling)
    return output[:, :, :queries].reshape(rows, heads, width, -1)


def _explicit(
    call: AttentionCall,
    query: Float[Tensor, "rows heads queries key_dim"],
    keys: Float[Tensor, "rows kv_heads length key_dim"],
    values: Float[Tensor, "rows kv_heads length value_dim"],
    mask: Float[Tensor, "rows 1 queries length"],
) -> Float[Tensor, "rows heads queries value_dim"]:
    """Written out, for what fused functions lack: scores capped by tanh, and attention sinks.

    A sink is a score per head that takes weight and has no value.
    """
    keys, values = _repeated(query, keys), _repeated(query, values)
    scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = query @ keys.transpose(-1, -2) * scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores + mask
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : keys.shape[2]] @ values
