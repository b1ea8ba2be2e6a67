"""How many tokens to draft, and drafts looked up in the text. No tensors.

Drafts never change what is drawn, only how many tokens a round yields.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["DraftPolicy", "ExpectedTokens", "FixedDrafts", "LinearCost", "Lookup", "PerRound"]

MOST_DRAFTS = 16
"""Longest draft that `auto` considers."""
FORGET = 0.98
"""Weight of an observation after one more."""
PROBE_EVERY = 100
"""Rounds of one kind, with drafts or plain, after which the other kind is tried again."""
PROBE_WIDTH = 3
"""Of the round with drafts that is tried: one of the widths of the first rounds."""
PLAIN_PROBE = 4
"""Plain rounds that are tried in a row: where the first is not queued ahead it tells nothing."""


class LinearCost:
    """Seconds as a linear function of a size, fitted to observations whose weight decays."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, size: float, seconds: float) -> None:
        """Add one measurement."""
        self._n = FORGET * self._n + 1.0
        self._x = FORGET * self._x + size
        self._y = FORGET * self._y + seconds
        self._xx = FORGET * self._xx + size * size
        self._xy = FORGET * self._xy + size * seconds

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._n > 0

    def fade(self) -> None:
        """Let the measurements count for less beside the next one."""
        if self._n > 1e-6:  # their mean stays known however old it is
            self._n, self._x, self._y = FORGET * self._n, FORGET * self._x, FORGET * self._y
            self._xx, self._xy = FORGET * self._xx, FORGET * self._xy

    def line(self) -> tuple[float, float]:
        """Seconds at size 0, and per unit of size. Neither is negative."""
        if not self._n:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        if spread <= 1e-9 * max(1.0, mean_x**2):
            return mean_y, 0.0
        slope = (self._xy / self._n - mean_x * mean_y) / spread
        slope = min(max(0.0, slope), mean_y / mean_x)
        return mean_y - slope * mean_x, slope

    def __call__(self, size: float) -> float:
        """Seconds at this size."""
        start, slope = self.line()
        return start + slope * size


class Calibration:
    """Share of drafts that were accepted, by the probability that the drafter gave them."""

    BINS = 10
    PRIOR = 4.0
    KEPT = 0.999
    """Weight of an observation after one more."""

    def __init__(self) -> None:
        centres = (np.arange(self.BINS) + 0.5) / self.BINS
        self._tried = np.full(self.BINS, self.PRIOR)
        self._accepted = self.PRIOR * (0.4 + 0.6 * centres)

    def observe(
        self, confidences: Float[np.ndarray, " drafts"], accepted: Bool[np.ndarray, " drafts"]
    ) -> None:
        """Add drafts whose predecessors were all accepted. Their order does not matter."""
        bins = self._bins(confidences)
        tried = np.bincount(bins, minlength=self.BINS)
        share = np.bincount(bins, accepted, self.BINS) / np.maximum(tried, 1)
        kept = self.KEPT**tried
        added = (1 - kept) / (1 - self.KEPT)  # 1 + KEPT + KEPT^2 + ...
        self._tried = kept * self._tried + added
        self._accepted = kept * self._accepted + added * share

    def __call__(self, confidences: Float[np.ndarray, " drafts"]) -> Float[np.ndarray, " drafts"]:
        """Probability that such drafts are accepted."""
        rates = self._accepted / self._tried
        chances: Float[np.ndarray, " drafts"] = rates[self._bins(confidences)]
        return chances

    def _bins(self, confidences: Float[np.ndarray, " drafts"]) -> Int[np.ndarray, " drafts"]:
        return np.minimum((confidences * self.BINS).astype(np.int64), self.BINS - 1)


class ExpectedTokens:
    """Tokens of a round per row, by its width, from how many drafts were accepted.

    The first draft of a row is counted apart: where drafts are looked up, many rows have none.
    """

    FADE = 0.998
    """Weight of what is known after one round without drafts: acceptance changes slowly."""

    def __init__(self) -> None:
        self._tried = np.ones(2)
        self._accepted = np.full(2, 0.7)

    def observe(
        self, accepted: Bool[np.ndarray, "rows drafts"], tried: Bool[np.ndarray, "rows drafts"]
    ) -> None:
        """Add a round. `tried`: all drafts before this one were accepted, and the text went on."""
        for part, places in enumerate((slice(0, 1), slice(1, None))):
            counted = tried[:, places]
            taken = accepted[:, places] & counted
            self._tried[part] = FORGET * self._tried[part] + counted.sum()
            self._accepted[part] = FORGET * self._accepted[part] + taken.sum()

    def fade(self) -> None:
        """Let all of it count for less beside the next round."""
        self._tried *= self.FADE
        self._accepted *= self.FADE

    def by_width(self, most: int) -> Float[np.ndarray, " widths"]:
        """Of rounds of widths 1, ..., `most`."""
        first, later = self._accepted / self._tried
        more = first * later ** np.arange(most - 1)
        expected: Float[np.ndarray, " widths"] = 1 + np.concatenate([[0.0], more.cumsum()])
        return expected


class PerRound:
    """Expected tokens and seconds of one round, while it is being drafted.

    A round of width n over R rows costs n - 1 drafter steps and one verification of n * R tokens,
    to which the drafter's own pass over the last draft counts. It yields one token per row, and one
    more for every draft that is accepted with all before it.
    Drafting goes on while one more draft raises tokens per second: tokens are concave in n and
    seconds linear, so the first decrease is the end.
    """

    def __init__(self, policy: DraftPolicy, ready: Sequence[bool]) -> None:
        self._policy = policy
        self._rows = len(ready)
        self._alive = np.array(ready, dtype=np.float64)
        self._tokens = float(self._alive.sum())
        self.drafted = 0
        self.confidences: list[Float[np.ndarray, " rows"]] = []

    def wants(self, confidences: Float[np.ndarray, " rows"], insist: bool = False) -> bool:
        """Whether to draft one more token per row, given the drafter's probability of each.

        `insist`: draft it in any case; the same in all calls of a round.
        """
        if not insist and not self._pays(confidences):
            return False
        self.drafted += 1
        self.confidences.append(confidences)
        return True

    def _pays(self, confidences: Float[np.ndarray, " rows"]) -> bool:
        """Whether tokens per second rise; if so, the draft is counted as made."""
        alive = self._alive * self._policy.accept(confidences)
        tokens = self._tokens + float(alive.sum())
        width = self.drafted + 1
        now = self._policy.seconds(width, self._rows)
        more = self._policy.seconds(width + 1, self._rows)
        if tokens * now <= self._tokens * more and not self._first_in_any_case:
            return False
        self._alive, self._tokens = alive, tokens
        return True

    @property
    def _first_in_any_case(self) -> bool:
        """Whether this is the first draft, of a round that would be plain if none paid."""
        return not self.drafted and self._policy.plain.known


class DraftPolicy:
    """`auto`: measures acceptance and the cost of forward passes, and drafts while that pays.

    A *plain* round has no drafts. Where both models run side by side in it, or it is queued before
    the tokens of the round before are known, it costs less than its forward passes one after the
    other. Then its seconds are measured apart, and compared with the best round that has drafts.
    """

    EXPLORE = (5, 1, 9, 3)
    """Widths of the first rounds, in which costs at different sizes are measured."""

    def __init__(self, most: int = MOST_DRAFTS) -> None:
        self.most = most
        self.step = LinearCost()
        self.verify = LinearCost()
        self.rest = LinearCost()
        self.plain = LinearCost()
        """Of a whole plain round, by its rows."""
        self.accept = Calibration()
        self.tokens = ExpectedTokens()
        self._rounds = 0
        self._without_drafts = 0
        """Rounds since the latest with drafts."""
        self._without_plain = PROBE_EVERY
        """Rounds since the latest plain one."""
        self._plain_due = 0
        """Rounds that will be plain whatever is known."""

    def seconds(self, width: int, rows: int) -> float:
        """Expected duration of a round that is not plain."""
        drafting = (width - 1) * self.step(rows)
        return drafting + self.verify(width * rows) + self.rest(width * rows)

    def forced(self) -> int | None:
        """Width of the next round where it is fixed for measuring; None: draft while it pays.

        After PROBE_EVERY rounds without drafts two are made, as otherwise a change of costs or of
        acceptance would not be noticed.
        """
        if self._rounds < len(self.EXPLORE):
            return self.EXPLORE[self._rounds]
        return PROBE_WIDTH if self._without_drafts >= PROBE_EVERY else None

    def plain_next(self, rows: int) -> bool:
        """Whether the next round, of so many rows, is to be a plain one; if so, it is counted."""
        if not self._plain_due:
            if self.forced() is not None:
                return False
            if self._without_plain >= PROBE_EVERY:
                self._plain_due = PLAIN_PROBE
            elif not self._plain_pays(rows):
                return False
        self._plain_due = max(0, self._plain_due - 1)
        self._without_plain = 0
        self._without_drafts += 1
        for known in (self.step, self.verify, self.rest, self.tokens):
            known.fade()
        return True

    def _plain_pays(self, rows: int) -> bool:
        """Whether a plain round gives more tokens per second than a round of any width."""
        if not self.plain.known:
            return False
        tokens = self.tokens.by_width(self.most + 1)
        return bool((tokens * self.plain(rows) <= self._every_width(rows)).all())

    def _every_width(self, rows: int) -> Float[np.ndarray, " widths"]:
        """`seconds` of widths 1, 2, ..."""
        start, slope = np.add(self.verify.line(), self.rest.line())
        widths = np.arange(1, self.most + 2)
        drafting, more = (widths - 1) * self.step(rows), widths * slope * rows
        spent: Float[np.ndarray, " widths"] = start + drafting + more
        return spent

    def no_room(self) -> None:
        """A round was to have drafts and has no room for any: the next few are plain."""
        self._without_drafts = 0
        self._plain_due = PLAIN_PROBE

    def observe_plain(self, rows: int, seconds: float) -> None:
        """Seconds of a plain round, from the end of the one before it where it was queued ahead."""
        self.plain.observe(rows, seconds)

    def observe_round(self, width: int, rows: int, step: float, verify: float, rest: float) -> None:
        """Seconds of a round without prompt tokens: drafting, verification, the rest."""
        self._rounds += 1
        self._without_plain += 1
        self._without_drafts = self._without_drafts + 1 if width == 1 else 0
        if width > 1:
            self.step.observe(rows, step / (width - 1))
        self.verify.observe(width * rows, verify)
        self.rest.observe(width * rows, rest)
        self.plain.fade()

    def observe_drafts(
        self,
        confidences: Float[np.ndarray, "rows drafts"],
        accepted: Bool[np.ndarray, "rows drafts"],
        tried: Bool[np.ndarray, "rows drafts"],
    ) -> None:
        """Add a round. `tried` as in `ExpectedTokens.observe`; confidence 0: there was no draft."""
        self.tokens.observe(accepted, tried)
        known = tried & (confidences > 0)
        self.accept.observe(confidences[known], accepted[known])


class FixedDrafts(DraftPolicy):
    """Always `count` drafts; 0 is plain decoding."""

    def __init__(self, count: int) -> None:
        super().__init__(count)

    def forced(self) -> int | None:
        """The same width every time."""
        return self.most + 1

    def plain_next(self, rows: int) -> bool:
        """Every time or never."""
        return self.most == 0

    def observe_drafts(
        self,
        confidences: Float[np.ndarray, "rows drafts"],
        accepted: Bool[np.ndarray, "rows drafts"],
        tried: Bool[np.ndarray, "rows drafts"],
    ) -> None:
        """Nothing follows from them."""


class Lookup:
    """Drafts that followed an earlier place of the text with the same last tokens.

    The text is the longest prompt, then the output. Where the teacher is shown a solution, the
    drafts continue the solution.
    """

    LONGEST = 4
    """Number of last tokens that are looked up; fewer where there is no match, to SHORTEST."""
    SHORTEST = 2

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(prompts, key=len)
        self._text = list(longest)
        self._prompt = len(self._text)
        self._last: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, output: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the latest match; may be none."""
        self._text[self._prompt :] = output
        self._index()
        for size in range(self.LONGEST, self.SHORTEST - 1, -1):
            place = self._last.get(tuple(self._text[-size:]))
            if place is not None:
                return self._text[place : place + count]
        return []

    def _index(self) -> None:
        """Map every n-gram to the place after it; the last n-gram has no continuation yet."""
        for end in range(max(self._indexed, 1), len(self._text)):
            for size in range(self.SHORTEST, self.LONGEST + 1):
                if end >= size:
                    self._last[tuple(self._text[end - size : end])] = end
        self._indexed = len(self._text)
