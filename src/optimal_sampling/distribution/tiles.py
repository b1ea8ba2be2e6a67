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
    "dot",
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

TILE = 5 << 14
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


def dot(x: Rows, y: Rows, out: Rows) -> None:
    """Sum of x y over the last axis. NumPy's takes a third of a product and its sum."""
    if isinstance(x, Tensor):
        torch.sum(x * y, -1, out=out)
    else:
        np.vecdot(x, y, out=out)


@dataclass(frozen=True)
class Block:
    """Views of one block: `width` padded columns of n rows. `scratch` is shared by all blocks."""

    rows: slice
    columns: slice  # of the unpadded vocabulary
    inner: slice  # the unpadded columns of this block
    inside: list[Float32[Tensor, "n inner"]]  # student, teacher
    both: Float32[Tensor, "2 n width"]  # student, teacher
    student: Float32[Tensor, "n width"]
    teacher: Float32[Tensor, "n width"]
    weight: Float32[Tensor, "n 1"]
    betas: Float32[Tensor, "2 n 1"]
    shift: Float32[Tensor, "n 1"]
    maximum: list[Float32[Tensor, "n 1"]]
    most: list[Rows]
    least: list[Rows]
    per_model: Float32[Tensor, "2 n"]
    shift_per_model: Float32[Tensor, "2 n"]
    sums: list[Float32[Tensor, " n"]]
    sums_rows: list[Rows]
    scratch: Float32[Tensor, "2 n width"]
    x: Float32[Tensor, "n width"]  # the first half of scratch
    x_rows: Rows
    w: Float32[Tensor, "n width"]  # the second
    w_rows: Rows


class Workspace:
    """Buffers for a batch of one shape, and its blocks."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.rows, self.vocab, self.device = rows, vocab, device
        cpu = uses_numpy(device)
        padded = -(-vocab // _LANES) * _LANES
        self.tiles = -(-padded // TILE) if cpu else 1
        width = -(-padded // (self.tiles * _LANES)) * _LANES  # equal tiles
        height = max(1, TILE // padded) if cpu else max(1, rows)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.both = empty(2, rows, padded)
        self.both[:, :, vocab:] = LEAST
        self.weight, self.betas, self.maximum = empty(rows, 1), empty(2, rows, 1), empty(2, rows, 1)
        self.shift, self.sums = empty(rows, self.tiles), empty(5, rows, self.tiles)
        self.per_model, self.shift_per_model = (
            empty(2, rows, self.tiles),
            empty(2, rows, self.tiles),
        )
        self.most, self.least = (
            rows_of(empty(2, rows, self.tiles)),
            rows_of(empty(2, rows, self.tiles)),
        )
        self.weight_rows, self.betas_rows, self.maximum_rows = map(
            rows_of, (self.weight, self.betas, self.maximum)
        )
        self.shift_rows, self.sums_rows, self.per_model_rows = map(
            rows_of, (self.shift, self.sums, self.per_model)
        )
        scratch = empty(2 * min(height, max(rows, 1)) * width)
        self.bands = [
            [
                self._block(slice(row, min(row + height, rows)), tile, width, scratch)
                for tile in range(self.tiles)
            ]
            for row in range(0, rows, height)
        ]
        """Blocks of the same rows."""
        self.blocks = [block for band in self.bands for block in band]

    def _block(self, rows: slice, tile: int, width: int, scratch: Tensor) -> Block:
        both = self.both[:, rows, tile * width : (tile + 1) * width]
        columns = slice(tile * width, min((tile + 1) * width, self.vocab))
        inner = slice(0, columns.stop - columns.start)
        scratch = scratch[: both.numel()].view(both.shape)
        sums = self.sums[:, rows, tile].unbind()
        return Block(
            rows=rows,
            columns=columns,
            inner=inner,
            inside=[both[0, :, inner], both[1, :, inner]],
            both=both,
            student=both[0],
            teacher=both[1],
            weight=self.weight[rows],
            betas=self.betas[:, rows],
            shift=self.shift[rows, tile : tile + 1],
            maximum=[self.maximum[0, rows], self.maximum[1, rows]],
            most=[self.most[0, rows, tile], self.most[1, rows, tile]],
            least=[self.least[0, rows, tile], self.least[1, rows, tile]],
            per_model=self.per_model[:, rows, tile],
            shift_per_model=self.shift_per_model[:, rows, tile],
            sums=list(sums),
            sums_rows=[rows_of(part) for part in sums],
            scratch=scratch,
            x=scratch[0],
            x_rows=rows_of(scratch[0]),
            w=scratch[1],
            w_rows=rows_of(scratch[1]),
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
