"""The programs of fused layers against PyTorch, in Triton's interpreter.

`test_fused_decoder.py` runs this file in a process of its own.
"""

import numpy as np
import pytest
import torch

from optimal_sampling.engines.local.layers import RMSNorm
from optimal_sampling.engines.local.paged import layer_ops as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""About one rounding step: the programs round once, PyTorch after every operation."""


def numbers(*shape, dtype, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(dtype)


def norm_of(size, dtype, seed=9, eps=1e-5):
    return RMSNorm(1 + numbers(size, dtype=dtype, seed=seed, spread=0.2), eps)


def close(found, expected, steps=2.0):
    """The reference is computed in float64 from the same inputs."""
    tolerance = steps * STEPS[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def in_float64(norm):
    return RMSNorm(norm.weight.double(), norm.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 48, 200])
def test_add_rms_norm(size, dtype):
    """Guards: a mean over padding, a norm of the sum before it is rounded, a residual not kept."""
    norm = norm_of(size, dtype)
    residual, x = (numbers(5, size, dtype=dtype, seed=s, spread=3.0) for s in (1, 2))
    total = residual + x
    found = ops.add_rms_norm_triton(residual, x, norm)
    if dtype == torch.bfloat16:  # the interpreter rounds towards zero
        close(residual, total.double())
    else:
        assert torch.equal(residual, total)
    close(found, ops.add_rms_norm_reference(residual.double(), None, in_float64(norm)))
    kept = residual.clone()
    assert torch.equal(ops.add_rms_norm_triton(residual, None, norm), found)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (6, 1, 24), (2, 2, 16)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store(heads, kv_heads, dim, normed, dtype):
    """Guards: heads mixed up, halves turned the wrong way, writes beside their place, padding of
    a head that is no power of two.
    """
    tokens, places = 5, 40
    qkv = numbers(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=1)
    angle = numbers(11, dim // 2, dtype=torch.float32, seed=2, spread=3.0).repeat(1, 2)
    position = torch.tensor([3, 0, 10, 10, 7])
    rotary = ops.Rotary(angle.cos().to(dtype), angle.sin().to(dtype), position)
    norms = ops.HeadNorms(norm_of(dim, dtype, 3), norm_of(dim, dtype, 4)) if normed else None
    index = torch.tensor([7, 0, 39, 12, 3])
    memory = ops.Memory(
        torch.full((places, kv_heads, dim), 5.0, dtype=dtype),
        torch.full((places, kv_heads, dim), 6.0, dtype=dtype),
        index,
    )
    exact = ops.Memory(memory.keys.double(), memory.values.double(), index)
    query = ops.rotate_and_store_triton(qkv, rotary, memory, norms)
    want = ops.rotate_and_store_reference(
        qkv.double(),
        ops.Rotary(rotary.cos.double(), rotary.sin.double(), position),
        exact,
        ops.HeadNorms(*map(in_float64, norms)) if norms else None,
    )
    assert query.shape == (tokens, heads, dim)
    close(query, want)
    close(memory.keys, exact.keys)
    assert torch.equal(memory.values.double(), exact.values)


def test_a_position_beyond_the_table_is_no_number():
    """Guards: memory read behind the table, and a text that goes on with some rotation."""
    qkv, table = numbers(2, 4 * 8, dtype=torch.float32), torch.ones(3, 8)
    rotary = ops.Rotary(table, table, torch.tensor([2, 3]))
    keys, values = torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)
    memory = ops.Memory(keys, values, torch.tensor([0, 1]))
    query = ops.rotate_and_store_triton(qkv, rotary, memory, None)
    assert query[0].isfinite().all()
    assert query[1].isnan().all()
    assert keys[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    """Guards: gate and up exchanged, a block beyond the row, overflow of exp."""
    gate_up = numbers(3, 2 * 1500, dtype=dtype, spread=4.0)
    gate_up[0, 0], gate_up[1, 0] = -300, 300
    with np.errstate(over="ignore"):  # exp(300) is inf, and 1 / inf what is wanted
        found = ops.silu_mul_triton(gate_up)
    close(found, ops.silu_mul_reference(gate_up.double()))
