"""Keys and values of all rows of one model, in one memory that never moves.

Per layer a flat memory of `pages * PAGE` tokens; row r holds its token p at `start(r) + p`. The first page is scratch:
what idle rows compute is written there, and only idle rows read it. As the memory stays where it is, CUDA graphs that
were recorded over it stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.engines.local.kv_cache import Cache
from optimal_sampling.engines.local.paged.runs import Runs
from optimal_sampling.engines.local.shapes import round_up

__all__ = ["PAGE", "PagedCache"]

PAGE = 256
"""Tokens per page: the smallest that the flash-attn package takes."""
SPARE = 4
"""Pages to which a row is rounded up while there are enough."""


class PagedCache(Cache):
    """Memory for `pages` pages of rows, and one of scratch."""

    def __init__(self, pages: int) -> None:
        super().__init__()
        self.pages = pages
        self.runs = Runs(pages, first=1)

    @property
    def tokens(self) -> int:
        """All pages, and the scratch page."""
        return (self.pages + 1) * PAGE

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for these numbers of tokens in rows 0, 1, ...; what the rows hold is kept, other rows are freed."""
        pages = [-(-length // PAGE) for length in lengths]
        roomy = [
            round_up(count, SPARE) for count in pages
        ]  # rows of equal length would all move at once
        for copy in self.runs.resize(roomy if sum(roomy) <= self.pages else pages):
            source = slice(copy.source * PAGE, (copy.source + copy.pages) * PAGE)
            target = slice(copy.target * PAGE, (copy.target + copy.pages) * PAGE)
            for memory in self._memories():
                memory[target] = memory[source].clone()  # they may overlap

    def start(self, row: int) -> int:
        """Flat index of a row's first token."""
        return self.runs.rows[row].start * PAGE

    def memory(
        self, layer: int
    ) -> tuple[Float[Tensor, "all heads key_dim"], Float[Tensor, "all heads value_dim"]]:
        """Keys and values of a layer, flat."""
        return self._keys[layer], self._values[layer]

    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` takes over what `source` holds; nothing is copied."""
        self.runs.swap(source, target)

    def clear(self, row: int) -> None:
        """Zero a row, whose model gave NaN."""
        run = self.runs.rows[row]
        for memory in self._memories():
            memory[run.start * PAGE : run.end * PAGE] = 0

    @torch.inference_mode()
    def free(self) -> None:
        """Free all rows. The memory is kept for the next run."""
        self.runs.resize([])
