"""Noise: its law, and that it is a function of (key, position, token id) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from optimal_sampling.distribution import gumbel, keys_tensor


def uniform(keys, position, vocab):
    """The noise mapped back to (0, 1)."""
    return torch.exp(-torch.exp(-gumbel(keys_tensor(keys), torch.tensor(position), vocab).double()))


def test_law_and_independence_along_each_axis():
    """Guards: a hash that is not uniform, or that correlates neighbours; each p below 1e-4 by luck
    once in 10,000.
    """
    by_id = uniform([7], [3], 200_000).flatten()
    by_position = uniform([7] * 100_000, list(range(100_000)), 2)
    by_key = uniform(list(range(100_000)), [0] * 100_000, 2)
    for sample in (by_id, by_position[:, 1], by_key[:, 0]):
        assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-4
        for lag in (1, 2, 64, 256):
            assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 4 / len(sample) ** 0.5
    for pairs in (by_position, by_key):
        cells = np.histogram2d(pairs[:, 0], pairs[:, 1], bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(cells.flatten()).pvalue > 1e-4


def test_tail_is_fine_and_long():
    """Guards: winners quantised. With 24 bits no noise exceeds 17, and large vocabularies tie at
    the top.
    """
    noise = torch.cat(
        [gumbel(keys_tensor([k]), torch.tensor([0]), 262_144).flatten() for k in range(40)]
    )
    top = noise.sort().values[-2000:]
    assert noise.isfinite().all()
    assert top.unique().numel() > 1970
    assert stats.kstest((top - top[0]).numpy()[1:], "expon").pvalue > 1e-4
    assert top[-1] > 14


def test_no_row_collides():
    """Guards: 32 bits of state, with which 100,000 rows share a whole vector of noise (about once
    in this test).
    """
    keys = [*range(50_000), *(k << 32 for k in range(1, 50_001))]
    rows = gumbel(keys_tensor(keys), torch.zeros(100_000, dtype=torch.int64), 3)
    assert rows.unique(dim=0).shape[0] == 100_000
    rows = gumbel(keys_tensor([5] * 100_000), torch.arange(100_000), 3)
    assert rows.unique(dim=0).shape[0] == 100_000


def test_keys_of_64_bits():
    """Guards: keys above 2^63 that overflow, and keys that differ only in their upper half."""
    keys = keys_tensor([2**64 - 1, 2**63, 2**32, 1, 0])
    assert keys.tolist() == [-1, -(2**63), 2**32, 1, 0]
    assert gumbel(keys, torch.zeros(5, dtype=torch.int32), 40).unique(dim=0).shape[0] == 5


def test_function_of_key_position_and_id_alone():
    """Guards: noise that depends on the batch, on the vocabulary's size or on tiles."""
    keys, position = keys_tensor(range(37)), torch.arange(37) * 3
    for vocab in (1, 63, 272, 40_000):
        noise = gumbel(keys, position, vocab)
        for i in (0, 17, 36):
            assert torch.equal(
                noise[i : i + 1], gumbel(keys[i : i + 1], position[i : i + 1], vocab)
            )
        assert torch.equal(gumbel(keys, position, vocab + 5)[:, :vocab], noise)


@pytest.mark.parametrize(("rows", "count"), [(5, 1), (37, 257), (3, 40_000)])
def test_noise_of_given_ids_is_that_of_the_whole_row(rows, count):
    """Guards: top-k lists of a server drawn with other noise than full rows, small or in tiles."""
    keys = keys_tensor(range(rows))
    position = torch.arange(rows) + 7
    ids = torch.stack([torch.randperm(60_000)[:count] for _ in range(rows)])
    whole = gumbel(keys, position, 60_000)
    assert torch.equal(gumbel(keys, position, ids), whole.gather(-1, ids))


def test_integers_are_fixed():
    """Guards: a change of the hash, with which no recorded run could be repeated."""
    noise = gumbel(keys_tensor([0x0123456789ABCDEF]), torch.tensor([42]), 4)
    want = torch.tensor([[0.688168, 1.500954, -0.859313, -1.470584]])
    torch.testing.assert_close(noise, want, rtol=0, atol=2e-6)


def test_no_rows():
    """Guards: an empty batch."""
    assert gumbel(keys_tensor([]), torch.zeros(0, dtype=torch.int64), 7).shape == (0, 7)
