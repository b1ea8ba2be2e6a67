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

_TRIED = (8, 2, MOST_WIDTH, 4)
"""Widths from which the times are learned: those of the first rounds, ..."""
_TRIED_EVERY = 16
"""... and in turn of one round in so many, so that the times stay known."""
_TOKENS_OF_REQUEST = 8
"""Tokens that take as long as a request by itself, before anything else is known."""
_OUTLIER = 3.0
"""A request that took so many times what was expected counts as if it took just that."""
_KEPT = 0.99
"""Weight of an observation of the agreement after one more."""
_AGREE = 0.85
"""Agreement from which on a first path is drafted alone: asking both saves (1 - agreement) / 2 of
the rounds at most, and makes both servers slower where they share a machine."""
_GUESSED = 0.6
"""The agreement, before any token was drawn."""
_GUESS_COUNTS = 4
"""Tokens that the guess counts for."""


class RequestTime(LinearCost):
    """Seconds of a request by its width, on a machine that others use too."""

    def observe(self, size: float, seconds: float) -> None:
        """As in `LinearCost`; the first one gives a guess of other widths' times."""
        if self.known and seconds < self(size) / _OUTLIER:
            vars(self).update(vars(LinearCost()))  # what was known was of a slow moment
        if not self.known:
            per_token = seconds / (size + _TOKENS_OF_REQUEST)
            for guessed in (1, MOST_WIDTH):
                super().observe(guessed, per_token * (guessed + _TOKENS_OF_REQUEST))
        super().observe(size, min(seconds, _OUTLIER * self(size)))


class DraftWidth:
    """Tokens asked for in one request. `draft_tokens`: more than one, or `auto`."""

    def __init__(self, draft_tokens: DraftTokens, is_possible: bool) -> None:
        self.fixed = 1 if not is_possible else None
        if is_possible and draft_tokens != "auto":
            self.fixed = draft_tokens + 1
        self.rounds = 0
        self.agreement = _GUESSED
        """Share of tokens drawn that were the likeliest of the drafting server."""
        self._tokens = _GUESS_COUNTS
        self._drafting = RequestTime()
        self._scoring = RequestTime()

    def observe_token(self, was_likeliest: bool) -> None:
        """One more token was drawn."""
        self._tokens += 1
        share = max(1 / self._tokens, 1 - _KEPT)
        self.agreement += share * (was_likeliest - self.agreement)

    def observe_drafting(self, width: int, seconds: float) -> None:
        """A request for `width` tokens was answered."""
        self._drafting.observe(width, seconds)

    def observe_scoring(self, width: int, seconds: float) -> None:
        """A request for the lists of `width` positions was answered."""
        self._scoring.observe(width, seconds)

    @property
    def drafts_alone(self) -> bool:
        """Whether a path is drafted before the other server is asked for anything.

        It saves a request. Asking both gives one token at once, and shows an early disagreement.
        """
        return self.agreement >= _AGREE

    def choose(self) -> int:
        """The width of one more round."""
        self.rounds += 1
        if self.fixed is not None:
            return self.fixed
        if self.rounds <= len(_TRIED):
            return _TRIED[self.rounds - 1]
        turn, is_other = divmod(self.rounds, _TRIED_EVERY)
        return self.best() if is_other else _TRIED[turn % len(_TRIED)]

    def best(self) -> int:
        """The width with the most tokens per second."""
        return max(range(1, MOST_WIDTH + 1), key=self.rate)

    def rate(self, width: int) -> float:
        """Tokens per second of rounds of this width.

        A share of them, those with a wrong draft, is followed by a round without a path.
        """
        tokens = sum(self.agreement**place for place in range(width))
        wrong = 1 - self.agreement**width if width > 1 else 0.0
        drafting = self._drafting(width)
        seconds = max(drafting, self._scoring(width))
        if self.drafts_alone:
            return tokens / max(seconds + wrong * drafting, 1e-9)
        return (tokens + wrong) / max((1 + wrong) * seconds, 1e-9)
