"""Which of a round's tokens go into the texts, for all rows at once. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from optimal_sampling.types import FinishReason

__all__ = ["Drawing", "Emission"]


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """What was drawn at each position of a round, and where texts may end."""

    tokens: Int[np.ndarray, "rows width"]
    drafts: Int[np.ndarray, "rows drafts"]
    bad: Bool[np.ndarray, "rows width"]
    """The logits are unusable."""
    stops: Bool[np.ndarray, "rows width"]
    """The token ends its text."""
    left: Int[np.ndarray, " rows"]
    """Tokens that the text may still have."""

    @property
    def accepted(self) -> Bool[np.ndarray, "rows drafts"]:
        """The draft is the token."""
        accepted: Bool[np.ndarray, "rows drafts"] = self.tokens[:, :-1] == self.drafts
        return accepted


@dataclass(frozen=True, slots=True, eq=False)
class Emission:
    """The first `counts` tokens of each row, and the rows whose text has ended."""

    counts: Int[np.ndarray, " rows"]
    ended: dict[int, FinishReason]

    @classmethod
    def of(cls, drawing: Drawing, ready: list[bool]) -> Emission:
        """Tokens up to the first that differs from its draft, or that ends its text.

        Bad logits give no token. Rows that are not ready give none and do not end.
        """
        width = drawing.tokens.shape[1]
        full = np.arange(1, width + 1) >= drawing.left[:, None]
        ends = drawing.bad | drawing.stops | full
        halts = ends.copy()
        halts[:, :-1] |= ~drawing.accepted
        halts[:, -1] = True
        last = halts.argmax(1)
        rows = np.arange(len(last))
        counts = last + 1 - drawing.bad[rows, last]
        over = ends[rows, last]
        if not all(ready):
            counts *= ready
            over &= ready
        ended = {row: _reason(drawing, row, last[row]) for row in np.flatnonzero(over).tolist()}
        return cls(counts, ended)


def _reason(drawing: Drawing, row: int, place: int) -> FinishReason:
    if drawing.bad[row, place]:
        return "error"
    return "stop" if drawing.stops[row, place] else "length"
