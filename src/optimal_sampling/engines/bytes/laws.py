"""Logits of a model's next token -> the `TokenLaw`s that its byte view reads.

Temperature and teacher support act here, on tokens: on bytes they would mean something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import teacher_support
from optimal_sampling.engines.bytes import utf8
from optimal_sampling.engines.bytes.byte_view import TokenLaw
from optimal_sampling.engines.bytes.trie import ByteTrie
from optimal_sampling.types import Mode
from optimal_sampling.vocabulary.token_bytes import TokenBytes

__all__ = ["LawReader"]


class LawReader:
    """In a mixture `teacher_support_*` restrict the teacher's tokens; where one model draws alone,
    `top_p` and `top_k` restrict its own.

    Ids without bytes that do not end a text are left out, and so are tokens after which the text
    is no valid UTF-8; the others are normalised.
    """

    def __init__(
        self,
        table: TokenBytes,
        trie: ByteTrie,
        mixture: MixtureConfig,
        role: str,
        mode: Mode = "mixture",
    ) -> None:
        self.temperature = mixture.temperature
        self.table = table
        self.trie = trie
        self.end_ids = sorted(table.end_ids)
        self._columns = torch.from_numpy(np.concatenate([trie.ids, self.end_ids]).astype(np.int64))
        self._support = _support(mixture, mode)
        self._restrict = role == "teacher" or mode != "mixture"
        self._valid: dict[utf8.State, Bool[Tensor, " columns"]] = {}

    @torch.no_grad()
    def read(
        self, logits: Float[Tensor, "rows vocab"], contexts: Sequence[Sequence[int]]
    ) -> list[TokenLaw | None]:
        """One law per row, after its context; None where the logits define no distribution.

        A context after which no token keeps the text valid has a law without mass.
        """
        scores = logits[:, self._columns.to(logits.device)].to(torch.float64) / self.temperature
        good = scores.amax(-1).isfinite().cpu()
        keep = torch.stack([self._kept(context) for context in contexts]).to(logits.device)
        scores = scores.masked_fill(~keep, -torch.inf)
        if self._restrict:
            inside = teacher_support(scores.to(torch.float32), self._support)
            keep = keep if inside is None else keep & inside
            scores = scores.masked_fill(~keep, -torch.inf)
        log_p = scores.log_softmax(-1).masked_fill(~keep, -torch.inf)
        words = log_p[:, : len(self.trie.ids)]
        sums = torch.nn.functional.pad(words.exp().cumsum(-1), (1, 0)).cpu().numpy()
        ends = log_p[:, len(self.trie.ids) :].cpu().numpy()
        host = words.cpu().numpy()
        return [
            self._law(host[row], sums[row], ends[row]) if good[row] else None
            for row in range(len(host))
        ]

    def _kept(self, context: Sequence[int]) -> Bool[Tensor, " columns"]:
        """Tokens and ends after which the text is valid."""
        state = utf8.state_of(self.table.join(context[-3:]))  # a token has at least a byte
        if state not in self._valid:
            ends = np.full(len(self.end_ids), state == utf8.BETWEEN)
            found = np.concatenate([self.trie.following(state), ends])
            self._valid[state] = torch.from_numpy(found)
        return self._valid[state]

    def _law(self, log_p: np.ndarray, sums: np.ndarray, ends: np.ndarray) -> TokenLaw:
        if not self.end_ids:
            return TokenLaw(log_p, sums, 0.0)
        end_id = self.end_ids[int(ends.argmax())]
        return TokenLaw(log_p, sums, float(np.exp(ends).sum()), end_id)


def _support(mixture: MixtureConfig, mode: Mode) -> MixtureConfig:
    """What `teacher_support` reads: the options that restrict a model's tokens."""
    if mode == "mixture":
        return replace(mixture, alpha_method="kl_symmetry")  # the support of `veto` is one of bytes
    return MixtureConfig(
        temperature=mixture.temperature,
        teacher_support_top_k=mixture.top_k,
        teacher_support_top_p=mixture.top_p,
    )
