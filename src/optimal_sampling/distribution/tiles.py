"""How a pair of [rows, vocab] tensors is cut into blocks that stay near a CPU's cache, and the memory that is kept.

A block is a few whole rows where the vocabulary is small, and a tile of one row where it is large. The cut of a row
depends on the vocabulary alone, and rows are padded to whole vectors: so a row's sums have the same bits in every
batch. On an accelerator everything is one block.

Arithmetic on one number per row goes through `xp`: NumPy on a CPU, where it costs a quarter of torch, else torch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

__all__ = [
    "FLOOR",
    "LEAST",
    "TILE",
    "Block",
    "Rows",
    "Workspace",
    "argmax",
    "at_least",
    "at_most",
    "namespace",
    "rows_of",
    "stack",
    "tensor_of",
    "uses_numpy",
    "workspace",
]

FLOOR = -1e18
"""Stands for -inf: differences and their squares are finite, and its exponential is 0. Half of it counts as -inf."""

LEAST = -87.0
"""exp of less is no normal float32, and slow: terms are cut here. A sum that matters is at least e^50 times larger."""

TILE = 1 << 16
"""Numbers per block. Smaller ones would fit the second-level cache, but then the calls cost more than the work."""

Rows: TypeAlias = Any
"""One number per row, last axis `rows`: an ndarray on a CPU, else a tensor."""

_LANES = 64  # numbers that a vectorised loop takes at once


def uses_numpy(device: torch.device) -> bool:
    """Whether `Rows` on this device are ndarrays. Asked nowhere else, so that tests can have tensors on a CPU."""
    return device.type == "cpu"


def namespace(device: torch.device) -> Any:
    """numpy on a CPU, else torch: what `Rows` on this device are computed with."""
    return np if uses_numpy(device) else torch


def rows_of(x: Tensor) -> Rows:
    """The same memory as `Rows`."""
    return x.numpy() if uses_numpy(x.device) else x


def tensor_of(x: Rows) -> Tensor:
    """The same memory as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def stack(rows: list[Rows]) -> Rows:
    """[k, rows], float64. np.stack takes four times as long."""
    if isinstance(rows[0], Tensor):
        return torch.stack([row.to(torch.float64) for row in rows])
    return np.array(rows, dtype=np.float64)


def at_least(x: Rows, least: float) -> Rows:
    """max(x, least); np.clip takes four times as long. NaN stays."""
    return x.clamp(min=least) if isinstance(x, Tensor) else np.maximum(x, least)


def at_most(x: Rows, most: float) -> Rows:
    """min(x, most). NaN stays."""
    return x.clamp(max=most) if isinstance(x, Tensor) else np.minimum(x, most)


def argmax(y: Float[Tensor, "n width"]) -> Int64[Tensor, " n"]:
    """First of the largest. NumPy's is twenty times as fast on a CPU."""
    if uses_numpy(y.device):
        return torch.from_numpy(y.numpy().argmax(-1))
    return y.argmax(-1)


@dataclass(frozen=True)
class Block:
    """Views of one block: `width` padded columns of n rows. `scratch` is shared by all blocks."""

    rows: slice
    tile: int
    columns: slice  # of the unpadded vocabulary
    inner: slice  # the unpadded columns of this block
    inside: Float32[Tensor, "2 n inner"]
    inside_rows: Rows  # the same memory
    both: Float32[Tensor, "2 n width"]  # student, teacher
    student: Float32[Tensor, "n width"]
    teacher: Float32[Tensor, "n width"]
    weight: Float32[Tensor, "n 1"]
    betas: Float32[Tensor, "2 n 1"]
    shift: Float32[Tensor, "n 1"]
    maximum: Float32[Tensor, "2 n 1"]
    per_model: Float32[Tensor, "2 n"]
    per_model_rows: Rows
    shift_per_model: Float32[Tensor, "2 n"]
    sums: Float32[Tensor, "5 n"]
    scratch: Float32[Tensor, "5 n width"]


class Workspace:
    """Buffers for a batch of one shape, and its blocks."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.rows, self.vocab, self.device = rows, vocab, device
        cpu = uses_numpy(device)
        padded = -(-vocab // _LANES) * _LANES
        width = min(padded, TILE) if cpu else padded
        height = max(1, TILE // padded) if cpu else max(1, rows)
        self.tiles = -(-padded // width)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.both = empty(2, rows, padded)
        self.both[:, :, vocab:] = LEAST
        self.weight, self.betas, self.maximum = empty(rows, 1), empty(2, rows, 1), empty(2, rows, 1)
        self.shift, self.sums = empty(rows, self.tiles), empty(5, rows, self.tiles)
        self.per_model, self.shift_per_model = empty(2, rows, self.tiles), empty(2, rows, self.tiles)
        self.weight_rows, self.betas_rows = rows_of(self.weight), rows_of(self.betas)
        self.shift_rows, self.sums_rows, self.per_model_rows = map(rows_of, (self.shift, self.sums, self.per_model))
        scratch = empty(5 * min(height, max(rows, 1)) * width)
        self.blocks = [
            self._block(slice(row, min(row + height, rows)), tile, width, scratch)
            for row in range(0, rows, height)
            for tile in range(self.tiles)
        ]

    def _block(self, rows: slice, tile: int, width: int, scratch: Tensor) -> Block:
        both = self.both[:, rows, tile * width : (tile + 1) * width]
        columns = slice(tile * width, min((tile + 1) * width, self.vocab))
        inside = both[:, :, : columns.stop - columns.start]
        return Block(
            rows=rows,
            tile=tile,
            columns=columns,
            inner=slice(0, columns.stop - columns.start),
            inside=inside,
            inside_rows=rows_of(inside),
            both=both,
            student=both[0],
            teacher=both[1],
            weight=self.weight[rows],
            betas=self.betas[:, rows],
            shift=self.shift[rows, tile : tile + 1],
            maximum=self.maximum[:, rows],
            per_model=self.per_model[:, rows, tile],
            per_model_rows=rows_of(self.per_model[:, rows, tile]),
            shift_per_model=self.shift_per_model[:, rows, tile],
            sums=self.sums[:, rows, tile],
            scratch=scratch[: 5 * both[0].numel()].view(5, *both.shape[1:]),
        )


_kept = threading.local()


def workspace(rows: int, vocab: int, device: torch.device) -> Workspace:
    """The workspace of this shape; the last few shapes are kept, per thread."""
    cache: dict[tuple[int, int, torch.device], Workspace] = _kept.__dict__.setdefault("cache", {})
    key = (rows, vocab, device)
    if key not in cache:
        while len(cache) >= 4:
            cache.pop(next(iter(cache)))
        cache[key] = Workspace(rows, vocab, device)
    return cache[key]
