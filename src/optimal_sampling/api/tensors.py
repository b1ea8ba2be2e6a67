"""Lists of different lengths as padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["PerToken", "padded_ids", "per_token"]


def _over_tokens(name: str, least: int) -> Callable[..., Any]:
    """The method `name` of tensors, which without arguments leaves the padding out.

    It is NaN for fewer than `least` tokens.
    """

    def reduce(self: PerToken, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return getattr(super(PerToken, self), name)(*args, **kwargs)
        tokens = self.tokens()
        return getattr(tokens, name)() if len(tokens) >= least else torch.tensor(torch.nan)

    reduce.__name__ = name
    reduce.__doc__ = f"Over the tokens; with arguments as `torch.Tensor.{name}`."
    return reduce


class PerToken(Tensor):
    """A float tensor over tokens whose padding is NaN.

    `mean`, `sum`, `std`, `min` and `max` *without arguments* leave the padding out and give plain
    numbers (NaN where there is no token at all; 0 for `sum`). With a `dim`, and everywhere else, it
    is an ordinary tensor; indexing keeps the class.
    """

    mean: Any = _over_tokens("mean", least=1)
    sum: Any = _over_tokens("sum", least=0)
    std: Any = _over_tokens("std", least=2)
    min: Any = _over_tokens("min", least=1)
    max: Any = _over_tokens("max", least=1)

    def tokens(self) -> Float[Tensor, " tokens"]:
        """The values without the padding, as an ordinary tensor."""
        plain = self.as_subclass(Tensor)
        return plain[~plain.isnan()]

    def __format__(self, spec: str) -> str:
        value: object = self.item() if self.dim() == 0 else self.as_subclass(Tensor)
        return format(value, spec)


def per_token(values: Sequence[Sequence[float]]) -> PerToken:
    """[batch, seq] of float32, padded with NaN."""
    return _padded(values, torch.nan, torch.float32).as_subclass(PerToken)


def padded_ids(ids: Sequence[Sequence[int]], pad_id: int) -> Int[Tensor, "batch seq"]:
    """Token ids as one tensor."""
    return _padded(ids, pad_id, torch.long)


def _padded(rows: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
    result = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=dtype)
    for place, row in enumerate(rows):
        result[place, : len(row)] = torch.tensor(row, dtype=dtype)
    return result
