"""Fused norms: the same numbers, and only where they are."""

import pytest
import torch

from optimal_sampling.engines.local.norms import RMSNorm, fuse_norms
from tests.engines.local.conftest import tiny_model


@pytest.mark.parametrize(
    ("kind", "norms"), [("Qwen3", 2 * 4 + 1), ("Llama", 2 * 2 + 1), ("Gemma2", 0), ("OPT", 0)]
)
def test_fused_norms_give_the_same_bits(kind, norms):
    """Guards: a norm that scales by 1 + weight, or has a bias, replaced all the same."""
    extra = {
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "Gemma2": {"sliding_window": 5},
    }.get(kind, {})
    model, ids = tiny_model(1, kind=kind, **extra), torch.arange(1, 9)[None]
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data.normal_()
    before = model(ids).logits
    assert fuse_norms(model) == norms
    assert sum(isinstance(m, RMSNorm) for m in model.modules()) == norms
    assert torch.equal(model(ids).logits, before)
    assert fuse_norms(model) == 0, "twice"


def test_half_precision_is_fused_within_its_rounding():
    model = tiny_model(1).to(torch.bfloat16)
    assert fuse_norms(model) == 9
