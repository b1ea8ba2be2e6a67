"""What the engine asks of a model behind a server, whatever the server is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

__all__ = ["DraftedToken", "Scoring", "ServedFacts", "ServedModel", "TokenList"]

Scoring = Literal["prompts", "one_slot", "prompt_logprobs", "echo"]
"""How the lists of all positions of a draft are asked for in one request."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenList:
    """The likeliest tokens of one position. Log-probabilities at temperature 1, in nats."""

    ids: Int64[np.ndarray, " k"]
    """Distinct; the likeliest first, then those that were asked for."""
    log_p: Float64[np.ndarray, " k"]
    """Of every id; no NaN and no +inf."""
    listed: int
    """The first `listed` ids are the likeliest: every id that is not in the list has at most
    `log_p[listed - 1]`."""
    is_full: bool = False
    """All ids of the vocabulary, without padding, normalised."""
    left_out: float = 0.0
    """Mass of ids that the server listed and that are left out here: padding."""
    sum_error: float = 2e-6
    """By how much the mass of the list may be off, in float32: twice the error of a log-probability
    from logits below 32."""


@dataclass(frozen=True, slots=True)
class DraftedToken:
    """A token that a server drew, and the list of the position that it was drawn at."""

    token: int
    choices: TokenList


@dataclass(frozen=True, slots=True)
class ServedFacts:
    """What is known of a served model after `start`."""

    name: str
    """As the server calls it."""
    kind: str
    """Kind of server: `vllm`, `llama.cpp`, `fake`, `table`."""
    context_length: int | None
    """Most tokens of a text, prompt included; None: not said."""
    max_top_k: int
    """Most tokens of a list."""
    vocab_size: int | None
    """Number of token ids, padding included; None: not said."""
    stop_ids: frozenset[int] = frozenset()
    """Ids that end a text by the server's own account."""
    can_choose_ids: bool = False
    """`extra_ids` are answered."""
    scoring: Scoring | None = None
    """How `score` asks where the text is long; None: it cannot."""
    can_draft: bool = False
    """`draft` is answered."""


class ServedModel(ABC):
    """One model behind one or several servers.

    Every method raises ServerError where a request failed for good, EngineError where no server of
    the model answers any more, and may be called by many tasks of one event loop at once. A
    cancelled call gives up its request.
    """

    facts: ServedFacts
    """Known after `start`."""

    @abstractmethod
    async def start(self) -> None:
        """Connect, and find the facts. Raises ConfigError or EngineError with what is wrong."""

    @abstractmethod
    async def next_tokens(
        self, prefix: Sequence[int], top_k: int, extra_ids: Sequence[int] = ()
    ) -> TokenList:
        """The list of the token after `prefix`: its `top_k` likeliest ids and the extra ids.

        At most `facts.max_top_k`; the whole vocabulary for `facts.vocab_size`. Extra ids without
        `facts.can_choose_ids` are left out of the list.
        """

    @abstractmethod
    async def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> list[DraftedToken]:
        """At most `count` tokens that the server draws after `prefix`; temperature 0: likeliest.

        Fewer where it draws a token that ends the text, which is the last one. At least one.
        """

    @abstractmethod
    async def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int
    ) -> list[TokenList]:
        """One list more than the continuation has tokens: of the token after `prefix`, after
        `prefix` and the first of them, and so on.
        """

    @abstractmethod
    async def tokenize(self, text: str) -> list[int]:
        """Ids of a text, no special tokens added. Raises ServerError where it is not offered."""

    @abstractmethod
    async def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids. Raises ServerError where it is not offered."""

    def figures(self) -> dict[str, float]:
        """Requests, retries, errors by kind, latencies ..., by name, since `start`."""
        return {}

    def left_out(self) -> list[str]:
        """Servers whose replies are not used, each with the reason."""
        return []

    @abstractmethod
    async def aclose(self) -> None:
        """Give up what is in flight and close connections. Closing twice is safe."""
