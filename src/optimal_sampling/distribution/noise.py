"""Gumbel noise that is a function of (key, position, token id) and of nothing else.

A token is drawn as argmax(log q + noise): the same noise for student, teacher and mixture, whatever
the batch, the device or the order of work.

The hash: a 64-bit key and a position are mixed (splitmix64) into two words, an addend a of 32 bits
and an odd multiplier b; with t(id) 32 scrambled bits of a token id, scramble((t(id) ^ a) * b) has
31 uniform bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from optimal_sampling.distribution.arrays import Positions, Scores, array_of, namespace, tensor_of
from optimal_sampling.distribution.cpu.workspace import TILE

__all__ = [
    "NoiseKeys",
    "NoiseSource",
    "gumbel",
    "keys_tensor",
    "noise_of",
    "noise_tensor",
    "scrambled_ids",
]


def _signed(value: int, bits: int) -> int:
    """The integer with the same bits in two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


_Words: TypeAlias = NDArray[np.int32]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_U30, _U27, _U31, _U0, _U1, _U2 = (
    np.array(c, dtype=np.uint64) for c in (30, 27, 31, _GOLDEN, _MIX1, _MIX2)
)
_S0, _S1, _S2 = (_signed(c, 64) for c in (_GOLDEN, _MIX1, _MIX2))
_SCRAMBLE = _signed(0x85EBCA6B, 32)
_UNIT = 2.0**-31 * (1 - 2.0**-24)  # the largest hash, 2^31 as a float, must still give less than 1


def keys_tensor(keys: Iterable[int], device: torch.device | str = "cpu") -> Int64[Tensor, " rows"]:
    """Python integers of 64 bits (`Request.noise_key`), bit for bit."""
    signed = [_signed(key & (2**64 - 1), 64) for key in keys]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64."""
    x = (x ^ (x >> _U30)) * _U1
    x = (x ^ (x >> _U27)) * _U2
    return x ^ (x >> _U31)


def _splitmix_tensor(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """The same bits. torch has no unsigned >>: the sign bits of its own are masked."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _S1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _S2
    return x ^ ((x >> 31) & (2**33 - 1))


def _scramble(ids: Int64[Tensor, "*shape"]) -> Int32[Tensor, "*shape"]:
    """t(id) of token ids."""
    if ids.device.type == "cpu":
        unsigned = ids.numpy().astype(np.uint64)
        state = _splitmix((unsigned + np.uint64(1)) * _U0)
        low = state.astype(np.uint32).view(np.int32)
        return torch.from_numpy(low)
    offset = (ids + 1) * _S0
    return _splitmix_tensor(offset).to(torch.int32)


@lru_cache(maxsize=8)
def scrambled_ids(vocab_size: int, device: torch.device) -> Int32[Tensor, " vocab"]:
    """t(id) of every token id below `vocab_size`."""
    return _scramble(torch.arange(vocab_size)).to(device)


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> tuple[_Words, _Words, Tensor]:
    """Shift, multiplier and float offset on the device: Python numbers cost more per operation."""
    shift = torch.tensor(16, dtype=torch.int32, device=device)
    scramble = torch.tensor(_SCRAMBLE, dtype=torch.int32, device=device)
    offset = torch.tensor(-0.5 * _UNIT, device=device)
    return array_of(shift), array_of(scramble), offset


def _words(keys: Int64[Tensor, " rows"], position: Positions) -> tuple[_Words, _Words]:
    """The addend and the odd multiplier of every row: 63 bits that follow from key and position."""
    if keys.device.type == "cpu":
        places = position.numpy().astype(np.uint64)
        mixed_keys = _splitmix(keys.numpy().view(np.uint64))
        state = _splitmix(mixed_keys + places * _U0)
        halves = state.astype("<u8", copy=False).view("<i4")
        a, b = halves.reshape(-1, 2).T
        return a, b | 1
    offset = position.to(torch.int64) * _S0
    words = _splitmix_tensor(_splitmix_tensor(keys) + offset)
    upper = (words >> 32).to(torch.int32)
    return array_of(words.to(torch.int32)), array_of(upper | 1)


def _hash(ids: _Words, a: _Words, b: _Words, device: torch.device) -> _Words:
    """31 uniform bits. The signed shift in x ^ (x >> 16) clears the sign and is two to one."""
    shift, scramble, _ = _constants(device)
    h = ids ^ a
    h *= b
    h ^= h >> shift
    h *= scramble
    h ^= h >> shift
    return h


def _to_gumbel(h: Int32[Tensor, "n width"], out: Float32[Tensor, "n width"]) -> None:
    """-log(-log1p(-v)), v = (h + 1/2) / 2^31: finest at v = 0, whence the largest noise (to 22)."""
    out.copy_(h)
    torch.sub(_constants(out.device)[2], out, alpha=_UNIT, out=out)
    array = array_of(out)
    namespace(out.device).log1p(array, out=array)  # NumPy's is vectorised, torch's is not
    out.neg_().log_().neg_()


@torch.no_grad()
def gumbel(
    keys: Int64[Tensor, " rows"],
    position: Positions,
    tokens: int | Int64[Tensor, "rows tokens"],
) -> Float32[Tensor, "rows tokens"]:
    """Standard Gumbel noise for each row's (key, position) and tokens.

    `tokens`: the ids of every row, or a number n for all ids below n. The integers behind the noise
    are the same on every device; the logarithms may differ in the last bit. On a CPU the work goes
    in tiles that stay near its cache.
    """
    device = keys.device
    rows = keys.shape[0]
    ids = scrambled_ids(tokens, device) if isinstance(tokens, int) else _scramble(tokens)
    count = ids.shape[-1]
    out = torch.empty(rows, count, dtype=torch.float32, device=device)
    a, b = (word[:, None] for word in _words(keys, position))
    if device.type != "cpu" or rows * count <= TILE:
        h = _hash(array_of(ids), a, b, device)
        _to_gumbel(tensor_of(h), out)
        return out
    height = max(1, TILE // count)
    width = min(count, TILE)
    every_row = array_of(ids.expand(rows, count))
    for row in range(0, rows, height):
        band = slice(row, row + height)
        for first in range(0, count, width):
            columns = slice(first, first + width)
            h = _hash(every_row[band, columns], a[band], b[band], device)
            _to_gumbel(tensor_of(h), out[band, columns])
    return out


@dataclass(frozen=True)
class NoiseKeys:
    """What `gumbel` makes noise from, where it is not made yet: the fused kernel makes its own."""

    keys: Int64[Tensor, " rows"]
    position: Positions

    def __getitem__(self, rows: slice) -> NoiseKeys:
        return NoiseKeys(self.keys[rows], self.position[rows])


NoiseSource: TypeAlias = Scores | NoiseKeys
"""Gumbel noise, or what it is made from."""


def noise_tensor(noise: NoiseSource, vocab_size: int) -> Scores:
    """The noise itself, made now if need be."""
    if isinstance(noise, NoiseKeys):
        return gumbel(noise.keys, noise.position, vocab_size)
    return noise


def noise_of(noise: NoiseSource, ids: Int64[Tensor, "rows tokens"]) -> Scores:
    """The noise of some token ids of every row."""
    if isinstance(noise, NoiseKeys):
        return gumbel(noise.keys, noise.position, ids)
    return noise.gather(-1, ids)
