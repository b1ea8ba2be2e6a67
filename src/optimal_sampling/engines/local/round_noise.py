"""Gumbel noise of a round's positions."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from optimal_sampling.distribution import NoiseKeys, gumbel, runs_fused
from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.scheduler import Sequence

__all__ = ["RoundNoise"]


class RoundNoise:
    """Gumbel noise of a round's positions; where a fused GPU program makes it, only its keys.

    Up to BLOCK numbers are made at once.
    """

    BLOCK = 2**22

    def __init__(
        self, keys: Int64[Tensor, " rows"], first: Int64[Tensor, " rows"], width: int, vocab: int
    ) -> None:
        self.first = first
        """Index of each row's next token in its completion."""
        self._keys = keys
        self._vocab = vocab
        self._fused = runs_fused(keys.device)
        self._made: list[Float32[Tensor, "rows vocab"]] = []
        self._block = width if len(keys) * width * vocab <= self.BLOCK else 1

    @classmethod
    def of(cls, rows: Seq[Sequence], width: int, vocab: int, device: torch.device) -> RoundNoise:
        """That of these rows as they are."""
        keys = np.array([s.noise_key for s in rows], dtype=np.uint64).view(np.int64)
        first = np.array([len(s.outputs[0]) for s in rows])
        return cls(to_device(keys, device), to_device(first, device), width, vocab)

    def following(self, first: Int64[Tensor, " rows"], width: int) -> RoundNoise:
        """That of another round of the same rows, whose next tokens have these indices."""
        return RoundNoise(self._keys, first, width, self._vocab)

    def positions(self, width: int) -> Int64[Tensor, "rows width"]:
        """Index of each token in its completion."""
        if width == 1:
            return self.first[:, None]
        return self.first[:, None] + torch.arange(width, device=self.first.device)

    def at(self, offset: int) -> Float32[Tensor, "rows vocab"] | NoiseKeys:
        """Noise of the token `offset` places after every row's next one."""
        if self._fused:
            return NoiseKeys(self._keys, self.first + offset)
        if self._block > 1 and not self._made:
            self._make_block(self._block)
        while len(self._made) <= offset:
            self._made.append(gumbel(self._keys, self.first + len(self._made), self._vocab))
        return self._made[offset]

    def _make_block(self, width: int) -> None:
        keys, positions = self._keys.repeat(width), self.positions(width).T.reshape(-1)
        rows = len(self._keys)
        self._made = list(gumbel(keys, positions, self._vocab).view(width, rows, self._vocab))

    def upto(self, width: int) -> Float32[Tensor, "tokens vocab"] | NoiseKeys:
        """Noise of rows * width tokens, row by row."""
        if self._fused:
            keys = self._keys if width == 1 else self._keys.repeat_interleave(width)
            return NoiseKeys(keys, self.positions(width).reshape(-1))
        last = self.at(width - 1)
        if width == 1:
            return last
        return torch.stack(self._made[:width], 1).flatten(0, 1)
