"""What a kind of server is asked, and how its replies are read. No HTTP.

A dialect makes a `Call` of a question; connection.py sends it and has the reply read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from optimal_sampling.engines.servers.model import DraftedToken, Scoring, TokenList

__all__ = ["AFFINITY", "Call", "Dialect", "prefixes"]

T = TypeVar("T")

AFFINITY: ContextVar[int] = ContextVar("AFFINITY", default=-1)
"""Requests of a text have the same number, and go to the same server while it has room: the server
has the text's prefix in its cache. -1: to the server with the least to do."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One HTTP request. `read` takes the decoded JSON of the reply and raises BadReply."""

    path: str
    read: Callable[[Any], T]
    body: Mapping[str, Any] | None = None
    """Sent as JSON by POST; None: a GET."""


@dataclass(frozen=True)
class Dialect(ABC):
    """The questions of `ServedModel`, for one model of one kind of server."""

    kind: ClassVar[str]
    scorings: ClassVar[tuple[Scoring, ...]]
    """Ways of scoring that may be offered; what is there is tried at the start."""
    chosen_are_relative: ClassVar[bool] = False
    """`chosen` gives log-probabilities up to a constant, which is that of one request."""

    model: str
    """Name of the model in requests."""
    reply_models: frozenset[str] = frozenset()
    """Names that the model may have in replies; none: not checked."""
    vocab_size: int | None = None
    """Number of ids that are no padding; None: unknown."""
    rows: int | None = None
    """Number of ids with padding; a list of so many is of the whole vocabulary."""

    @abstractmethod
    def next_tokens(self, prefix: Sequence[int], top_k: int) -> Call[TokenList]:
        """The list of the token after a prefix."""

    @abstractmethod
    def count_rows(self, prefix: Sequence[int]) -> Call[int]:
        """Number of ids of the whole vocabulary, with padding."""

    @abstractmethod
    def chosen(self, prefix: Sequence[int], ids: Sequence[int]) -> Call[dict[int, float]]:
        """Log-probabilities of chosen ids after a prefix, or of some of them."""

    @abstractmethod
    def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> Call[list[DraftedToken]]:
        """Tokens that the server draws after a prefix, with their lists. None, where the server
        gives no list of the first."""

    @abstractmethod
    def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int, way: Scoring
    ) -> Call[list[TokenList]]:
        """The lists of all positions from the end of the prefix on."""

    @abstractmethod
    def tokenize(self, text: str) -> Call[list[int]]:
        """Ids of a text, without special tokens added."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> Call[str]:
        """Text of ids."""

    @abstractmethod
    def ends_text(self, prefix: Sequence[int], token: int) -> Call[bool]:
        """Whether the server ends a text at a token, by having it draw that token."""


def prefixes(prefix: Sequence[int], continuation: Sequence[int]) -> list[list[int]]:
    """The prefix, the prefix and one token of the continuation, and so on."""
    whole = [*prefix, *continuation]
    return [whole[: len(prefix) + extra] for extra in range(len(continuation) + 1)]
