"""Arithmetic on one number per row: in NumPy on a CPU, where a call costs a quarter of torch's,
else in torch.
"""

# ruff: noqa: D102  (protocols of operations that NumPy and torch document)
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Array",
    "Namespace",
    "argmax",
    "array_of",
    "at_least",
    "at_most",
    "dot",
    "namespace",
    "stack",
    "tensor_of",
    "uses_numpy",
]


class Array(Protocol):
    """An ndarray on a CPU, else a tensor.

    One number per row where nothing else is said; float64 or bool.
    """

    def __add__(self, other: Any, /) -> Array: ...
    def __radd__(self, other: Any, /) -> Array: ...
    def __sub__(self, other: Any, /) -> Array: ...
    def __rsub__(self, other: Any, /) -> Array: ...
    def __mul__(self, other: Any, /) -> Array: ...
    def __rmul__(self, other: Any, /) -> Array: ...
    def __truediv__(self, other: Any, /) -> Array: ...
    def __rtruediv__(self, other: Any, /) -> Array: ...
    def __neg__(self) -> Array: ...
    def __invert__(self) -> Array: ...
    def __and__(self, other: Any, /) -> Array: ...
    def __or__(self, other: Any, /) -> Array: ...
    def __xor__(self, other: Any, /) -> Array: ...
    def __rshift__(self, other: Any, /) -> Array: ...
    def __eq__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def __ne__(self, other: Any, /) -> Array: ...  # type: ignore[override]
    def __lt__(self, other: Any, /) -> Array: ...
    def __le__(self, other: Any, /) -> Array: ...
    def __gt__(self, other: Any, /) -> Array: ...
    def __ge__(self, other: Any, /) -> Array: ...
    def __getitem__(self, index: Any, /) -> Array: ...
    def __setitem__(self, index: Any, value: Any, /) -> None: ...
    def __iter__(self) -> Iterator[Any]: ...
    def any(self) -> Any: ...
    def all(self) -> Any: ...
    def tolist(self) -> Any: ...


class Namespace(Protocol):
    """What the modules `numpy` and `torch` have in common."""

    float32: Any
    float64: Any

    def abs(self, x: Array, /) -> Array: ...
    def amax(self, x: Array, axis: int, *, out: Array = ...) -> Array: ...
    def amin(self, x: Array, axis: int, *, out: Array = ...) -> Array: ...
    def asarray(self, x: Array, *, dtype: Any) -> Array: ...
    def clip(self, x: Array, low: float, high: float | None, /) -> Array: ...
    def exp(self, x: Array, /) -> Array: ...
    def log1p(self, x: Array, /, *, out: Array = ...) -> Array: ...
    def isnan(self, x: Array, /) -> Array: ...
    def log(self, x: Array, /) -> Array: ...
    def maximum(self, x: Array, y: Array, /) -> Array: ...
    def minimum(self, x: Array, y: Array, /) -> Array: ...
    def sqrt(self, x: Array, /) -> Array: ...
    def sum(self, x: Array, axis: int, *, dtype: Any = ...) -> Array: ...
    def where(self, condition: Array, x: Array | float, y: Array | float, /) -> Array: ...


NUMPY_DEVICES = frozenset({"cpu"})
"""Types of device on which arrays are NumPy's; elsewhere they are tensors."""


def uses_numpy(device: torch.device) -> bool:
    """Whether arrays on this device are NumPy's."""
    return device.type in NUMPY_DEVICES


def namespace(device: torch.device) -> Namespace:
    """The module with which arrays on this device are computed."""
    return cast(Namespace, np if uses_numpy(device) else torch)


def array_of(x: Tensor) -> Array:
    """The same memory as an array."""
    return x.numpy() if uses_numpy(x.device) else x


def tensor_of(x: Array) -> Tensor:
    """The same memory as a tensor."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def stack(arrays: Sequence[Array]) -> Array:
    """[k, rows], float64. np.stack takes four times as long."""
    if isinstance(arrays[0], Tensor):
        return torch.stack([tensor_of(x).to(torch.float64) for x in arrays])
    return np.array(arrays, dtype=np.float64)


def at_least(x: Array, least: float) -> Array:
    """max(x, least); np.clip takes four times as long. NaN stays."""
    if isinstance(x, Tensor):
        return x.clamp(min=least)
    return np.maximum(cast("NDArray[np.float64]", x), least)


def at_most(x: Array, most: float) -> Array:
    """min(x, most). NaN stays."""
    if isinstance(x, Tensor):
        return x.clamp(max=most)
    return np.minimum(cast("NDArray[np.float64]", x), most)


def argmax(y: Float[Tensor, "n width"]) -> Int64[Tensor, " n"]:
    """First of the largest. NumPy's is twenty times as fast on a CPU."""
    if uses_numpy(y.device):
        return torch.from_numpy(y.numpy().argmax(-1))
    return y.argmax(-1)


def dot(x: Array, y: Array, out: Array) -> None:
    """Sum of x y over the last axis. NumPy's takes a third of a product and its sum."""
    if isinstance(x, Tensor):
        torch.sum(x * tensor_of(y), -1, out=tensor_of(out))
    else:
        np.vecdot(x, y, out=out)  # type: ignore[call-overload]
