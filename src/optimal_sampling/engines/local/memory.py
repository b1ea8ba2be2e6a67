"""KV memory of a run: which sequences fit, and in which order caches change size.

No tensors: a manager counts tokens and bytes, and its cache (runner.py) holds the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int

__all__ = ["BlockManager", "KVMemory", "Lengths", "SlotManager", "round_up"]

Lengths: TypeAlias = Int[np.ndarray, "sequences contexts"]
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
        self._columns = slice(contexts[0], contexts[-1] + 1)  # a list would cost a copy
        self.bytes_per_token = bytes_per_token

    def row_lengths(self, lengths: Lengths, width: int) -> Int[np.ndarray, " rows"]:
        """Tokens of each row of this cache, with `width` more."""
        rows: Int[np.ndarray, " rows"] = np.asarray(lengths)[:, self._columns].ravel() + width
        return rows

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


class SlotManager(BlockManager):
    """Row r is slot r of `slots`, each of `length` tokens; one more token is scratch.

    `slot_length`: memory for a row of that many tokens. `most_rows`: most sequences at once.
    """

    def __init__(
        self,
        contexts: tuple[int, ...],
        bytes_per_token: int,
        slot_length: Callable[[int], int],
        most_rows: int,
    ) -> None:
        super().__init__(contexts, bytes_per_token)
        self.slots = 0
        self.length = 0
        self._slot_length = slot_length
        self._most_rows = most_rows

    @property
    def tokens(self) -> int:
        """Size of a layer's memory: all slots, and the scratch token.

        Padding is written to the scratch token, the last one, which is never read.
        """
        return self.slots * self.length + 1

    @property
    def held(self) -> int:
        """Bytes of all slots and of the scratch token."""
        return self.tokens * self.bytes_per_token if self.slots else 0

    def bytes_needed(self, lengths: Lengths, width: int) -> int:
        """Bytes of as many slots as these sequences take, each as long as the longest row."""
        slots, length = self._shape(lengths, width)
        return (slots * length + 1) * self.bytes_per_token

    def has_room(self, lengths: Lengths, width: int) -> bool:
        """Whether there are enough slots, and long enough ones."""
        slots, length = self._shape(lengths, width)
        return slots <= self.slots and length <= self.length

    def reserve(self, lengths: Lengths, width: int) -> tuple[int, int]:
        """The (slots, length) that the memory now has to have; fewer or shorter ones too."""
        self.slots, self.length = self._shape(lengths, width)
        return self.slots, self.length

    def release(self) -> None:
        """No slot is left."""
        self.slots = self.length = 0

    def _shape(self, lengths: Lengths, width: int) -> tuple[int, int]:
        """The number of sequences is rounded to a power of two, so that the memory seldom moves."""
        sequences = min(self._most_rows, 1 << (len(lengths) - 1).bit_length())
        longest = int(self.row_lengths(lengths, width).max())
        return sequences * len(self.contexts), self._slot_length(longest)
