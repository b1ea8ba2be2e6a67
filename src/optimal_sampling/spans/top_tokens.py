"""The likeliest tokens of student, teacher and q* at every token, as a record has them."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

__all__ = ["TopTokens", "top_tokens_of"]


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Ids and log-probabilities, the likeliest first."""

    distributions: tuple[str, ...]
    """`student`, `teacher`, `mixture`, or the one model that tokens were drawn from."""
    ids: Int32[np.ndarray, "tokens distributions k"]
    log_p: Float32[np.ndarray, "tokens distributions k"]
    """-inf: no token."""

    def log_ratio(self, drawn: Sequence[int]) -> list[float | None]:
        """log p_teacher − log p_student of each token drawn.

        Where only one of the two has kept the token, the bound that the other's smallest kept
        probability gives, which is nearer to 0; where none has, None.
        """
        if not {"student", "teacher"} <= {*self.distributions}:
            return [None] * len(drawn)
        (student, in_student), (teacher, in_teacher) = (
            self._of_drawn(name, drawn) for name in ("student", "teacher")
        )
        ratios = np.where(in_student | in_teacher, teacher - student, np.nan)
        return [float(x) if np.isfinite(x) else None for x in ratios]

    def acceptance(self) -> list[float | None]:
        """Σ min(q, p_student) over the tokens that are kept of both: at least that share of the
        student's drafts is accepted.
        """
        if not {"student", "mixture"} <= {*self.distributions}:
            return [None] * len(self.ids)
        (first, p), (second, q) = (self.of(name) for name in ("student", "mixture"))
        same = first[:, :, None] == second[:, None, :]
        least = np.minimum(np.exp(p)[:, :, None], np.exp(q)[:, None, :])
        return [float(x) for x in np.where(same, least, 0.0).sum((1, 2)).clip(0, 1)]

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities, [tokens, k] each, of one distribution."""
        place = self.distributions.index(name)
        return self.ids[:, place], self.log_p[:, place]

    def _of_drawn(self, name: str, drawn: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """log p of each token drawn, or the smallest that is kept, and whether it is kept."""
        ids, log_p = self.of(name)
        is_drawn = (ids == np.asarray(drawn)[:, None]) & np.isfinite(log_p)
        smallest = np.where(np.isfinite(log_p), log_p, np.inf).min(1)
        is_kept = is_drawn.any(1)
        found = np.where(is_drawn, log_p, -np.inf).max(1)
        return np.where(is_kept, found, smallest), is_kept


def top_tokens_of(record: Mapping[str, Any]) -> TopTokens | None:
    """Those of a record; None where it has none."""
    kept = record.get("top_tokens")
    if not kept:
        return None
    names = tuple(kept["distributions"])
    shape = -1, len(names), kept["k"]
    ids = np.frombuffer(b64decode(kept["ids"]), "<i4").reshape(shape)
    log_p = np.frombuffer(b64decode(kept["log_p"]), "<f2").reshape(shape)
    if len(ids) != len(record["completion_ids"]):
        return None
    return TopTokens(names, ids, log_p.astype(np.float32))
