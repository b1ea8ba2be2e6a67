"""Keys and values of all rows of one model, in slots.

Per layer a flat memory of `slots * length + 1` tokens: slot s holds its token p at `s * length + p`, so the dense
rows 0..R-1 are a view. The last token is scratch: padding is written there and never read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Cache", "KVCache"]


class Cache(ABC):
    """Keys and values of all rows of one model. A layer's memory is made at its first `write`."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def layers(self) -> int:
        """Number of layers that have written."""
        return len(self._keys)

    @property
    def bytes_per_token(self) -> int:
        """Memory of one token of one row over all layers. Known once every layer has written."""
        return sum(m.shape[1] * m.shape[2] * m.element_size() for m in self._memories())

    @property
    def head_dims(self) -> set[int]:
        """Dimensions of the keys' and values' heads, over all layers."""
        return {memory.shape[-1] for memory in self._memories()}

    @property
    def held(self) -> int:
        """Bytes that are allocated."""
        return sum(m.numel() * m.element_size() for m in self._memories())

    def _memories(self) -> list[Tensor]:
        return [*self._keys.values(), *self._values.values()]

    def write(
        self,
        layer: int,
        index: Int[Tensor, " tokens"],
        keys: Float[Tensor, "tokens heads key_dim"],
        values: Float[Tensor, "tokens heads value_dim"],
    ) -> None:
        """Store the tokens of one forward at these flat indices."""
        if layer not in self._keys:
            # zeros, not empty: a masked position takes part in a product with weight 0, and 0 * NaN is NaN
            self._keys[layer] = keys.new_zeros(self.tokens, *keys.shape[1:])
            self._values[layer] = values.new_zeros(self.tokens, *values.shape[1:])
        self._keys[layer].index_copy_(0, index, keys)
        self._values[layer].index_copy_(0, index, values)

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens that a layer's memory holds."""

    @abstractmethod
    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` becomes what row `source` is, whose first `count` tokens matter."""

    @abstractmethod
    def clear(self, row: int) -> None:
        """Zero a row. Needed after one whose model gave NaN: its keys would poison the next row there."""


class KVCache(Cache):
    """Rows in slots of equal length. Grows by reallocation, layer by layer, when `reshape` asks."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = 0
        self.length = 0

    @property
    def tokens(self) -> int:
        """All slots, and the scratch."""
        return self.slots * self.length + 1

    @property
    def scratch(self) -> int:
        """Index of the token that is written and never read."""
        return self.slots * self.length

    def reshape(self, slots: int, length: int) -> None:
        """Make room for this many slots of this length; what fits of the old content is kept."""
        for memories in (self._keys, self._values):
            for layer, old in memories.items():
                memories[layer] = self._moved(old, slots, length)
        self.slots, self.length = slots, length

    def _moved(self, old: Tensor, slots: int, length: int) -> Tensor:
        new = old.new_zeros(slots * length + 1, *old.shape[1:])
        s, n = min(slots, self.slots), min(length, self.length)
        if s and n:
            self._slotted(new, slots, length)[:s, :n] = self._slotted(old, self.slots, self.length)[
                :s, :n
            ]
        return new

    @staticmethod
    def _slotted(
        memory: Tensor, slots: int, length: int
    ) -> Float[Tensor, "slots length heads dim"]:
        return memory[: slots * length].view(slots, length, *memory.shape[1:])

    def read(
        self, layer: int, slots: slice | Int[Tensor, " rows"], length: int
    ) -> tuple[
        Float[Tensor, "rows heads length key_dim"], Float[Tensor, "rows heads length value_dim"]
    ]:
        """Keys and values of some slots' first `length` tokens: views for a slice, copies for an index."""
        keys = self._slotted(self._keys[layer], self.slots, self.length)[slots, :length]
        values = self._slotted(self._values[layer], self.slots, self.length)[slots, :length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def move(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one slot over another's."""
        for memory in self._memories():
            slotted = self._slotted(memory, self.slots, self.length)
            slotted[target, :count] = slotted[source, :count]

    def clear(self, row: int) -> None:
        """Zero a slot."""
        for memory in self._memories():
            self._slotted(memory, self.slots, self.length)[row] = 0
