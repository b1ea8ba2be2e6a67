"""KV memory of a run: which sequences fit, and in which order caches change size.

Plain Python: a manager counts tokens and bytes, and its cache (cache.py) holds the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["BlockManager", "KVMemory", "Lengths", "round_up"]

Lengths: TypeAlias = Sequence[Sequence[int]]
"""Tokens of every sequence, one number per context."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-value // multiple) * multiple


class BlockManager(ABC):
    """Memory of one cache, which holds a row per sequence and context, in this order.

    Every kind of memory also has a method `reserve(lengths, width)`: it gives each row memory for
    its tokens and `width` more, and returns what the cache then has to do with its tensors.
    """

    def __init__(self, contexts: tuple[int, ...], bytes_per_token: int) -> None:
        self.contexts = contexts
        self.bytes_per_token = bytes_per_token

    def row_lengths(self, lengths: Lengths, width: int) -> list[int]:
        """Tokens of each row of this cache, with `width` more."""
        return [tokens[context] + width for tokens in lengths for context in self.contexts]

    @property
    @abstractmethod
    def held(self) -> int:
        """Bytes that the rows occupy now."""

    @abstractmethod
    def bytes_needed(self, lengths: Lengths, width: int) -> int:
        """Bytes that these sequences occupy once they have `width` more tokens."""

    @abstractmethod
    def has_room(self, lengths: Lengths, width: int) -> bool:
        """Whether `reserve` would have nothing to do."""

    def fits(self, lengths: Lengths, width: int) -> bool:
        """Whether this cache can hold the sequences, whatever the others hold."""
        return True

    def move(self, source: int, target: int) -> None:  # noqa: B027 - most kinds copy tensors
        """Row `target` takes over what row `source` holds."""


class KVMemory:
    """The caches of one run, which share a budget of bytes."""

    def __init__(self, managers: Sequence[BlockManager], budget: int) -> None:
        self.managers = tuple(managers)
        self.budget = budget

    @property
    def held(self) -> int:
        """Bytes that all rows occupy now."""
        return sum(manager.held for manager in self.managers)

    def bytes_needed(self, lengths: Lengths, width: int) -> int:
        """Bytes of all caches, were exactly these sequences running."""
        return sum(manager.bytes_needed(lengths, width) for manager in self.managers)

    def fits(self, lengths: Lengths, width: int) -> bool:
        """Whether these sequences can run together and decode `width` more tokens each."""
        return self.bytes_needed(lengths, width) <= self.budget and all(
            manager.fits(lengths, width) for manager in self.managers
        )

    def reservations(self, lengths: Lengths, width: int) -> list[int]:
        """Indices of the managers that have to reserve, in order, for sequences that fit.

        Caches keep surplus memory while the budget allows it. Where growth would exceed the
        budget, all caches take the size that they need, those that shrink first: so `held` is
        within the budget before and after each step. A step itself copies layer by layer, and
        has the old and the new memory of one layer's keys or values at a time.
        """
        full = [i for i, m in enumerate(self.managers) if not m.has_room(lengths, width)]
        if not full:
            return []
        growth = [m.bytes_needed(lengths, width) - m.held for m in self.managers]
        if self.held + sum(growth[i] for i in full) > self.budget:
            full = list(range(len(self.managers)))
        return sorted(full, key=growth.__getitem__)
