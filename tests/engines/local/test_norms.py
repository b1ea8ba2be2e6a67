"""Fused norms: the same numbers, and only where they are."""

import pytest
import torch

from optimal_sampling.engines.local.layers import RMSNorm, fuse_norms
from tests.engines.local.conftest import tiny_model


def fused_norms(model):
    return [module for module in model.modules() if isinstance(module, RMSNorm)]


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
    fuse_norms(model)
    fused = fused_norms(model)
    assert len(fused) == norms
    assert torch.equal(model(ids).logits, before)
    fuse_norms(model)
    assert list(map(id, fused_norms(model))) == list(map(id, fused)), "twice"


def test_half_precision_is_fused_within_its_rounding():
    model = tiny_model(1).to(torch.bfloat16)
    fuse_norms(model)
    assert len(fused_norms(model)) == 9
