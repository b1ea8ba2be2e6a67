"""Every causal family of Transformers as a small random model, and how the local engine runs it."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from optimal_sampling.engines.local.model_check import SmallCopy, reason_of
from optimal_sampling.engines.local.shrinking import text_model
from optimal_sampling.errors import ModelError

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSES = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2}

# what the default configuration leaves out, as published checkpoints have it
DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
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
    "exaone4": {"max_position_embeddings": 131072},
    "exaone_moe": {"max_position_embeddings": 131072},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "mamba", "attention"] * 8},
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
    "olmo3": {"max_position_embeddings": 65536},
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

IMAGES_AND_TEXT: dict[str, dict[str, Any]] = {
    "internvl": {},
    "llava": {},
    "mistral3": {},
    "qwen2_5_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24],
            }
        }
    },
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
}
"""Families that Transformers has only together with an image encoder."""

# features that exist in the family and are off in its default configuration
WINDOWS = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 1024}
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
        f"{family} (windows)": (family, {"sliding_window": 1024})
        for family in ("ministral3", "mixtral", "phi3", "phimoe", "starcoder2")
    },
    **{f"{family} (LongRoPE)": (family, LONGROPE) for family in ("llama", "phi3", "phimoe")},
    **{f"{family} (text)": (family, changes) for family, changes in IMAGES_AND_TEXT.items()},
    "llama (dynamic NTK)": ("llama", DYNAMIC),
    "doge (windows)": ("doge", {"keep_window_size": 512}),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
    "granitemoehybrid (attention only)": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 32},
    ),
    "phimoe (LongRoPE and windows)": ("phimoe", {**LONGROPE, "sliding_window": 4096}),
    "phimoe (LongRoPE, a window that no text fills)": (
        "phimoe",
        {**LONGROPE, "sliding_window": 131072},
    ),
    "zaya (windows)": (
        "zaya",
        {"layer_types": ["hybrid", "hybrid_sliding"] * 20, "sliding_window": 4096},
    ),
}


def exists(name: str) -> bool:
    """Whether the installed Transformers has the family of this name or variant."""
    family, _ = VARIANTS.get(name, (name, {}))
    return family in CONFIG_MAPPING


def config_of(name: str) -> tuple[Any, Any]:
    """(model class, configuration at its published size) of a family or a variant."""
    family, changes = VARIANTS.get(name, (name, {}))
    changes = {**DEFAULTS.get(family, {}), **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[family](**changes)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        model_class = model_class or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model_class, text = text_model(model_class, config)
        if text is not config:  # a multimodal wrapper
            config = type(text)(**DEFAULTS.get(text.model_type, {}))
    if hasattr(config, "is_decoder"):  # BERT's relatives, which are encoders otherwise
        config.is_decoder = True
    return model_class, config


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the local engine runs a family."""

    family: str
    model_class: str
    kind: str
    """`native`, `own cache`, `refused` or `not testable`."""
    reason: str = ""

    def row(self) -> str:
        """Its row of docs/models.md."""
        reason = self.reason.replace("|", "\\|")
        return f"| {self.family} | {self.model_class} | {self.kind} | {reason} |"


ROWS = {
    "padded": "rows padded into one batch",
    "merged": "rows of one length start together, then one batch",
    "by_length": "rows of one length together",
    "single": "one row at a time",
}
"""What docs/models.md says of `Batching`."""


def outcome(name: str) -> Outcome:
    """What the checks at load say of a family or a variant, on a small random copy of it."""
    class_name = CLASSES[VARIANTS.get(name, (name, {}))[0]]
    try:
        model_class, config = config_of(name)
        small = SmallCopy(model_class, config, "")
    except Exception as error:  # configurations and models fail in ways of their own
        return Outcome(name, class_name, "not testable", reason_of(error))
    try:
        small.check_attention()
        return Outcome(name, class_name, "native")
    except ModelError as error:
        why = _short(error)
    try:
        batching = small.check_own_cache()
    except ModelError as error:
        return Outcome(name, class_name, "refused", f"{why}; {_short(error)}")
    return Outcome(name, class_name, "own cache", f"{why}; {ROWS[batching]}")


def _short(error: ModelError) -> str:
    """An error without the model's name and the numbers that differ between machines."""
    text = re.sub(r"^the +model is an? \w+, (which|whose) ", "", str(error))
    return re.sub(r" \(by [^)]*\)", "", text)


HEADER = """# Models

How the local engine runs every causal family of Transformers {version}, found by
`python -m tests.engines.local.families > docs/models.md`: each is built small and with random
weights, with every kind of layer, and with windows, chunks and rotary switches of some dozen
tokens. What a default configuration leaves off is listed as a variant, in brackets.

- **native**: in the engine's own batch, with its cache and drafts. The logits of a short row, a
  long row and a row that grows past every length, in one batch and with prompts in chunks, are
  those of the model's own forward pass in float64.
- **own cache**: with the model's own forward pass and cache, one token at a time. The reason says
  why not natively, and then which rows share a batch with the logits that each has alone.
- **refused**: neither gives the logits of the model's own uncached forward pass.
- **not testable**: no small copy can be made or run; the error is given. Such a model is refused.

The right logits of a text are those of the model's own forward pass over all of it, without a
cache. A few families' `generate` gives others, because its cache or its positions differ from
those of that pass (RoBERTa's relatives, RecurrentGemma, Doge): they are refused. LongRoPE follows
the same rule: once a text is longer than the original context, all its keys have the long factors.
Phi-3's `generate` recomputes its cache there too; Llama's keeps keys with the short factors.

Models that Transformers has only together with an image encoder (LLaVA, Mistral 3, Qwen2.5-VL,
Qwen3-VL) are listed as "(text)": the language model alone is kept.

{counts}

| Family | Class | Runs | Why |
|---|---|---|---|
"""


def table() -> str:
    """The text of docs/models.md."""
    outcomes = [outcome(name) for name in sorted([*NAMES, *VARIANTS])]
    kinds = Counter(o.kind for o in outcomes)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) + "."
    header = HEADER.format(version=transformers.__version__, counts=counts)
    return header + "".join(f"{o.row()}\n" for o in outcomes)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stdout(sys.stderr):  # some models print
        text = table()
    sys.stdout.write(text)
