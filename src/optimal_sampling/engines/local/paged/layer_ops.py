"""The small operations of a decoder layer, each one kernel on a GPU and plain PyTorch on a CPU.

The PyTorch functions say what the Triton programs compute, up to where numbers are rounded.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.layers import RMSNorm

__all__ = [
    "LAUNCH",
    "SILU_BLOCK",
    "HeadNorms",
    "Memory",
    "Rotary",
    "add_rms_norm",
    "add_rms_norm_reference",
    "add_rms_norm_triton",
    "has_triton",
    "rotate_and_store",
    "rotate_and_store_reference",
    "rotate_and_store_triton",
    "silu_mul",
    "silu_mul_reference",
    "silu_mul_triton",
]

LAUNCH = {"add_rms_norm": 8, "rotate_and_store": 1, "silu_mul": 4}
"""Warps of each program."""
SILU_BLOCK = 1024
"""Numbers per program of `silu_mul`."""


class Rotary(NamedTuple):
    """Cosines and sines by position, and the positions of a forward pass."""

    cos: Float[Tensor, "positions dim"]
    sin: Float[Tensor, "positions dim"]
    position: Int[Tensor, " tokens"]


class Memory(NamedTuple):
    """A layer's cache, and where this forward pass writes to it."""

    keys: Float[Tensor, "all kv_heads dim"]
    values: Float[Tensor, "all kv_heads dim"]
    places: Int[Tensor, " tokens"]


class HeadNorms(NamedTuple):
    """Norms of single heads before the rotation."""

    query: RMSNorm
    key: RMSNorm


def has_triton() -> bool:
    """Whether Triton is installed; on a CPU it is not needed."""
    return importlib.util.find_spec("triton") is not None


def _programs() -> ModuleType:
    return import_module("optimal_sampling.engines.local.paged.layer_programs")


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


# residual += x, and its norm


def add_rms_norm(
    residual: Float[Tensor, "tokens dim"], x: Float[Tensor, "tokens dim"] | None, norm: RMSNorm
) -> Float[Tensor, "tokens dim"]:
    """Add x to `residual` in place, and normalise the sum; without x only that."""
    if residual.device.type == "cpu":
        return add_rms_norm_reference(residual, x, norm)
    return add_rms_norm_triton(residual, x, norm)


def add_rms_norm_reference(residual: Tensor, x: Tensor | None, norm: RMSNorm) -> Tensor:
    """`add_rms_norm` in PyTorch."""
    if x is not None:
        residual += x
    normed: Tensor = norm(residual)
    return normed


def add_rms_norm_triton(residual: Tensor, x: Tensor | None, norm: RMSNorm) -> Tensor:
    """`add_rms_norm` in one kernel. `residual` is contiguous."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    _programs().add_rms_norm[tokens,](
        residual,
        residual if x is None else x.contiguous(),
        norm.weight,
        out,
        norm.eps,
        SIZE=size,
        BLOCK=_power_of_two(size),
        ADD=x is not None,
        num_warps=LAUNCH["add_rms_norm"],
    )
    return out


# Rotation of queries and keys, and the write to the cache


def rotate_and_store(
    qkv: Float[Tensor, "tokens numbers"], rotary: Rotary, memory: Memory, norms: HeadNorms | None
) -> Float[Tensor, "tokens heads dim"]:
    """Rotated queries; rotated keys and the values are written to the memory.

    `qkv`: per token all query heads, then the key heads, then the value heads.
    """
    if qkv.device.type == "cpu":
        return rotate_and_store_reference(qkv, rotary, memory, norms)
    return rotate_and_store_triton(qkv, rotary, memory, norms)


def _turn(
    x: Float[Tensor, "tokens heads dim"], rotary: Rotary
) -> Float[Tensor, "tokens heads dim"]:
    low, high = x.chunk(2, -1)
    cos, sin = rotary.cos[rotary.position, None], rotary.sin[rotary.position, None]
    return x * cos + torch.cat([-high, low], -1) * sin


def rotate_and_store_reference(
    qkv: Tensor, rotary: Rotary, memory: Memory, norms: HeadNorms | None
) -> Tensor:
    """`rotate_and_store` in PyTorch."""
    kv_heads, dim = memory.keys.shape[1:]
    heads = qkv.view(len(qkv), -1, dim)
    query, key, value = heads.tensor_split([-2 * kv_heads, -kv_heads], 1)
    if norms is not None:
        query, key = norms.query(query), norms.key(key)
    memory.keys.index_copy_(0, memory.places, _turn(key, rotary))
    memory.values.index_copy_(0, memory.places, value)
    return _turn(query, rotary)


def rotate_and_store_triton(
    qkv: Tensor, rotary: Rotary, memory: Memory, norms: HeadNorms | None
) -> Tensor:
    """`rotate_and_store` in one kernel. `qkv` is contiguous."""
    kv_heads, dim = memory.keys.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    query = qkv.new_empty(len(qkv), heads, dim)
    weights = (n.weight for n in norms) if norms is not None else (qkv, qkv)  # not read
    _programs().rotate_and_store[len(qkv), heads + 2 * kv_heads](
        qkv,
        rotary.cos.contiguous(),
        rotary.sin.contiguous(),
        rotary.position,
        len(rotary.cos),
        *weights,
        memory.places,
        memory.keys,
        memory.values,
        query,
        norms.query.eps if norms is not None else 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        BLOCK=_power_of_two(dim // 2),
        NORM=norms is not None,
        num_warps=LAUNCH["rotate_and_store"],
    )
    return query


# The gate of the MLP


def silu_mul(gate_up: Float[Tensor, "tokens two_sizes"]) -> Float[Tensor, "tokens size"]:
    """silu(gate) * up, the halves of the input."""
    if gate_up.device.type == "cpu":
        return silu_mul_reference(gate_up)
    return silu_mul_triton(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in PyTorch."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """`silu_mul` in one kernel. The input is contiguous."""
    tokens, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    blocks = -(-size // SILU_BLOCK)
    _programs().silu_mul[tokens, blocks](
        gate_up, out, SIZE=size, BLOCK=SILU_BLOCK, num_warps=LAUNCH["silu_mul"]
    )
    return out
