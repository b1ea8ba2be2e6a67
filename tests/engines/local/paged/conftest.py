"""Flash Attention for a CPU: loops with the real functions' signatures and rules."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from optimal_sampling.engines.local.paged import attention_backends


def one_segment(query, keys, values, scale, window):
    """Causal attention of the last queries of a row. [queries, heads, dim] each."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (
        query.shape[-1] ** -0.5 if scale is None else scale
    )
    last = torch.arange(len(query))[:, None] + len(keys) - len(query)
    place = torch.arange(len(keys))[None]
    blocked = place > last
    if window[0] >= 0:
        blocked |= place < last - window[0]
    weights = scores.masked_fill(blocked, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def fake_operator(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
    seqused_k=None, alibi_slopes=None,
):  # fmt: skip
    """aten::_flash_attention_forward over ragged rows, with what it takes from PyTorch 2.9 on."""
    assert not dropout_p
    assert not return_debug_mask
    assert alibi_slopes is None
    assert cum_seq_q.dtype == cum_seq_k.dtype == seqused_k.dtype == torch.int32
    assert len(cum_seq_q) == len(cum_seq_k) == len(seqused_k) + 1
    assert query.is_contiguous()
    assert query.shape[1] % key.shape[1] == 0
    assert cum_seq_q[-1] == len(query)
    left, right = window_size_left, 0 if is_causal else window_size_right
    output = torch.full_like(query, torch.nan)
    for i, used in enumerate(seqused_k.tolist()):
        first, end = cum_seq_q[i : i + 2].tolist()
        assert end - first <= max_q
        assert used <= max_k
        assert right == 0 or end - first == 1
        seen = slice(int(cum_seq_k[i]), int(cum_seq_k[i]) + used)
        output[first:end] = one_segment(
            query[first:end], key[seen], value[seen], scale, (left, right)
        )
    return output, None, None, None, None


fake_operator.default = torch.ops.aten._flash_attention_forward.default


def fake_flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    softmax_scale,
    causal,
    window_size,
    block_table,
):
    """flash_attn.flash_attn_varlen_func over pages."""
    assert causal
    assert k.shape[1] % 256 == 0
    assert block_table.dtype == cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(block_table.min()) >= 0
    assert int(block_table.max()) < len(k)
    output = torch.full_like(q, torch.nan)
    for i, pages in enumerate(block_table):
        first, end = cu_seqlens_q[i : i + 2].tolist()
        used = int(cu_seqlens_k[i + 1] - cu_seqlens_k[i])
        keys, values = (x[pages.long()].flatten(0, 1)[:used] for x in (k, v))
        assert len(keys) == used <= max_seqlen_k
        output[first:end] = one_segment(q[first:end], keys, values, softmax_scale, window_size)
    return output


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """Whatever the device and the precision, Flash Attention is there."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fake_operator)
    package = types.ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_func = fake_flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_backends, "_device_problem", lambda device, dtype: "")


class FakeRecorder:
    """Runs the function again instead of replaying it."""

    recorded = 0

    def __call__(self, forward):
        FakeRecorder.recorded += 1
        forward()
        return forward
