"""A served model in this process: its logits are a function of the text. For tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from optimal_sampling.engines.servers.model import (
    DraftedToken,
    ServedFacts,
    ServedModel,
    TokenList,
)
from optimal_sampling.errors import ServerError

__all__ = ["LogitsModel", "TableModel", "token_list"]


def token_list(
    log_p: Float64[np.ndarray, " vocab"], top_k: int, extra_ids: Sequence[int] = ()
) -> TokenList:
    """The `top_k` likeliest tokens of a distribution, of equals the smaller id, and the others."""
    vocab = len(log_p)
    if top_k >= vocab:
        return TokenList(np.arange(vocab), log_p, vocab, is_full=True)
    order = np.argsort(-log_p, kind="stable")[:top_k]
    extra = [token for token in dict.fromkeys(extra_ids) if token not in order]
    ids = np.concatenate([order, np.array(extra, dtype=np.int64)])
    return TokenList(ids, log_p[ids], top_k)


class LogitsModel(ServedModel):
    """`logits`: from the ids of a text to the logits of the next token, [vocab].

    `seconds` pass before every answer; `claims` replace fields of `facts`.
    """

    def __init__(
        self,
        logits: Callable[[Sequence[int]], Float[np.ndarray, " vocab"]],
        vocab_size: int,
        seconds: float = 0.0,
        **claims: Any,
    ) -> None:
        self.logits = logits
        self.seconds = seconds
        self.requests = 0
        self.closed = False
        facts = ServedFacts(
            name="table",
            kind="table",
            context_length=4096,
            max_top_k=vocab_size,
            vocab_size=vocab_size,
            can_choose_ids=True,
            scoring="prompts",
            can_draft=True,
        )
        self.facts = replace(facts, **claims)

    async def start(self) -> None:
        """Nothing is to be found out."""

    async def next_tokens(
        self, prefix: Sequence[int], top_k: int, extra_ids: Sequence[int] = ()
    ) -> TokenList:
        """As in `ServedModel`."""
        await self._answer()
        return self._list(prefix, top_k, extra_ids)

    async def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> list[DraftedToken]:
        """As in `ServedModel`."""
        await self._answer()
        rng = np.random.default_rng(seed)
        text = list(prefix)
        drafted: list[DraftedToken] = []
        while len(drafted) < count:
            log_p = self._log_p(text)
            noise = rng.gumbel(size=len(log_p)) if temperature else 0.0
            token = int((log_p + temperature * noise).argmax())
            drafted.append(DraftedToken(token, token_list(log_p, top_k)))
            text.append(token)
            if token in self.facts.stop_ids or len(text) == self.facts.context_length:
                break
        return drafted

    async def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int
    ) -> list[TokenList]:
        """As in `ServedModel`."""
        await self._answer()
        text = [*prefix, *continuation]
        return [self._list(text[:end], top_k, ()) for end in range(len(prefix), len(text) + 1)]

    async def tokenize(self, text: str) -> list[int]:
        """Not offered."""
        raise ServerError("a table has no tokenizer", "not offered")

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Not offered."""
        raise ServerError("a table has no tokenizer", "not offered")

    def figures(self) -> dict[str, float]:
        """As in `ServedModel`."""
        return {"requests": self.requests}

    async def aclose(self) -> None:
        """As in `ServedModel`."""
        self.closed = True

    async def _answer(self) -> None:
        self.requests += 1
        await asyncio.sleep(self.seconds)

    def _log_p(self, text: Sequence[int]) -> Float64[np.ndarray, " vocab"]:
        logits = np.asarray(self.logits(text), dtype=np.float64)
        if np.isnan(logits).any() or logits.max() == np.inf:
            raise ServerError(f"{self.facts.name} answered with NaN or infinity", "malformed")
        shifted = logits - logits.max()
        log_p: Float64[np.ndarray, " vocab"] = shifted - np.log(np.exp(shifted).sum())
        return log_p

    def _list(self, text: Sequence[int], top_k: int, extra_ids: Sequence[int]) -> TokenList:
        extra = extra_ids if self.facts.can_choose_ids else ()
        return token_list(self._log_p(text), min(top_k, self.facts.max_top_k), extra)


class TableModel(LogitsModel):
    """`table`: row i holds the logits of the token after token i, as of the engine `toy`."""

    def __init__(self, table: Float[np.ndarray, "vocab vocab"], **others: Any) -> None:
        super().__init__(lambda text: table[text[-1]], table.shape[1], **others)
