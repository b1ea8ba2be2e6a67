"""How many tokens to ask a server for in one request, from measured times and agreement.

A round of width n has the drafting server write n tokens, its likeliest each, and the other server
score what was drafted before. It changes how many tokens a round yields, and none of them.
"""

from __future__ import annotations

from optimal_sampling.config import DraftTokens
from optimal_sampling.engines.local.drafting import LinearCost

__all__ = ["MOST_WIDTH", "DraftWidth"]

MOST_WIDTH = 16
"""Largest width that `auto` takes."""

_FIRST = (1, 4, 2, 8)
"""Widths of the first rounds, in turn, from which the times are learned."""
_LEARNING = 16
"""Rounds of them."""
_TRIED_EVERY = 12
"""Rounds, of which one has another width than the best known, so that the times stay known."""
_KEPT = 0.99
"""Weight of an observation of the agreement after one more."""


class DraftWidth:
    """Tokens asked for in one request. `draft_tokens`: more than one, or `auto`."""

    def __init__(self, draft_tokens: DraftTokens, is_possible: bool) -> None:
        self.fixed = 1 if not is_possible else None
        if is_possible and draft_tokens != "auto":
            self.fixed = draft_tokens + 1
        self.rounds = 0
        self.agreement = 0.6
        """Share of tokens drawn that were the likeliest of the drafting server."""
        self._drafting = LinearCost()
        self._scoring = LinearCost()

    def observe_token(self, was_likeliest: bool) -> None:
        """One more token was drawn."""
        self.agreement = _KEPT * self.agreement + (1 - _KEPT) * was_likeliest

    def observe_drafting(self, width: int, seconds: float) -> None:
        """A request for `width` tokens was answered."""
        self._drafting.observe(width, seconds)

    def observe_scoring(self, width: int, seconds: float) -> None:
        """A request for the lists of `width` positions was answered."""
        self._scoring.observe(width, seconds)

    def choose(self) -> int:
        """The width of one more round."""
        self.rounds += 1
        if self.fixed is not None:
            return self.fixed
        if self.rounds <= _LEARNING:
            return _FIRST[self.rounds % len(_FIRST)]
        best = self.best()
        if self.rounds % _TRIED_EVERY == 0:
            return min(2 * best, MOST_WIDTH)
        if self.rounds % _TRIED_EVERY == _TRIED_EVERY // 2:
            return max(best // 2, 1)
        return best

    def best(self) -> int:
        """The width with the most tokens per second."""
        return max(range(1, MOST_WIDTH + 1), key=self.rate)

    def rate(self, width: int) -> float:
        """Tokens per second of rounds of this width, both servers being asked at once."""
        tokens = sum(self.agreement**place for place in range(width))
        seconds = max(self._drafting(width), self._scoring(width))
        return tokens / max(seconds, 1e-9)
