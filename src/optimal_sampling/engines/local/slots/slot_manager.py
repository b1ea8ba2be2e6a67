"""Number and length of the slots of one cache. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Callable

from optimal_sampling.engines.local.memory import BlockManager, Lengths

__all__ = ["SlotManager"]


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
        """Size of a layer's memory: all slots, and the scratch token."""
        return self.slots * self.length + 1

    @property
    def scratch(self) -> int:
        """Index of the token that is written by padding and never read."""
        return self.slots * self.length

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
        longest = max([tokens[context] for tokens in lengths for context in self.contexts])
        return sequences * len(self.contexts), self._slot_length(longest + width)
