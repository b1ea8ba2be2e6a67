"""Rotary embeddings whose factors depend on the length of each row, not on the longest one.

LongRoPE (arXiv:2402.13753) has one set of factors for texts up to the original context length and
another for longer ones. Transformers chooses by the largest position of a forward pass, which
holds many rows here.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["LONG", "RowRotary", "join_rows", "split_by_row"]

LONG = 2**30
"""Added to the positions of a row that is longer than the original context length."""


class RowRotary(nn.Module):
    """A rotary embedding computed for short and for long rows; each token takes its own row's."""

    def __init__(self, inner: nn.Module, switch: int) -> None:
        super().__init__()
        self.inner = inner
        self.switch = switch

    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "rows tokens"], **kwargs: Any
    ) -> tuple[Float[Tensor, "rows tokens dim"], ...]:
        """Cosines and sines, as the inner module gives them for a row of its own."""
        long = position_ids >= LONG
        short = torch.where(long, 0, position_ids)
        # one position past the switch makes the inner module choose the long factors
        past = torch.full_like(position_ids[:, :1], self.switch)
        longer = torch.cat([torch.where(long, position_ids - LONG, 0), past], 1)
        pairs = zip(
            self.inner(x, position_ids=short, **kwargs),
            self.inner(x, position_ids=longer, **kwargs),
            strict=True,
        )
        return tuple(torch.where(long[..., None], far[:, :-1], near) for near, far in pairs)


def split_by_row(model: nn.Module) -> int | None:
    """Replace LongRoPE embeddings by `RowRotary`. Returns the longest text with short factors.

    None where there is nothing to replace. A model already treated is left as it is.
    """
    switches = set()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(parent, RowRotary):
                switches.add(parent.switch)
            elif (switch := _switch(child)) is not None:
                setattr(parent, name, RowRotary(child, switch))
                switches.add(switch)
    return min(switches, default=None)


def join_rows(model: nn.Module) -> None:
    """Undo `split_by_row`, for forward passes whose rows all have one length."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RowRotary):
                setattr(parent, name, child.inner)


def _switch(module: Any) -> int | None:
    """The original context length of a LongRoPE embedding."""
    if getattr(module, "rope_type", None) != "longrope":
        return None
    switch: int = module.config.rope_parameters["original_max_position_embeddings"]
    return switch
