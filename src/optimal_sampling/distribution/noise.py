"""Gumbel noise that is a function of (key, position, token id) and of nothing else.

A token is drawn as argmax(log q + noise): the same noise for student, teacher and mixture, whatever the batch, the
device or the order of work. Knows nothing of models or of mixtures.

The hash: a 64-bit key and a position are mixed (splitmix64) into two words, an addend a of 32 bits and an odd
multiplier b; with t(id) a fixed table of scrambled token ids, scramble((t(id) ^ a) * b) has 31 uniform bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, Int64
from torch import Tensor

from optimal_sampling.distribution.tiles import TILE, Rows, namespace, rows_of, tensor_of

__all__ = ["NoiseKeys", "gumbel", "keys_tensor", "noise_tensor", "scrambled_ids"]


def _signed(value: int, bits: int) -> int:
    """The integer with the same bits in two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U30, _U27, _U31, _U0, _U1, _U2 = (
    np.array(c, dtype=np.uint64) for c in (30, 27, 31, _GOLDEN, _MIX1, _MIX2)
)
_SCRAMBLE = _signed(0x85EBCA6B, 32)
_UNIT = 2.0**-31 * (1 - 2.0**-24)  # the largest hash, 2^31 as a float, must still give less than 1


def keys_tensor(keys: Iterable[int], device: torch.device | str = "cpu") -> Int64[Tensor, " rows"]:
    """Python integers of 64 bits (`Request.noise_key`), bit for bit."""
    return torch.tensor(
        [_signed(key & (2**64 - 1), 64) for key in keys], dtype=torch.int64, device=device
    )


def _splitmix(x: Rows) -> Rows:
    """Finaliser of splitmix64. torch has no unsigned >>, so the sign bits that its brings in are masked off."""
    if isinstance(x, Tensor):
        x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MIX1, 64)
        x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MIX2, 64)
        return x ^ ((x >> 31) & (2**33 - 1))
    x = (x ^ (x >> _U30)) * _U1
    x = (x ^ (x >> _U27)) * _U2
    return x ^ (x >> _U31)


@lru_cache(maxsize=8)
def scrambled_ids(vocab_size: int, device: torch.device) -> Int32[Tensor, " vocab"]:
    """t(id): 32 well-mixed bits for every token id."""
    ids = _splitmix(np.arange(1, vocab_size + 1, dtype=np.uint64) * _U0)
    return torch.from_numpy(ids.astype(np.uint32).view(np.int32)).to(device)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[Rows, Rows, Tensor]:
    """Shift, multiplier and float offset as scalars on the device: Python numbers cost more per operation."""
    shift, scramble = (torch.tensor(c, dtype=torch.int32, device=device) for c in (16, _SCRAMBLE))
    return rows_of(shift), rows_of(scramble), torch.tensor(-0.5 * _UNIT, device=device)


def _words(keys: Int64[Tensor, " rows"], position: Int[Tensor, " rows"]) -> tuple[Rows, Rows]:
    """The addend and the odd multiplier of every row: 63 bits that follow from its key and position."""
    if keys.device.type == "cpu":
        places = position.numpy().astype(np.uint64)
        state = _splitmix(_splitmix(keys.numpy().view(np.uint64)) + places * _U0)
        a, b = state.astype("<u8", copy=False).view("<i4").reshape(-1, 2).T
        return a, b | 1
    state = _splitmix(_splitmix(keys) + position.to(torch.int64) * _signed(_GOLDEN, 64))
    return state.to(torch.int32), (state >> 32).to(torch.int32) | 1


def _hash(ids: Rows, a: Rows, b: Rows, device: torch.device) -> Rows:
    """31 uniform bits. x ^ (x >> 16) with a signed shift clears the sign and is two to one: no mask needed."""
    shift, scramble, _ = _constants(device)
    h = ids ^ a
    h *= b
    h ^= h >> shift
    h *= scramble
    h ^= h >> shift
    return h


def _to_gumbel(h: Int32[Tensor, "n width"], out: Float32[Tensor, "n width"]) -> None:
    """-log(-log1p(-v)), v = (h + 1/2) / 2^31: finest at v = 0, where the largest noise comes from (up to 22)."""
    out.copy_(h)
    torch.sub(_constants(out.device)[2], out, alpha=_UNIT, out=out)
    namespace(out.device).log1p(
        rows_of(out), out=rows_of(out)
    )  # NumPy's is vectorised, torch's is not
    out.neg_().log_().neg_()


@torch.no_grad()
def gumbel(
    keys: Int64[Tensor, " rows"],
    position: Int[Tensor, " rows"],
    vocab_size: int,
    out: Float32[Tensor, "rows vocab"] | None = None,
) -> Float32[Tensor, "rows vocab"]:
    """Standard Gumbel noise for each row's (key, position) and every token id below `vocab_size`.

    The integers behind it are the same on every device; the logarithms may differ in the last bit. Fills `out` where
    it is given. On a CPU the work goes in tiles that stay near its cache.
    """
    rows, device = keys.shape[0], keys.device
    if out is None:
        out = torch.empty(rows, vocab_size, dtype=torch.float32, device=device)
    a, b = _words(keys, position)
    a, b = a[:, None], b[:, None]
    ids = rows_of(scrambled_ids(vocab_size, device))
    if device.type != "cpu" or rows * vocab_size <= TILE:
        _to_gumbel(tensor_of(_hash(ids, a, b, device)), out)
        return out
    height, width = max(1, TILE // vocab_size), min(vocab_size, TILE)
    for band in (slice(row, row + height) for row in range(0, rows, height)):
        for columns in (slice(first, first + width) for first in range(0, vocab_size, width)):
            _to_gumbel(tensor_of(_hash(ids[columns], a[band], b[band], device)), out[band, columns])
    return out


@dataclass(frozen=True)
class NoiseKeys:
    """Noise that is not made yet: what `gumbel` would make it from. The fused kernel makes it where it needs it."""

    keys: Int64[Tensor, " rows"]
    position: Int[Tensor, " rows"]

    def __getitem__(self, rows: slice) -> NoiseKeys:
        return NoiseKeys(self.keys[rows], self.position[rows])


def noise_tensor(
    noise: Float32[Tensor, "rows vocab"] | NoiseKeys, vocab_size: int
) -> Float32[Tensor, "rows vocab"]:
    """The noise itself, made now if need be."""
    return gumbel(noise.keys, noise.position, vocab_size) if isinstance(noise, NoiseKeys) else noise
