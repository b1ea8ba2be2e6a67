"""`ByteView`: a model of tokens, seen as a model of bytes.

    p(byte | text) = P(text, byte, ...) / P(text, ...)

where P sums over all sequences of tokens that write the text. The view holds *hypotheses*: the
tokens so far, and the bytes of a token that is not yet complete. A model runs only where a token
ends; the bytes within a token follow from the same law of the next token.

It knows no model: contexts whose law it lacks are `wanted`, and `receive` takes the law.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from jaxtyping import Float

from optimal_sampling.engines.bytes.trie import ROOT, ByteTrie

__all__ = ["END", "SYMBOLS", "Birth", "ByteView", "Hypothesis", "TokenLaw"]

END = 256
"""The symbol after the last byte of a text."""
SYMBOLS = 257

_SMALL = 1e-3  # differences of sums are exact to 1e-13 of a mass that is larger
_KEPT = 16  # hypotheses given up that can still be taken up,
_OLDEST = 16  # and the bytes of text since they were born
_NEVER = -math.inf


@dataclass(slots=True, eq=False)
class TokenLaw:
    """The law of the token after one context."""

    log_p: Float[np.ndarray, " tokens"]
    """Of the tokens with bytes, by rank in the trie."""
    sums: Float[np.ndarray, " tokens_and_one"]
    """Cumulative sums of their probabilities, from 0."""
    end: float
    """Probability that the text ends here."""
    end_id: int = -1
    """The likeliest id that ends it."""


@dataclass(slots=True, eq=False)
class Birth:
    """A token has ended: a hypothesis whose law is not known yet."""

    context: tuple[int, ...]
    """Ids of the text so far."""
    start: int
    """Number of bytes that they write."""
    log_weight: float
    """log P of the context."""


@dataclass(slots=True, eq=False)
class Hypothesis:
    """A context, its law, and the node of the bytes of the token that is not complete."""

    context: tuple[int, ...]
    start: int
    """Number of bytes that the context writes."""
    law: TokenLaw
    log_weight: float
    node: int
    masses: Float[np.ndarray, " children"]
    """Probability of the tokens that go on with each child of the node."""
    log_total: float
    """log P of all texts that go on from here."""


class ByteView:
    """State after a text, from the `start` hypothesis: no bytes, the context empty.

    `tolerance`: a hypothesis that is born with less than this share of the mass is given up, and
    the share is counted in `lost`. At 0 all hypotheses are followed, and the law is exact.
    """

    def __init__(self, trie: ByteTrie, tolerance: float = 0.0) -> None:
        self.trie = trie
        self.tolerance = tolerance
        self.text = bytearray()
        self.live: list[Hypothesis] = []
        self.wanted: list[Birth] = [Birth((), 0, 0.0)]
        """To be given laws, the last one first."""
        self.lost = 0.0
        """Sum over all steps of the share of the mass that was given up or taken up late."""
        self.log_unseen = _NEVER
        """log of the weights that were given up, which bounds the mass that the view lacks."""
        self.evaluations = 0
        self._given_up: list[Birth] = []

    def copy(self) -> ByteView:
        """The same state, to go on from here otherwise."""
        copied = copy(self)
        copied.text = bytearray(self.text)
        copied.live = list(self.live)
        copied.wanted = list(self.wanted)
        copied._given_up = list(self._given_up)
        return copied

    # reading

    @property
    def is_dead(self) -> bool:
        """No hypothesis writes the text."""
        return not self.live and not self.wanted

    @property
    def log_prefix(self) -> float:
        """log P(text, ...), of the hypotheses that are followed."""
        return _log_sum(h.log_total for h in self.live)

    @property
    def unseen_share(self) -> float:
        """Bound of the total variation between `law` and the exact one."""
        return _share(self.log_unseen, np.logaddexp(self.log_unseen, self.log_prefix))

    @property
    def leading(self) -> Hypothesis:
        """The hypothesis with most mass."""
        return max(self.live, key=attrgetter("log_total"))

    @property
    def closed(self) -> Hypothesis | None:
        """Of the hypotheses whose tokens are all complete, that with most weight."""
        found = [h for h in self.live if h.node == ROOT]
        return max(found, key=attrgetter("log_weight"), default=None)

    def law(self) -> Float[np.ndarray, " symbols"]:
        """Probabilities of the next byte, and of `END`."""
        law = np.zeros(SYMBOLS)
        largest = max((h.log_weight for h in self.live), default=0.0)
        for h in self.live:
            factor = math.exp(h.log_weight - largest)
            law[self.trie.label[self.trie.children(h.node)]] += factor * h.masses
            if h.node == ROOT:
                law[END] += factor * h.law.end
        total = law.sum()
        return law / total if total > 0 else law

    # going on

    def push(self, byte: int) -> None:
        """The text goes on with this byte."""
        self.text.append(byte)
        births: list[Birth] = []
        moved = (self._moved(h, byte, len(self.text), births) for h in self.live)
        self.live = [h for h in moved if h is not None]
        self._admit(births)

    def receive(self, law: TokenLaw) -> None:
        """The law of the context that is wanted first, `wanted[-1]`."""
        birth = self.wanted.pop()
        self.evaluations += 1
        births: list[Birth] = []
        found: Hypothesis | None = self._hypothesis(birth, law, ROOT)
        for place in range(birth.start, len(self.text)):
            if found is not None:
                found = self._moved(found, self.text[place], place + 1, births)
        if found is not None and found.log_total > _NEVER:
            self.live.append(found)
        self._admit(births)

    def restart(self, context: tuple[int, ...], start: int) -> None:
        """Follow one sequence of tokens, which writes the first `start` bytes of the text.

        For a text that none of the hypotheses writes any more. `log_prefix` then counts from there.
        """
        self.lost += 1.0
        self.live.clear()
        self.wanted = [Birth(context, start, 0.0)]

    def _moved(
        self, h: Hypothesis, byte: int, position: int, births: list[Birth]
    ) -> Hypothesis | None:
        """The hypothesis one byte later; the tokens that end there are added to `births`."""
        node = self.trie.step(h.node, byte)
        if node is None:
            return None
        for rank in self.trie.ranks_ending(node):
            log_weight = h.log_weight + float(h.law.log_p[rank])
            if log_weight > _NEVER:
                context = (*h.context, int(self.trie.ids[rank]))
                births.append(Birth(context, position, log_weight))
        moved = self._hypothesis(h, h.law, node)
        return moved if moved.log_total > _NEVER else None

    def _hypothesis(self, origin: Birth | Hypothesis, law: TokenLaw, node: int) -> Hypothesis:
        """The context of `origin`, at a node."""
        masses = self._masses(law, node)
        total = float(masses.sum()) + (law.end if node == ROOT else 0.0)
        weight = origin.log_weight
        log_total = weight + math.log(total) if total > 0 else _NEVER
        return Hypothesis(origin.context, origin.start, law, weight, node, masses, log_total)

    def _masses(self, law: TokenLaw, node: int) -> Float[np.ndarray, " children"]:
        """Probability of the tokens below each child. Tokens that end at the node are not in it."""
        children = self.trie.children(node)
        starts, ends = self.trie.first[children], self.trie.end[children]
        if not len(starts):
            return np.zeros(0)
        first, last = starts[0], ends[-1]
        if law.sums[last] - law.sums[first] > _SMALL:
            found: Float[np.ndarray, " children"] = law.sums[ends] - law.sums[starts]
            return found
        return np.add.reduceat(np.exp(law.log_p[first:last]), starts - first)

    # which hypotheses are followed

    def _admit(self, births: list[Birth]) -> None:
        """Follow births with enough of the mass; give up the others, and count what is lost."""
        followed = [h.log_total for h in self.live] + [b.log_weight for b in self.wanted]
        total = _log_sum([*followed, *(b.log_weight for b in births)])
        for birth in births:
            share = _share(birth.log_weight, total)
            if share >= self.tolerance:
                self.wanted.append(birth)
            else:
                self._give_up(birth, share)
        if self._given_up:
            oldest = len(self.text) - _OLDEST
            self._given_up = [b for b in self._given_up if b.start >= oldest]
        if births:
            # the heaviest comes last: the model's cache then holds what most likely goes on
            self.wanted.sort(key=attrgetter("log_weight"), reverse=True)
        if self.is_dead and self._given_up:
            self._take_up()

    def _give_up(self, birth: Birth, share: float) -> None:
        self.lost += share
        self.log_unseen = np.logaddexp(self.log_unseen, birth.log_weight)
        self._given_up.append(birth)
        self._given_up.sort(key=attrgetter("log_weight"), reverse=True)
        del self._given_up[_KEPT:]

    def _take_up(self) -> None:
        """Nothing is left that writes the text: admit the hypotheses that were given up.

        Their share is all of the mass, which is lost and found.
        """
        births, self._given_up = self._given_up, []
        self.lost += 1.0
        self._admit(births)


def _log_sum(values: Iterable[float]) -> float:
    found = [value for value in values if value > _NEVER]
    if not found:
        return _NEVER
    largest = max(found)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in found))


def _share(log_part: float, log_total: float) -> float:
    return math.exp(log_part - log_total) if log_part > _NEVER else 0.0
