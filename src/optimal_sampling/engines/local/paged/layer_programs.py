"""The small operations of a decoder layer as GPU programs, in Triton: `layer_ops` launches them.

Each reads and writes every number once. Arithmetic is float32, rounded once at the end.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

__all__ = ["add_rms_norm", "rotate_and_store", "silu_mul"]


@triton.jit
def add_rms_norm(residual, x, weight, out, eps, SIZE: constexpr, BLOCK: constexpr, ADD: constexpr):
    """One token: residual += x, and the norm of the sum as it was rounded."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    place = token * SIZE + columns
    total = tl.load(residual + place, mask=inside, other=0.0)
    if ADD:
        added = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + added).to(residual.dtype.element_ty)
        tl.store(residual + place, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps)
    scaled = total * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(source, lanes, inside, HALF: constexpr):
    low = tl.load(source + lanes, mask=inside, other=0.0)
    high = tl.load(source + HALF + lanes, mask=inside, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _put_halves(target, low, high, lanes, inside, HALF: constexpr):
    kind = target.dtype.element_ty
    tl.store(target + lanes, low.to(kind), mask=inside)
    tl.store(target + HALF + lanes, high.to(kind), mask=inside)


@triton.jit
def rotate_and_store(
    qkv, cos, sin, position, positions, q_weight, k_weight, index, keys, values, query, eps,
    HEADS: constexpr, KV_HEADS: constexpr, HALF: constexpr, BLOCK: constexpr, NORM: constexpr,
):  # fmt: skip
    """One head of one token: a rotated query, a rotated key for the cache, or a value for it.

    NaN at a position that cos and sin do not have.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HALF
    dim: constexpr = 2 * HALF
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * dim
    low, high = _halves(source, lanes, inside, HALF)
    if head >= HEADS + KV_HEADS:
        place = tl.load(index + token) * KV_HEADS + head - HEADS - KV_HEADS
        _put_halves(values + place * dim, low, high, lanes, inside, HALF)
    else:
        if NORM:
            weight = q_weight
            if head >= HEADS:
                weight = k_weight
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / dim + eps)
            weight_low, weight_high = _halves(weight, lanes, inside, HALF)
            low = low * scale * weight_low
            high = high * scale * weight_high
        place = tl.load(position + token)
        there = inside & (place < positions)
        cos_low, cos_high = _halves(cos + place * dim, lanes, there, HALF)
        sin_low, sin_high = _halves(sin + place * dim, lanes, there, HALF)
        lost = tl.where(place < positions, 0.0, float("nan"))
        turned_low = low * cos_low - high * sin_low + lost
        turned_high = high * cos_high + low * sin_high + lost
        if head < HEADS:
            target = query + (token * HEADS + head) * dim
            _put_halves(target, turned_low, turned_high, lanes, inside, HALF)
        else:
            place = tl.load(index + token) * KV_HEADS + head - HEADS
            _put_halves(keys + place * dim, turned_low, turned_high, lanes, inside, HALF)


@triton.jit
def silu_mul(gate_up, out, SIZE: constexpr, BLOCK: constexpr):
    """A block of one token: silu(gate) * up, which lie behind one another."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    source = gate_up + token * 2 * SIZE + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + token * SIZE + columns, product.to(out.dtype.element_ty), mask=inside)
