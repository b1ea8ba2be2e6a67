"""Padding and packed layers: rows whose bits do not depend on how many there are."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from optimal_sampling.engines.local.layers import (
    PLAIN,
    PackedLinear,
    ShapeRules,
    TransposedLinear,
    measured_rules,
    replace_linears,
)
from tests.engines.local.conftest import tiny_model, with_options


@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(32, 12, True), (144, 384, False), (600, 512, True)]
)
def test_packed_rows_do_not_depend_on_their_number(inputs, outputs, bias):
    """Guards: a kernel chosen by the number of rows, and a packed layer that is another layer."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    packed, x = PackedLinear(linear), torch.randn(200, inputs)
    full = packed(x)
    torch.testing.assert_close(full, linear(x), atol=1e-4, rtol=1e-4)
    for rows in (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100):
        assert torch.equal(packed(x[:rows]), full[:rows])


@pytest.mark.parametrize("bias", [True, False])
def test_a_turned_layer_is_the_same_layer(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=bias).requires_grad_(False), torch.randn(2, 7, 48)
    torch.testing.assert_close(TransposedLinear(linear)(x), linear(x))


def test_large_layers_are_packed_and_small_ones_are_not():
    """Guards: a packed layer whose call costs more than it saves; large layers left as they are."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(600, 512), nn.LayerNorm(512))
    replace_linears(model)
    assert not isinstance(model[0], PackedLinear)
    assert isinstance(model[1], PackedLinear)
    half = nn.Sequential(nn.Linear(600, 512)).to(torch.bfloat16)
    replace_linears(half)
    assert type(half[0]) is nn.Linear


def test_a_model_with_packed_layers_gives_equal_bits_in_every_batch():
    """Guards: rules that hold for small layers only."""
    from tests.engines.conformance import Harness, requests_of
    from tests.engines.local.conftest import CONTEXT, engine_of
    from tests.engines.local.test_engine import PROMPTS, same

    wide = {"hidden_size": 512, "intermediate_size": 640, "head_dim": 64, "scale": 0.05}
    student, teacher = tiny_model(1, layers=1, **wide), tiny_model(2, layers=2, **wide)
    engine = engine_of(student, teacher)
    assert any(isinstance(m, PackedLinear) for m in teacher.modules())
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 12, new=12)
    alone = list(with_options(engine, batch_size=1, draft_tokens=0).generate(requests))
    assert same(alone, with_options(engine, batch_size=12, draft_tokens=3).generate(requests[::-1]))


def test_lengths_are_rounded_within_their_class():
    """Guards: keys of one class padded into another."""
    rules = ShapeRules(tokens=16, token_multiple=4, queries=4, kv_boundary=384)
    assert [rules.padded_tokens(n) for n in (1, 16, 17, 33)] == [16, 16, 20, 36]
    assert [rules.kv_length(n) for n in (1, 384, 385, 512, 513)] == [16, 384, 512, 512, 1024]
    assert all(rules.slot_length(n) >= rules.kv_length(n) >= n for n in range(1, 1200))
    assert [PLAIN.padded_tokens(n) for n in (1, 7)] == [1, 7]


def test_measured_rules_hold_on_this_machine():
    """Guards: rules that pad less than the layers and the attention of this machine need."""
    model = tiny_model(1)
    replace_linears(model)
    rules = measured_rules(model, {8})
    assert rules.token_multiple == 2, "elementwise loops over rows of 16, 32 and 48 numbers"
    assert rules.tokens <= 16
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    assert len(layers) == 2 * 7 + 1
    for layer in layers:
        x = torch.randn(64, layer.in_features)
        full = layer(x)
        assert all(torch.equal(layer(x[:n]), full[:n]) for n in range(rules.tokens, 64))
    q, k, v = (torch.randn(1, 2, n, 8) for n in (64, 48, 48))
    full = scaled_dot_product_attention(q, k, v, torch.zeros(64, 48))
    for n in range(rules.queries, 64, rules.queries):
        part = scaled_dot_product_attention(q[:, :, :n].clone(), k, v, torch.zeros(n, 48))
        assert torch.equal(part, full[:, :, :n])
