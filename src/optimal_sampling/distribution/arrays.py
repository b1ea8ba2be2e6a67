"""Arithmetic on one number per row: in NumPy on a CPU, where a call costs a quarter of torch's,
else in torch. And operations on rows of scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Array",
    "Flags",
    "Logits",
    "Namespace",
    "Positions",
    "Scores",
    "Tokens",
    "argmax",
    "array_of",
    "at_least",
    "at_most",
    "check_shapes",
    "cuts",
    "dot",
    "fill_rows",
    "full",
    "keep_largest",
    "keep_likely",
    "keep_top_k",
    "namespace",
    "stack",
    "tensor_of",
    "to_float32",
    "uses_numpy",
    "values_of",
]

Array: TypeAlias = NDArray[np.float64]
"""One number per row where nothing else is said. On an accelerator it is a tensor, which has the
same operators.
"""

Flags: TypeAlias = NDArray[np.bool_]
"""One truth value per row; on an accelerator a tensor."""


Logits: TypeAlias = Float[Tensor, "rows vocab"]
"""Of one model, one row per token to draw."""

Scores: TypeAlias = Float32[Tensor, "rows vocab"]
"""Log-probabilities, up to a constant per row where that is said; or noise."""

Tokens: TypeAlias = Int64[Tensor, " rows"]
"""One token id per row."""

Positions: TypeAlias = Int[Tensor, " rows"]
"""Index of each row's token in its completion, 0 for the first."""


_Unary: TypeAlias = Callable[[Array], Array]
_Binary: TypeAlias = Callable[[Array, Array], Array]
_Function: TypeAlias = Callable[..., Array]


class Namespace(Protocol):
    """What the modules `numpy` and `torch` have in common, as far as it is used."""

    float32: Any
    float64: Any
    abs: _Unary
    exp: _Unary
    log: _Unary
    sqrt: _Unary
    isnan: Callable[[Array], Flags]
    maximum: _Binary
    minimum: _Binary
    where: Callable[[Flags, Array | float, Array | float], Array]
    amax: _Function
    amin: _Function
    asarray: _Function
    clip: _Function
    log1p: _Function
    sum: _Function


NUMPY_DEVICES = frozenset({"cpu"})
"""Types of device on which arrays are NumPy's; elsewhere they are tensors."""


def uses_numpy(device: torch.device) -> bool:
    """Whether arrays on this device are NumPy's."""
    return device.type in NUMPY_DEVICES


def namespace(device: torch.device) -> Namespace:
    """The module with which arrays on this device are computed."""
    return cast(Namespace, np if uses_numpy(device) else torch)


def array_of(x: Tensor) -> NDArray[Any]:
    """The same memory as an array."""
    return cast("NDArray[Any]", x.numpy() if uses_numpy(x.device) else x)


def tensor_of(x: NDArray[Any] | Tensor) -> Tensor:
    """The same memory as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def full(rows: int, value: float, device: torch.device) -> Array:
    """The same number for every row."""
    if uses_numpy(device):
        return np.full(rows, value)
    numbers = torch.full((rows,), value, dtype=torch.float64, device=device)
    return array_of(numbers)


def to_float32(x: Array, xp: Namespace) -> Array:
    """Rounded to float32, kept in float64."""
    rounded = xp.asarray(x, dtype=xp.float32)
    return xp.asarray(rounded, dtype=xp.float64)


def stack(arrays: Sequence[Array] | Sequence[Tensor]) -> Array:
    """[k, rows], float64. np.stack takes four times as long."""
    if isinstance(arrays[0], Tensor):
        doubles = [tensor_of(x).to(torch.float64) for x in arrays]
        return cast(Array, torch.stack(doubles))
    return np.array(arrays, dtype=np.float64)


def at_least(x: Array | Tensor, least: float) -> Array:
    """max(x, least); np.clip takes four times as long. NaN stays."""
    if isinstance(x, Tensor):
        return cast(Array, x.clamp(min=least))
    return np.maximum(x, least)


def at_most(x: Array | Tensor, most: float) -> Array:
    """min(x, most). NaN stays."""
    if isinstance(x, Tensor):
        return cast(Array, x.clamp(max=most))
    return np.minimum(x, most)


def argmax(y: Float[Tensor, "n width"]) -> Int64[Tensor, " n"]:
    """First of the largest. NumPy's is twenty times as fast on a CPU."""
    if uses_numpy(y.device):
        return torch.from_numpy(y.numpy().argmax(-1))
    return y.argmax(-1)


def values_of(x: Logits, token: Tokens) -> Array:
    """Of one token per row, float64."""
    chosen = x.gather(-1, token[:, None])
    return array_of(chosen[:, 0].to(torch.float64))


def fill_rows(x: Tensor, rows: Flags, value: float) -> None:
    """Write the value everywhere into these rows of [..., rows, vocab]."""
    x.masked_fill_(tensor_of(rows)[:, None], value)


def dot(x: Array | Tensor, y: Array, out: Array) -> None:
    """Sum of x y over the last axis. NumPy's takes a third of a product and its sum."""
    if isinstance(x, Tensor):
        torch.sum(x * tensor_of(y), -1, out=tensor_of(out))
    else:
        np.vecdot(x, y, out=out)


def check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """ValueError where the logits of the two models have different shapes."""
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(
            f"student and teacher logits have the shapes {shapes}: "
            "give both the same rows and the same vocabulary"
        )


def cuts(top_k: int, top_p: float) -> bool:
    """Whether `keep_largest` may leave a token out."""
    return top_k > 0 or top_p < 1


def keep_largest(scores: Scores, top_k: int, top_p: float) -> Bool[Tensor, "rows vocab"]:
    """The k likeliest tokens, then of these the fewest whose share reaches p; at least one.

    -1 and 1 switch off. `scores` are log-probabilities up to a constant per row. Of equal scores
    the smaller token id comes first, at the k-th place as in the nucleus.
    """
    if top_k == 1:
        keep = torch.zeros_like(scores, dtype=torch.bool)
        return keep.scatter_(-1, argmax(scores)[:, None], True)
    if top_p == 1 and not uses_numpy(scores.device):
        return keep_top_k(scores, top_k)
    vocab = scores.shape[-1]
    count = vocab if top_k < 0 else min(top_k, vocab)
    ranked, order = scores.sort(stable=True, dim=-1, descending=True)
    ranked = ranked[:, :count]
    order = order[:, :count]
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_p < 1:
        share = ranked.to(torch.float64).softmax(-1)
        reached = share.cumsum(-1)
        kept[:, 1:] = reached[:, :-1] < top_p
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, order, kept)


def keep_top_k(scores: Scores, top_k: int) -> Bool[Tensor, "rows vocab"]:
    """`keep_largest` without a nucleus and without sorting rows, for accelerators."""
    if not 0 <= top_k < scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(top_k).values[:, -1:]
    above = scores > least
    level = scores == least
    return above | (level & (level.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))


def keep_likely(scores: Scores, min_p: float) -> Bool[Tensor, "rows vocab"]:
    """The tokens with p >= min_p times the row's largest p; at least one.

    `scores` are log-probabilities up to a constant per row.
    """
    least = scores.amax(-1, keepdim=True) + math.log(min_p)
    return scores >= least
