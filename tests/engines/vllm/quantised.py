"""Tiny quantised checkpoints, and Transformers models that compute the same."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

GROUP = 32


def quantise(folder, target, bits, ignore=()):
    """Save a model's quantised copy. 8: also activations, per token; 4: weights alone, in groups.

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
        integers, scales = _rounded(layer.weight.data, bits)
        layer.weight.data = (integers * scales).view(layer.weight.shape)
        del weights[f"{name}.weight"]
        weights |= _stored(name, layer.weight.shape, integers, scales, bits)
        if bits == 8:
            layer.register_forward_pre_hook(lambda _, given: (_dynamic(given[0]),))
    save_file(weights, f"{target}/model.safetensors", metadata={"format": "pt"})
    _save_config(Path(target) / "config.json", bits, ignore)

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


def _stored(name, shape, integers, scales, bits):
    integers = integers.to(torch.int8).view(shape)
    if bits == 8:
        return {f"{name}.weight": integers, f"{name}.weight_scale": scales[:, 0].contiguous()}
    return {
        f"{name}.weight_packed": _packed(integers),
        f"{name}.weight_scale": scales[..., 0].contiguous(),
        f"{name}.weight_shape": torch.tensor(shape),
    }


def _packed(integers):
    """Eight integers of 4 bits in one of 32, the first in the lowest bits."""
    nibbles = (integers.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return nibbles.sum(-1).to(torch.uint32).view(torch.int32)


def _dynamic(values):
    """Activations in 8 bits with a scale per token."""
    scales = values.abs().amax(-1, keepdim=True) / 127
    return (values / scales).round().clamp(-128, 127) * scales


def _save_config(path, bits, ignore):
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": scheme | {"strategy": "channel"}}
    if bits == 8:
        dynamic = {"strategy": "token", "dynamic": True}
        group["input_activations"] = scheme | dynamic
    else:
        group["weights"] |= {"strategy": "group", "group_size": GROUP}
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if bits == 8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": group},
    }
    path.write_text(json.dumps(config))
