"""Fused layers: the same logits as the layers of Transformers, and only where they are known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimal_sampling.engines.local.paged import fused_decoder, layer_ops
from optimal_sampling.engines.local.paged.fused_decoder import FusedDecoder, unfused_reason
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.local.conftest import engine_of, tiny_model

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(not layer_ops.has_triton(), reason="Triton is not installed")

KINDS = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 20},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Qwen3": {},
    "Llama with LongRoPE": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 32,
            "factor": 3.0,
        }
    },
}


def capture(engine, requests):
    """Teacher logits of every token of every text."""
    done = by_key(engine.view(capture={"teacher_logits"}).generate(requests))
    return {key: c.captured["teacher_logits"] for key, c in done.items()}


def requests(count=6, new=40):
    lengths = [3, 9, 17, 25, 40, 50][:count]
    return [
        Request(str(n), 0, 0, tuple([2, 3, 5] * n)[:n], (1, 4) * (n // 2) + (3,), new)
        for n in lengths
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_layers(kind, flash_on_cpu):
    """Guards: a window, a bias, a head norm or a residual that the fused layers lack; keys in
    another place of the cache; rotary factors that are kept although they depend on the text.
    """
    name = kind.split()[0]
    models = [tiny_model(seed, layers=2, kind=name, **KINDS[kind]) for seed in (1, 2)]
    if kind == "Qwen2":
        for model in models:
            assert model.model.layers[1].self_attn.sliding_window == 16
            assert model.model.layers[0].self_attn.sliding_window is None
    plain = engine_of(*models, fused_layers=False, draft_tokens=2)
    expected = capture(plain, requests())
    assert plain.pair.runners["teacher"].decoder is None
    fused = engine_of(*models, draft_tokens=2)
    assert fused.pair.runners["teacher"].decoder is not None
    assert "fused layers" in fused.notes()["attention"]
    decoder = fused.pair.runners["teacher"].decoder
    assert (decoder._table is None) == (kind == "Llama with LongRoPE")
    found = capture(fused, requests())
    assert found.keys() == expected.keys()
    for key, logits in expected.items():
        torch.testing.assert_close(found[key], logits, rtol=1e-4, atol=1e-4)


def test_merged_weights_are_the_models_own():
    """Guards: twice the memory of a model, and a model that runs with other weights afterwards."""
    model = tiny_model(1, kind="Llama", attention_bias=True)
    ids = torch.arange(9)[None]
    before = model(ids).logits
    engine_of(model, model)  # plugs the attention function in, and fuses the norms
    decoder = FusedDecoder(model)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    layer = decoder.layers[1]
    for part, whole in (
        (attention.k_proj.weight, layer.qkv.weight),
        (attention.v_proj.bias, layer.qkv.bias),
        (mlp.up_proj.weight, layer.gate_up.weight),
    ):
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    joined = torch.cat([getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")])
    assert torch.equal(joined, layer.qkv.weight)
    again = FusedDecoder(model).layers[1]
    assert again.qkv.weight.data_ptr() == layer.qkv.weight.data_ptr()
    assert torch.equal(again.gate_up.weight, layer.gate_up.weight)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, before)


def test_models_that_are_not_exactly_known_are_not_fused(flash_on_cpu):
    """Guards: a multiplier, an activation or a hook that is lost."""
    granite = tiny_model(1, kind="Granite", residual_multiplier=0.5)
    gelu = tiny_model(2, hidden_act="gelu")
    engine = engine_of(granite, gelu)
    assert engine.pair.runners["student"].decoder is None
    assert engine.pair.runners["teacher"].decoder is None
    assert "layers not fused: a GraniteForCausalLM is none of" in engine.notes()["attention"] or (
        "its activation is gelu" in engine.notes()["attention"]
    )
    assert "GraniteForCausalLM" in unfused_reason(granite)
    assert "gelu" in unfused_reason(gelu)
    known = tiny_model(3)
    assert "norms" in unfused_reason(known)  # not replaced by `fuse_norms` yet
    engine_of(known, known)
    assert unfused_reason(known) == ""
    known.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in unfused_reason(known)
    biased = tiny_model(4)
    engine_of(biased, biased)
    biased.model.layers[1].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    assert "bias" in unfused_reason(biased)


def test_fused_layers_that_fail_their_check_are_not_used(flash_on_cpu, monkeypatch):
    """Guards: a kernel whose numbers are wrong on some GPU; and pages lost together with it."""
    monkeypatch.setattr(fused_decoder, "silu_mul", lambda x: x.chunk(2, -1)[0])
    engine = engine_of(tiny_model(1), tiny_model(2))
    runner = engine.pair.runners["teacher"]
    assert type(runner).__name__ == "PageRunner"
    assert runner.decoder is None
    assert "layers not fused: they failed their check" in engine.notes()["attention"]


@needs_triton
@pytest.mark.timeout(300)
def test_programs_in_the_interpreter():
    """Guards: everything that `interpreted_layers.py` lists."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted_layers.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
