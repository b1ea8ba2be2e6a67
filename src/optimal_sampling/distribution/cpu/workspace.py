"""How a pair of [rows, vocab] tensors is cut into blocks near a CPU's cache, and its buffers.

A block is a few whole rows where the vocabulary is small, and a tile of one row where it is large.
The cut of a row depends on the vocabulary alone, and rows are padded to whole vectors: so a row's
sums have the same bits in every batch. On an accelerator everything is one block.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float32
from torch import Tensor

from optimal_sampling.distribution.arrays import Array, array_of, uses_numpy

__all__ = ["MIN_EXPONENT", "TILE", "Block", "Loan", "Tile", "Workspace", "borrow"]

MIN_EXPONENT = -87.0
"""exp of less is no normal float32, and slow. A sum that matters is at least e^50 times larger."""

TILE = 5 << 14
"""Numbers per block.

Smaller ones fit the second-level cache, but calls then cost more than work.
"""

_LANES = 64  # numbers that a vectorised loop takes at once


Tile: TypeAlias = Float32[Tensor, "n width"]


@dataclass(frozen=True)
class Block:
    """Views of one block: `width` padded columns of n rows. `scratch` is shared by all blocks."""

    rows: slice
    columns: slice  # of the unpadded vocabulary
    inner: slice  # the unpadded columns of this block
    inside: Float32[Tensor, "2 n inner"]  # student, teacher
    both: Float32[Tensor, "2 n width"]  # student, teacher
    student: Tile
    teacher: Tile
    weight: Float32[Tensor, "n 1"]
    betas: Float32[Tensor, "2 n 1"]
    shift: Float32[Tensor, "n 1"]
    maximum: Float32[Tensor, "2 n 1"]
    most: Array
    least: Array
    per_model: Float32[Tensor, "2 n"]
    shift_per_model: Float32[Tensor, "2 n"]
    sums: list[Float32[Tensor, " n"]]
    sums_array: list[Array]
    scratch: Float32[Tensor, "2 n width"]
    x: Tile  # the first half of scratch
    x_array: Array
    w: Tile  # the second
    w_array: Array


class Workspace:
    """Buffers for a batch of one shape, and its blocks."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        self.rows = rows
        self.vocab = vocab
        self.device = device
        self.loans = 0
        cpu = uses_numpy(device)
        padded = -(-vocab // _LANES) * _LANES
        self.tiles = -(-padded // TILE) if cpu else 1
        self._width = -(-padded // (self.tiles * _LANES)) * _LANES  # equal tiles
        height = max(1, TILE // padded) if cpu else max(1, rows)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.both = empty(2, rows, padded)
        self.both[:, :, vocab:] = MIN_EXPONENT
        self.weight = empty(rows, 1)
        self.betas = empty(2, rows, 1)
        self.maximum = empty(2, rows, 1)
        self.shift = empty(rows, self.tiles)
        self.sums = empty(5, rows, self.tiles)
        self.per_model = empty(2, rows, self.tiles)
        self.shift_per_model = empty(2, rows, self.tiles)
        self.most = array_of(empty(2, rows, self.tiles))
        self.least = array_of(empty(2, rows, self.tiles))
        self.weight_array = array_of(self.weight)
        self.betas_array = array_of(self.betas)
        self.maximum_array = array_of(self.maximum)
        self.shift_array = array_of(self.shift)
        self.sums_array = array_of(self.sums)
        self.per_model_array = array_of(self.per_model)
        self._scratch = empty(2 * min(height, max(rows, 1)) * self._width)
        self.bands = [
            [self._block(slice(row, min(row + height, rows)), tile) for tile in range(self.tiles)]
            for row in range(0, rows, height)
        ]
        """Blocks of the same rows."""
        self.blocks = [block for band in self.bands for block in band]

    def _block(self, rows: slice, tile: int) -> Block:
        first = tile * self._width
        both = self.both[:, rows, first : first + self._width]
        columns = slice(first, min(first + self._width, self.vocab))
        inner = slice(0, columns.stop - columns.start)
        scratch = self._scratch[: both.numel()].view(both.shape)
        sums = self.sums[:, rows, tile].unbind()
        return Block(
            rows=rows,
            columns=columns,
            inner=inner,
            inside=both[:, :, inner],
            both=both,
            student=both[0],
            teacher=both[1],
            weight=self.weight[rows],
            betas=self.betas[:, rows],
            shift=self.shift[rows, tile : tile + 1],
            maximum=self.maximum[:, rows],
            most=self.most[:, rows, tile],
            least=self.least[:, rows, tile],
            per_model=self.per_model[:, rows, tile],
            shift_per_model=self.shift_per_model[:, rows, tile],
            sums=list(sums),
            sums_array=[array_of(part) for part in sums],
            scratch=scratch,
            x=scratch[0],
            x_array=array_of(scratch[0]),
            w=scratch[1],
            w_array=array_of(scratch[1]),
        )


@dataclass(frozen=True)
class Loan:
    """The use of a workspace until it is lent anew."""

    workspace: Workspace
    number: int

    @property
    def space(self) -> Workspace:
        """The workspace; RuntimeError where somebody else has it now."""
        if self.workspace.loans != self.number:
            raise RuntimeError("these buffers hold a newer pair: use each pair before the next")
        return self.workspace


_kept = threading.local()


def borrow(rows: int, vocab: int, device: torch.device) -> Loan:
    """The workspace of this shape; the last few shapes are kept, per thread."""
    cache: dict[tuple[int, int, torch.device], Workspace] = _kept.__dict__.setdefault("cache", {})
    key = (rows, vocab, device)
    if key not in cache:
        while len(cache) >= 4:
            cache.pop(next(iter(cache)))
        # a tensor of inference mode cannot be written to outside of it
        with torch.inference_mode(False):
            cache[key] = Workspace(rows, vocab, device)
    workspace = cache[key]
    workspace.loans += 1
    return Loan(workspace, workspace.loans)
