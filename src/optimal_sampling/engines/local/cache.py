"""Tensors of one model's KV cache: the interface of every kind, and the flat memory of most."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.memory import BlockManager, Lengths

__all__ = ["Cache", "FlatCache"]


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
    def layers(self) -> int:
        """Number of layers that have written."""
        return len(self._keys)

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

    def write(
        self,
        layer: int,
        index: Int[Tensor, " tokens"],
        keys: Float[Tensor, "tokens heads key_dim"],
        values: Float[Tensor, "tokens heads value_dim"],
    ) -> None:
        """Store the tokens of one forward pass at these indices."""
        if layer not in self._keys:
            # zeros, not empty: a masked key has weight 0, and 0 * NaN is NaN
            self._keys[layer] = keys.new_zeros(self.tokens, *keys.shape[1:])
            self._values[layer] = values.new_zeros(self.tokens, *values.shape[1:])
        self._keys[layer].index_copy_(0, index, keys)
        self._values[layer].index_copy_(0, index, values)
