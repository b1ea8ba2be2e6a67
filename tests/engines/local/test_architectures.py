"""Families of models: each gives its stock logits, or is refused."""

import dataclasses

import pytest
import torch
import transformers

from optimal_sampling.config import LocalOptions
from optimal_sampling.engines.local.layers import PLAIN
from optimal_sampling.engines.local.loading import check_architecture, prepare_pair
from optimal_sampling.engines.local.slots import slot_attention
from optimal_sampling.errors import ModelError
from tests.engines.conformance import EngineConformance
from tests.engines.local.conftest import tiny_model
from tests.engines.local.test_engine import harness_of

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
WINDOW = {"sliding_window": 5}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
RUN = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2 windows": {
        "kind": "Qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        **WINDOW,
    },
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mistral": WINDOW,
    "Gemma2": WINDOW,
    "Gemma3Text": WINDOW,
    "Phi3": {},
    "GPT2": GPT2,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": {},
    "GptOss": {**WINDOW, **MOE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "Olmo2": {},
    "Granite": {},
    "SmolLM3": {},
    "Cohere2": WINDOW,
    "Glm4": {},
    "Starcoder2": WINDOW,
    "Exaone4": {**WINDOW, "sliding_window_pattern": 2},
}
REFUSED = {
    "Bloom": ({"n_layer": 2, "n_head": 4}, "0 of its 2 layers"),
    "GPTJ": ({**GPT2, "rotary_dim": 8}, "0 of its 2 layers"),
    "Mamba": ({}, "0 of its 2 layers"),
    "Qwen3Next": (
        {
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "linear_attention",
    ),
}


def model_of(name, changes):
    kind = changes.get("kind", name.split()[0])
    extra = {k: v for k, v in changes.items() if k != "kind"}
    layers = extra.pop("num_hidden_layers", 2)
    return tiny_model(3, layers=layers, kind=kind, scale=0.2, **extra)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN)
def test_families_that_run_give_their_stock_logits(name):
    """Guards: a feature (window, soft cap, sinks, grouped heads) that is silently left out."""
    model = model_of(name, RUN[name])
    assert check_architecture(model, "teacher").head_dims


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_families_that_do_not_are_refused_by_name(name):
    """Guards: a model without its history: plausible text from the wrong distribution."""
    changes, reason = REFUSED[name]
    with pytest.raises(ModelError, match=name) as error:
        check_architecture(model_of(name, changes), "teacher")
    assert reason in str(error.value)
    assert "teacher" in str(error.value)


@pytest.mark.parametrize("left_out", [{"window": None}, {"softcap": None}, {"scaling": 1.0}])
def test_the_check_notices_what_is_left_out(left_out, monkeypatch):
    """Guards: a check at load that passes whatever the attention function does."""
    model = tiny_model(3, kind="Gemma2", scale=0.5, sliding_window=5, attn_logit_softcapping=2.0)
    original = slot_attention._over_group

    def broken(plan, call, query, group, packed):
        return original(plan, dataclasses.replace(call, **left_out), query, group, packed)

    monkeypatch.setattr(slot_attention, "_over_group", broken)
    with pytest.raises(ModelError, match="whose logits differ"):
        check_architecture(model, "student")


class TestGemma2(EngineConformance):
    """Windows on every other layer and soft caps, through the whole suite."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        models = (
            tiny_model(s, layers=n, kind="Gemma2", scale=0.2, sliding_window=6)
            for s, n in ((1, 2), (2, 4))
        )
        return harness_of(*models)


def test_half_precision_runs_on_a_cpu():
    """Guards: masks and caches of another dtype than the model's."""
    model = tiny_model(2, layers=2).to(torch.bfloat16)
    runners, _ = prepare_pair({"teacher": model}, 12, LocalOptions())
    assert runners["teacher"].rules == PLAIN
