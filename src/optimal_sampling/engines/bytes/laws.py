"""Logits of a model's next token -> the `TokenLaw`s that its byte view reads.

Temperature and teacher support act here, on tokens: on bytes they would mean something else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import teacher_support
from optimal_sampling.engines.bytes.byte_view import TokenLaw
from optimal_sampling.engines.bytes.trie import ByteTrie
from optimal_sampling.vocabulary.token_bytes import TokenBytes

__all__ = ["LawReader"]


class LawReader:
    """`restrict`: the role is the teacher's, to whose token law `teacher_support_*` apply.

    Ids without bytes that do not end a text are left out, and the others normalised.
    """

    def __init__(
        self, table: TokenBytes, trie: ByteTrie, mixture: MixtureConfig, restrict: bool
    ) -> None:
        self.temperature = mixture.temperature
        self.end_ids = sorted(table.end_ids)
        self.tokens = len(trie.ids)
        self._columns = torch.from_numpy(np.concatenate([trie.ids, self.end_ids]).astype(np.int64))
        # the support of `veto` is one of bytes
        self._mixture = replace(mixture, alpha_method="kl_symmetry")
        self._restrict = restrict

    @torch.no_grad()
    def read(self, logits: Float[Tensor, "rows vocab"]) -> list[TokenLaw | None]:
        """One law per row; None where the logits define no distribution."""
        columns = self._columns.to(logits.device)
        scores = logits[:, columns].to(torch.float64) / self.temperature
        largest = scores.amax(-1)
        good = largest.isfinite().cpu()
        keep = teacher_support(scores.to(torch.float32), self._mixture) if self._restrict else None
        if keep is not None:
            scores = scores.masked_fill(~keep, -torch.inf)
        log_p = scores.log_softmax(-1)
        p = log_p[:, : self.tokens].exp()
        sums = torch.nn.functional.pad(p.cumsum(-1), (1, 0)).cpu().numpy()
        ends = log_p[:, self.tokens :].cpu().numpy()
        host = log_p[:, : self.tokens].cpu().numpy()
        return [
            self._law(host[row], sums[row], ends[row]) if good[row] else None
            for row in range(len(host))
        ]

    def _law(self, log_p: np.ndarray, sums: np.ndarray, ends: np.ndarray) -> TokenLaw:
        if not self.end_ids:
            return TokenLaw(log_p, sums, 0.0)
        end_id = self.end_ids[int(ends.argmax())]
        return TokenLaw(log_p, sums, float(np.exp(ends).sum()), end_id)
