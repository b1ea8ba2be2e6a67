"""The shipped pair as GGUF files in float32, for llama.cpp.

llama.cpp's own converter knows tokenizers by a hash and refuses that of the pair.
"""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from optimal_sampling.vocabulary import resolve_model

__all__ = ["write_gguf"]


def write_gguf(name: str, path: Path) -> Path:
    """Writes the shipped model of a name (`toy-student`, `toy-teacher`)."""
    folder = Path(resolve_model(name))
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, config)
    _add_tokens(writer, AutoTokenizer.from_pretrained(folder), config)
    _add_weights(writer, load_file(folder / "model.safetensors"), config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokens(writer, tokenizer, config):
    """A token per row of the embedding; rows without one are unused tokens, as by llama.cpp."""
    by_id = {token: text for text, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    texts, kinds = [], []
    for token in range(config["vocab_size"]):
        texts.append(by_id.get(token, f"[PAD{token}]"))
        if token not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif token not in added:
            kinds.append(gguf.TokenType.NORMAL)
        elif added[token].special:
            kinds.append(gguf.TokenType.CONTROL)
        else:
            kinds.append(gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    # There are no merges, and GGUF has no empty list: this one leads to no token, so is not made.
    writer.add_token_merges([f"{by_id[0]} {by_id[0]}"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _add_weights(writer, weights, config):
    """The output matrix is not written where it is the embedding."""
    assert config["tie_word_embeddings"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, values in weights.items():
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), values.to(torch.float32).numpy()
        )
