"""Layers that replace a model's own, and padding: rows of equal bits in every batch on a CPU.

The matrix functions of a CPU choose another order of summation for few rows, and for long inner
dimensions, so that a float32 logit's last bits depend on the batch. Padding to shapes of one class
avoids it. The classes are facts about one library on one processor, so they are measured at load:

1. a forward pass has at least `tokens` tokens, and so has what is given to the output layer; and a
   multiple of `token_multiple`, so that elementwise functions, computed 32 numbers at a time, have
   no remainder;
2. attention has a multiple of `queries` query rows per key/value head;
3. key/value lengths are multiples of 16 up to `kv_boundary`, beyond it multiples of 512 (PyTorch's
   block of keys); a query attends over the short or the long class according to its own position.

How many tokens rule 1 asks for depends on how the weights of a linear layer lie in memory:
transposed, two are often enough where sixteen are needed otherwise, so small layers are transposed
(`TransposedLinear`). Layers for which no number makes the rule hold, and large ones, for which it
is also the faster choice, run in oneDNN's packed form (`PackedLinear`), whose rows do not depend
on their number.

RMS norms run in one call instead of the seven of Transformers, a tenth of a small model's time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from optimal_sampling.engines.local.memory import round_up

__all__ = [
    "PLAIN",
    "PackedLinear",
    "RMSNorm",
    "ShapeRules",
    "TransposedLinear",
    "fuse_norms",
    "measured_rules",
    "replace_linears",
]

ELEMENTS = 32
"""Numbers per step of PyTorch's elementwise loops; a remainder is computed by another function."""
KV_BLOCK = 512
"""Keys per block of PyTorch's CPU attention."""
MOST_PADDING = 16
"""More padding than this would cost more than the packed form."""
PACK_FROM = 2**18
"""Layers of this many weights or more are packed: memory traffic outweighs the call."""


@dataclass(frozen=True)
class ShapeRules:
    """Padding for one model. `PLAIN` pads nothing beyond what alignment is worth."""

    tokens: int = 1
    token_multiple: int = 1
    queries: int = 1
    kv_boundary: int = sys.maxsize

    def padded_tokens(self, count: int) -> int:
        """Number of tokens of a forward pass that has `count`."""
        return round_up(max(count, self.tokens), self.token_multiple)

    def kv_length(self, length: int) -> int:
        """Number of keys that attention sees where the longest row has `length`."""
        if length <= self.kv_boundary:
            return round_up(length, 16)
        return round_up(length, KV_BLOCK)

    def slot_length(self, length: int) -> int:
        """Memory per slot for rows of up to `length` tokens."""
        return self.kv_length(round_up(length, 64))


PLAIN = ShapeRules()


def _first_rows_equal(layer: Callable[[Tensor], Tensor], inputs: Tensor, counts: list[int]) -> bool:
    full = layer(inputs)
    return all(torch.equal(layer(inputs[:n].clone()), full[:n]) for n in counts)


@cache
def _rows_needed(inputs: int, outputs: int, transposed: bool, threads: int) -> int | None:
    """Fewest rows (a power of two) from which a float32 layer of this shape is row-invariant."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    sample = torch.randn(320, inputs, generator=generator)
    turned = weight.T.contiguous()

    def layer(x: Tensor) -> Tensor:
        return x @ turned if transposed else F.linear(x, weight)

    counts = [*range(MOST_PADDING, 50), 63, 64, 65, 96, 128, 160, 255]
    if not _first_rows_equal(layer, sample, counts):
        return None
    least = MOST_PADDING
    while least > 1 and _first_rows_equal(layer, sample, list(range(least // 2, least))):
        least //= 2
    return least


@cache
def _attention_rules(dim: int, threads: int) -> tuple[int, int]:
    """(multiple of query rows, key/value boundary) for heads of this dimension."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, dim, generator=generator) for n in (64, KV_BLOCK, KV_BLOCK))

    def attend(rows: int, known: int, length: int) -> Tensor:
        mask = torch.zeros(rows, length)
        mask[:, known:] = float("-inf")
        return F.scaled_dot_product_attention(
            q[:, :, :rows].clone(), k[:, :, :length], v[:, :, :length], mask
        )

    reference = attend(64, 48, 48)

    def holds(multiple: int) -> bool:
        return all(
            torch.equal(attend(n, 48, 48), reference[:, :, :n])
            for n in range(multiple, 64, multiple)
        )

    queries = next((m for m in (1, 2, 4, 8, 16) if holds(m)), 32)
    for length in range(64, KV_BLOCK + 1, 16):
        known = {16, length // 32 * 16, length - 16}
        if not all(torch.equal(attend(32, n, length), attend(32, n, n)) for n in known):
            return queries, length - 16
    return queries, sys.maxsize


class PackedLinear(nn.Module):
    """A float32 linear layer in oneDNN's packed form: rows do not depend on their number."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Outputs of the layer that it replaces."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class TransposedLinear(nn.Module):
    """A linear layer whose weights lie in memory as [inputs, outputs]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.turned = linear.weight.detach().T.contiguous()
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Outputs of the layer that it replaces."""
        y = x @ self.turned
        return y if self.bias is None else y.add_(self.bias)


def _replace(model: nn.Module, replacement: Callable[[Any], nn.Module | None]) -> None:
    """Put the replacement of every layer that has one in its place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            made = replacement(child)
            if made is not None:
                setattr(parent, name, made)


def replace_linears(model: nn.Module) -> None:
    """Give every linear layer the form that is row-invariant from the fewest rows."""
    _replace(model, _best_form)


def _replaceable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    return module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _best_form(linear: Any) -> nn.Module | None:
    if not _replaceable(linear):
        return None
    if linear.weight.numel() >= PACK_FROM:
        return PackedLinear(linear)
    plain, turned = _rows_of(linear, False), _rows_of(linear, True)
    if plain is None and turned is None:
        return PackedLinear(linear)
    turn = plain is None or (turned is not None and turned < plain)
    return TransposedLinear(linear) if turn else None


def _rows_of(linear: Any, transposed: bool) -> int | None:
    """Rows that a layer needs to be row-invariant; None: no number of rows makes it so."""
    inputs, outputs = linear.in_features, linear.out_features
    return _rows_needed(inputs, outputs, transposed, torch.get_num_threads())


def measured_rules(model: Any, head_dims: set[int]) -> ShapeRules:
    """Padding that this model needs on this machine with this number of threads.

    Call it after `replace_linears`.
    """
    tokens = [
        _rows_of(module, isinstance(module, TransposedLinear)) or MOST_PADDING
        for module in model.modules()
        if _replaceable(module) or isinstance(module, TransposedLinear)
    ]
    threads = torch.get_num_threads()
    attention = [_attention_rules(dim, threads) for dim in sorted(head_dims)]
    output = model.get_output_embeddings()
    widths = [
        m.out_features for m in model.modules() if hasattr(m, "out_features") and m is not output
    ]
    return ShapeRules(
        token_multiple=ELEMENTS // math.gcd(ELEMENTS, *widths),
        tokens=max(tokens, default=1),
        queries=max((queries for queries, _ in attention), default=1),
        kv_boundary=min((boundary for _, boundary in attention), default=sys.maxsize),
    )


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32."""

    def __init__(self, weight: Float[Tensor, " dim"], eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The normalised rows, as from the norm that it replaces."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> None:
    """Replace RMS norms by equal ones (to the bit in float32 on a CPU)."""
    _replace(model, _fused)


def _fused(module: Any) -> RMSNorm | None:
    """The replacement of an RMS norm that gives the same (Gemma's scales by 1 + weight)."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    is_norm = type(module).__name__.endswith("RMSNorm") and not isinstance(module, RMSNorm)
    if not is_norm or eps is None or weight is None:
        return None
    fused = RMSNorm(weight, eps)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(64, weight.shape[-1], generator=generator).to(weight)
    expected, found = module(sample), fused(sample)
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        return fused if torch.equal(found, expected) else None
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(found, expected, rtol=tolerance, atol=tolerance) else None
