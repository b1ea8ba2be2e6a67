"""Keys and values of one model in pages of one memory that never moves.

A row holds its token p at `manager.start(row) + p`. The first page is scratch: what idle rows
compute is written there, and only idle rows read it. As the memory stays where it is, CUDA graphs
that were recorded over it stay valid.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.engines.local.cache import FlatCache
from optimal_sampling.engines.local.memory import Lengths
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager

__all__ = ["PageCache"]


class PageCache(FlatCache):
    """Memory of `pages` pages and one of scratch. `pool`: where it goes when it is released."""

    def __init__(self, manager: PageManager, pool: list[PageCache]) -> None:
        super().__init__()
        self.manager: PageManager = manager
        self.pages = manager.pages
        self._pool = pool

    @property
    def tokens(self) -> int:
        """All pages, and the scratch page."""
        return (self.pages + 1) * PAGE

    def make_room(self, lengths: Lengths, width: int) -> None:
        """Make the manager's copies."""
        for copy in self.manager.reserve(lengths, width):
            source = slice(copy.source * PAGE, (copy.source + copy.pages) * PAGE)
            target = slice(copy.target * PAGE, (copy.target + copy.pages) * PAGE)
            for memory in self.memories():
                memory[target] = memory[source].clone()  # they may overlap

    def layer(
        self, layer: int
    ) -> tuple[Float[Tensor, "all heads key_dim"], Float[Tensor, "all heads value_dim"]]:
        """Keys and values of all pages of a layer."""
        return self._keys[layer], self._values[layer]

    def move(self, source: int, target: int, count: int) -> None:
        """Row `target` takes over the extent of `source`; nothing is copied."""
        self.manager.move(source, target)

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Zero a row's pages."""
        extent = self.manager.allocator.rows[row]
        for memory in self.memories():
            memory[extent.start * PAGE : extent.end * PAGE] = 0

    def release(self) -> None:
        """Free all rows. The memory is kept for the next run."""
        self.manager.allocator.resize([])
        self._pool.append(self)
