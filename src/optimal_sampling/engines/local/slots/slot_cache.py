"""Keys and values of one model in slots of equal length.

Slot s holds its token p at index `s * length + p`, so the first slots are a view.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.cache import FlatCache
from optimal_sampling.engines.local.memory import Lengths
from optimal_sampling.engines.local.slots.slot_manager import SlotManager

__all__ = ["SlotCache"]


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
        keys = _slotted(self._keys[layer], *shape)[slots, :length]
        values = _slotted(self._values[layer], *shape)[slots, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def move(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot over another's."""
        for memory in self.memories():
            slotted = _slotted(memory, self.manager.slots, self.manager.length)
            slotted[target, :count] = slotted[source, :count]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a slot."""
        for memory in self.memories():
            _slotted(memory, self.manager.slots, self.manager.length)[row] = 0

    def release(self) -> None:
        """Free the memory."""
        self.manager.release()
        self._keys.clear()
        self._values.clear()


def _slotted(memory: Tensor, slots: int, length: int) -> Float[Tensor, "slots length heads dim"]:
    return memory[: slots * length].view(slots, length, *memory.shape[1:])


def _reshaped(
    memory: Float[Tensor, "tokens heads dim"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "more_tokens heads dim"]:
    """The memory in another shape (slots, length); what both shapes have is copied."""
    made = memory.new_zeros(new[0] * new[1] + 1, *memory.shape[1:])
    slots, length = min(old[0], new[0]), min(old[1], new[1])
    if slots and length:
        _slotted(made, *new)[:slots, :length] = _slotted(memory, *old)[:slots, :length]
    return made
