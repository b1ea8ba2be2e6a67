"""Every causal family that Transformers ships, as a small random model, and how the local engine runs it."""

from __future__ import annotations

import warnings
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2}

# what the default configuration leaves out, as published checkpoints have it
DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"] * 20,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {**MOE, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {**MOE, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 20},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 14},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 30,
        "mlp_layer_types": ["dense", "sparse"] * 30,
    },
    "ministral": {"head_dim": 128, "layer_types": ["full_attention", "sliding_attention"] * 16},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}

# features that exist in the family and are off in its default configuration
WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4096}
HALF = 48
LONGROPE = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.01 * i for i in range(HALF)],
        "long_factor": [1.0 + i for i in range(HALF)],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 4096,
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{family} (windows)": (family, WINDOWS)
        for family in ("dots1", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")
    },
    **{
        f"{family} (windows)": (family, {"sliding_window": 4096})
        for family in ("ministral3", "mixtral", "phi3", "phimoe", "starcoder2")
    },
    **{f"{family} (LongRoPE)": (family, LONGROPE) for family in ("llama", "phi3", "phimoe")},
    "llama (dynamic NTK)": ("llama", DYNAMIC),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
    "granitemoehybrid (attention only)": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 32},
    ),
    "zaya (windows)": (
        "zaya",
        {"layer_types": ["hybrid", "hybrid_sliding"] * 40, "sliding_window": 4096},
    ),
}


def config_of(name: str) -> tuple[Any, Any]:
    """(model class, configuration at its published size) of a family or a variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    changes = {**DEFAULTS.get(family, {}), **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[family](**changes)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        text = config.get_text_config(decoder=True)
        if text is not config and not config.is_encoder_decoder:  # a multimodal wrapper
            config = type(text)(**DEFAULTS[text.model_type]) if text.model_type in DEFAULTS else text
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), model_class)
    if hasattr(config, "is_decoder"):  # BERT's relatives, which are encoders otherwise
        config.is_decoder = True
    return model_class, config
