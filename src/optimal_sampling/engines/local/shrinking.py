"""A small random copy of a model: every kind of layer and feature, at sizes that cost nothing.

Windows, chunks and the lengths at which rotary embeddings change are small in it too, so that a
text of some dozen tokens passes all of them.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch

__all__ = ["POSITIONS", "VOCAB", "shrink_config", "small_model", "text_model"]

POSITIONS = 64
"""Longest text of a small model."""
VOCAB = 96
HEAD, HEADS, WIDTH = 16, 4, 64
MOST_LAYERS = 8
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_layers_per_stack",
)

Rule = tuple[str, int]
EXACT: tuple[Rule, ...] = (
    (r"original_max_position", 24),
    (r"max_position|^n_positions$|^n_ctx$|max_seq_len$|max_target_pos|max_source_pos", POSITIONS),
    (r"context_length|model_max_length", POSITIONS),
    (r"vocab_size", VOCAB),
)
"""First match: an integer with such a name becomes the number."""
RULES: tuple[Rule, ...] = (
    (r"_token_id$|_index$|_idx$|lang_id|^seed$", -1),  # ids of tokens: 0..VOCAB - 1 as they are
    (r"^(num_codebooks|pretraining_tp|chunk_size_feed_forward|type_vocab_size)$", -2),
    (r"original_max_position", 24),
    (r"mlp_layer|attention_every|_period$|_interval$|every_n", 2),
    (r"layer_group_size|_pattern$|layer_step$", 2),
    (r"_offset$|num_dense_layers|first_k_dense|max_window_layers|num_kv_shared_layers", 1),
    (r"num_mem_blocks|n_group$|topk_group|num_expert_group|n_groups$|ngroups$|o_groups$", 1),
    (r"^index_n_heads$", 16),  # with few heads many keys score 0, and which are taken is chance
    (r"index_topk_blocks", 2),
    (r"index_topk|indexer_budget", 12),
    (r"top_?k$|experts_per_tok|moe_k$", 2),
    (r"experts$|zero_expert_num", 4),
    (r"floor_scale|n_floor|_floor$", 10),
    (r"window|local_attention|mem_len", 9),
    (r"chunk", 16),
    (r"block_size|compress", 8),
    (r"max_distance|rel_extent", 12),
    (r"conv|kernel|d_conv|cca_time", 4),
    (r"(key|kv|query).*(heads|groups)$|kv_n_heads", HEADS // 2),
    (r"^linear_num_value_heads$", HEADS),
    (r"mamba.*heads|^mamba_n_heads$", 2 * WIDTH // HEAD),
    (r"^d_head$", HEAD),
    (r"heads?$|heads_per", HEADS),
    (r"qk_rope_head_dim|rotary_dim", HEAD // 2),
    (r"qk_head_dim", HEAD + HEAD // 2),
    (r"head_?(dim|size)|d_head$|dim_head|kv_channels|d_kv$|lora_rank|_rank$|state", HEAD),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"_size$|_dim$|^d_model$|^n_embd$|^d_inner$|width|ffn|^dff$|^dim|_hidden|^d_rel$", WIDTH),
)
"""First match: an integer with such a name becomes the number, if it is larger."""
REST = 7
"""What any other large integer becomes: it may be a length."""


def shrink_config(config: Any) -> Any:
    """The configuration of a small model with the features of a large one's.

    Raises whatever the configuration's class raises where the small sizes do not fit together.
    """
    return type(config)(**_shrink(config.to_dict()))


def text_model(model_class: Any, config: Any) -> tuple[Any, Any]:
    """(class, configuration) of the language model in a multimodal one; any other as it is."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    own = getattr(model_class, "config_class", None) is type(text)
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), model_class if own else None)
    if text is config or config.is_encoder_decoder or text_class is None:
        return model_class, config
    return text_class, text


def small_model(model_class: Any, config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model of `shrink_config`, with random weights, on the CPU."""
    small = shrink_config(config)
    small._experts_implementation = "eager"  # the fused ones have no float64
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(small).eval().to(dtype)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:  # biases are zero at first, which would hide what they do to filler
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1))
    return model.requires_grad_(False)


def _shrink(fields: dict[str, Any]) -> dict[str, Any]:
    large, fields = fields, copy.deepcopy(fields)
    kept = _layers_to_keep(fields)
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "model_type"):
        fields.pop(name, None)
    fields.pop("quantization_config", None)
    count = next((fields[name] for name in LAYERS if _is_int(fields.get(name))), 0)
    for name, value in list(fields.items()):
        fields[name] = _shrunk(name, value, kept, count)
    _fit(fields, large)
    positions = large.get("max_position_embeddings")
    for name, value in large.items():  # a window that no text fills stays one
        if "window" in name and _is_int(value) and _is_int(positions) and value >= positions:
            fields[name] = POSITIONS
    return fields


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layers_to_keep(fields: dict[str, Any]) -> list[int]:
    """The first two layers of every kind, by the lists that say something of each layer."""
    count = next((fields[name] for name in LAYERS if _is_int(fields.get(name))), 0)
    lists = [
        value
        for value in fields.values()
        if isinstance(value, (list, tuple)) and count > 4 and len(value) == count
    ]
    kinds = list(zip(*(map(str, values) for values in lists), strict=True))
    firsts = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2]
    if not lists:
        return list(range(min(count, 4)))
    return firsts[:MOST_LAYERS]


def _shrunk(name: str, value: Any, kept: list[int], count: int) -> Any:
    if name == "per_layer_config":
        return {
            kept.index(int(layer)) if layer.isdigit() else layer: _shrink(of_layer)
            for layer, of_layer in value.items()
            if not layer.isdigit() or int(layer) in kept
        }
    if isinstance(value, dict):
        if "model_type" in value:
            inner = _shrink(value)
            inner["model_type"] = value["model_type"]
            return inner
        return {key: _shrunk(key, item, kept, count) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _shrunk_list(name, list(value), kept, count)
    if name in LAYERS and _is_int(value):
        return min(value, len(kept))
    return _smaller(name, value) if _is_int(value) else value


def _shrunk_list(name: str, values: list[Any], kept: list[int], count: int) -> list[Any]:
    if count > 4 and len(values) == count:
        return [_shrunk(name, values[i], [], -1) for i in kept]
    if name == "mrope_section":
        return [HEAD // 2 - 2 * (HEAD // 8), HEAD // 8, HEAD // 8]
    if values and all(map(_is_int, values)) and ("layer" in name or "idx" in name):
        return [kept.index(v) for v in values if v in kept]
    return [_shrunk(name, value, [], -1) for value in values]


def _spread(values: list[Any], count: int) -> list[Any]:
    """`count` of the values, from the first to the last."""
    last = len(values) - 1
    return [values[i * last // max(1, count - 1)] for i in range(count)]


def _smaller(name: str, value: int) -> int:
    if name == "type_vocab_size":
        return value
    for pattern, size in EXACT:
        if re.search(pattern, name):
            return size if value > 16 or size == VOCAB else value
    for pattern, size in RULES:
        if re.search(pattern, name):
            if size == -1:
                return value if value < VOCAB else 3
            return value if size == -2 else min(value, size)
    return min(value, REST) if value > 16 else value


def _fit(fields: dict[str, Any], large: dict[str, Any]) -> None:
    """Sizes that follow from others, as they did in the large model."""
    heads = next((n for n in ("num_attention_heads", "n_head", "n_heads") if fields.get(n)), "")
    for name in ("num_key_value_heads", "num_kv_heads", "num_query_groups"):
        if heads and _is_int(fields.get(name)):
            same = large[name] == large[heads] or fields[heads] % fields[name]
            fields[name] = fields[heads] if same else fields[name]
    if "qk_rope_head_dim" in fields and large.get("head_dim") == large["qk_rope_head_dim"]:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    _fit_rotary(fields, large)
    rope, rest = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if (
        rope
        and rest
        and large.get("head_dim") == large["qk_rope_head_dim"] + large["qk_nope_head_dim"]
    ):
        fields["head_dim"] = rope + rest
    if fields.get("num_layers_per_stack"):
        fields["num_hidden_layers"] = large["num_hidden_layers"] // large["num_layers_per_stack"]
        fields["num_layers_per_stack"] = 1
    expand = fields.get("mamba_expand", fields.get("expand"))
    if not expand or not fields.get("hidden_size"):
        return
    inner = fields.get("mamba_d_ssm") or int(expand * fields["hidden_size"])
    for count, size in (
        ("mamba_n_heads", "mamba_d_head"),
        ("n_mamba_heads", "mamba_headdim"),
        ("num_heads", "head_dim"),
        ("mamba_num_heads", "mamba_head_dim"),
    ):
        if _is_int(fields.get(count)) and size in fields:
            fields[size] = inner // fields[count]
    if large.get("attention_hidden_size") == 2 * large["hidden_size"]:
        fields["attention_hidden_size"] = 2 * fields["hidden_size"]
        fields["attention_head_dim"] = 2 * fields["hidden_size"] // fields[heads]


def _fit_rotary(fields: dict[str, Any], large: dict[str, Any]) -> None:
    """As many rotary factors as pairs of rotated dimensions."""
    rope = fields.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    dim = fields.get("head_dim") or (
        fields.get("hidden_size", 0) // (fields.get("num_attention_heads") or 1)
    )
    pairs = fields.get("qk_rope_head_dim") or int(dim * share)
    for name, values in (large.get("rope_parameters") or {}).items():
        if isinstance(values, (list, tuple)) and name.endswith("_factor"):
            rope[name] = _spread(list(values), pairs // 2)
