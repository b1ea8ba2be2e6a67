"""Tiny quantised checkpoints, and Transformers models that compute the same."""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

GROUP = 32


def quantise(folder, target, scheme, ignore=()):
    """Save a model's quantised copy.

    `int8`: also activations, per token; `int4` and `gptq`: weights alone in 4 bits, in groups.

    `ignore`: layers that stay as they are, by their whole names. Returns the reference: (token
    ids) -> float64 logits of the next token.
    """
    shutil.copytree(folder, target)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    weights = load_file(f"{folder}/model.safetensors")
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head" or name in ignore:
            continue
        integers, scales = _rounded(layer.weight.data, 8 if scheme == "int8" else 4)
        layer.weight.data = (integers * scales).view(layer.weight.shape)
        del weights[f"{name}.weight"]
        stored = {"int8": _stored_int8, "int4": _stored_int4, "gptq": _stored_gptq}[scheme]
        found = stored(integers.view(layer.weight.shape).to(torch.int8), scales[..., 0])
        weights |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
        if scheme == "int8":
            layer.register_forward_pre_hook(lambda _, given: (_dynamic(given[0]),))
    save_file(weights, f"{target}/model.safetensors", metadata={"format": "pt"})
    config = _gptq(ignore) if scheme == "gptq" else _compressed_tensors(scheme, ignore)
    path = Path(target) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))

    def logits(ids):
        with torch.inference_mode():
            return model.eval()(torch.tensor([list(ids)])).logits[0, -1].double().numpy()

    return logits


def _rounded(weight, bits):
    """Integers, and the scale of each row or of each group of a row."""
    grouped = weight[:, None] if bits == 8 else weight.unflatten(1, (-1, GROUP))
    most = 2 ** (bits - 1) - 1
    scales = grouped.abs().amax(-1, keepdim=True) / most
    return (grouped / scales).round().clamp(-most - 1, most), scales


def _stored_int8(integers, scales):
    return {"weight": integers, "weight_scale": scales}


def _stored_int4(integers, scales):
    shape = torch.tensor(integers.shape)
    return {"weight_packed": _packed(integers), "weight_scale": scales, "weight_shape": shape}


def _stored_gptq(integers, scales):
    zeros = torch.full(scales.T.shape, -1, dtype=torch.int8)  # GPTQ stores zero points less one
    return {
        "qweight": _packed(integers).T,
        "scales": scales.T,
        "qzeros": _packed(zeros),
        "g_idx": torch.arange(integers.shape[1], dtype=torch.int32) // GROUP,
    }


def _packed(integers):
    """Eight integers of 4 bits in one of 32, the first in the lowest bits."""
    nibbles = (integers.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.uint32).view(torch.int32)


def _dynamic(values):
    """Activations in 8 bits with a scale per token."""
    scales = values.abs().amax(-1, keepdim=True) / 127
    return (values / scales).round().clamp(-128, 127) * scales


def _compressed_tensors(scheme, ignore):
    numbers = {"type": "int", "symmetric": True}
    if scheme == "int8":
        weights = {"num_bits": 8, "strategy": "channel", "dynamic": False}
        activations = {"num_bits": 8, "strategy": "token", "dynamic": True}
        group = {"weights": weights | numbers, "input_activations": activations | numbers}
    else:
        weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False}
        group = {"weights": weights | numbers}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
    }


def _gptq(ignore):
    own = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    full = {f"-:^{re.escape(name)}$": {} for name in ignore}
    return {"quant_method": "gptq", **own, "dynamic": full}
