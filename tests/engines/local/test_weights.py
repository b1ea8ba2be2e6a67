"""Folders whose weights are not those of the model in `config.json`, and adapters beside it."""

import json
import sys

import pytest
import safetensors.torch
import torch

from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.loading import load_model
from optimal_sampling.errors import MissingDependencyError, ModelError
from tests.engines.local.conftest import tiny_model
from tests.engines.local.test_architectures import REFUSED, RUN, model_of

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}


@pytest.fixture
def saved(tmp_path):
    """(kind, changes of the config afterwards, changes of the weights) -> the folder."""

    def save(kind="Llama", edit=None, config=None, **changes):
        tiny_model(1, kind=kind, **changes).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = safetensors.torch.load_file(file)
        if edit:
            edit(weights)
        safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | (config or {})))
        return str(tmp_path)

    return save


def load(folder, **options):
    return load_model(folder, ModelConfig(device="cpu", **options), "student")


def add(name, *shape):
    return lambda weights: weights.update({name: torch.ones(*shape)})


UNUSED = {
    "a bias": ({"edit": add("model.layers.0.self_attn.q_proj.bias", 32)}, "q_proj.bias"),
    "a bias of the head": ({"edit": add("lm_head.bias", 12)}, "lm_head.bias"),
    "a whole layer": ({"layers": 3, "config": {"num_hidden_layers": 2}}, "model.layers.2"),
    "a norm": ({"edit": add("model.layers.1.self_attn.q_norm.weight", 8)}, "q_norm.weight"),
    "an expert": ({"edit": add("model.layers.1.mlp.experts.0.up_proj.weight", 4, 4)}, "experts"),
    "a value head": ({"edit": add("v_head.summary.weight", 1, 32)}, "v_head"),
    "a bias of GPT-2": ({"kind": "GPT2", **GPT2, "edit": add("lm_head.bias", 12)}, "lm_head.bias"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_unused_weights_are_refused_by_name(saved, case):
    """Guards: a config that leaves out a part of the model that was trained, without a word."""
    changes, name = UNUSED[case]
    folder = saved(**changes)
    with pytest.raises(ModelError, match="--allow-unused-weights") as error:
        load(folder)
    assert name in str(error.value)
    assert "the student model" in str(error.value)
    assert load(folder, allow_unused_weights=True).config.num_hidden_layers == 2


MISSING = {
    "a bias": ("Qwen2", ["model.layers.0.self_attn.q_proj.bias"]),
    "a whole layer": ("Llama", ["model.layers.1."]),
    "the embeddings": ("Llama", ["model.embed_tokens.weight"]),
    "the head": ("Llama", ["lm_head.weight"]),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_weights_are_refused_by_name(saved, case):
    """Guards: random numbers in their place; an option for unused weights that allows them too."""
    kind, names = MISSING[case]

    def remove(weights):
        for key in [key for key in weights if any(name in key for name in names)]:
            del weights[key]

    folder = saved(kind, remove)
    with pytest.raises(ModelError, match="lack, or have in another shape") as error:
        load(folder, allow_unused_weights=True)
    assert names[0] in str(error.value)


BESIDE = {
    "computed frequencies": {"edit": add("model.layers.0.self_attn.rotary_emb.inv_freq", 4)},
    "masks of GPT-2": {"kind": "GPT2", **GPT2, "edit": add("transformer.h.0.attn.masked_bias", 1)},
    "a head for drafts": {"edit": add("mtp.layers.0.mlp.up_proj.weight", 4, 4)},
    "a numbered head for drafts": {
        "edit": add("model.layers.2.eh_proj.weight", 4, 4),
        "config": {"num_nextn_predict_layers": 1},
    },
    "an encoder of images": {"edit": add("vision_tower.blocks.0.weight", 4, 4)},
}


@pytest.mark.parametrize("case", BESIDE)
def test_parts_that_no_text_meets_are_no_error(saved, case):
    """Guards: a refusal of published models, whose files hold more than the text model."""
    assert load(saved(**BESIDE[case])).config.vocab_size == 12


def test_a_head_of_its_own_is_kept_where_the_config_calls_it_tied(saved):
    """Guards: the embeddings in place of a head that was trained apart from them."""
    head = torch.full((12, 32), 0.25)
    folder = saved(edit=lambda w: w.update({"lm_head.weight": head}), tie_word_embeddings=True)
    assert torch.equal(load(folder).lm_head.weight, head)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3", "sdpa", "nonsense"])
def test_the_attention_that_a_config_names_need_not_be_there(saved, key, value):
    """Guards: a model refused for a package that is never called."""
    model = load(saved(config={key: value}))
    assert model.config._attn_implementation == "sdpa", "the default of Transformers"


def write_adapter(folder, rank=2):
    """Files of a LoRA adapter of the query projections, with given numbers."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 3 * rank,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "none/such",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(7)
    parts = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        parts[f"{name}.lora_A.weight"] = torch.randn(rank, 32)
        parts[f"{name}.lora_B.weight"] = torch.randn(32, rank)
    safetensors.torch.save_file(parts, folder / "adapter_model.safetensors")
    return parts


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    """Guards: an adapter of a deeper model, of which the layers that fit are applied."""
    pytest.importorskip("peft")
    folder = saved()
    parts = write_adapter(tmp_path)
    for key, part in list(parts.items()):
        parts[key.replace("layers.1", "layers.7")] = part.clone()
    safetensors.torch.save_file(parts, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter of the student.*layers\.7"):
        load(folder)


def test_a_model_beside_an_adapter_is_checked_too(saved, tmp_path):
    """Guards: weights that the model lacks, unnoticed as only the adapter's are looked at."""
    pytest.importorskip("peft")
    folder = saved(edit=lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"))
    write_adapter(tmp_path)
    with pytest.raises(ModelError, match="up_proj"):
        load(folder)


def test_an_adapter_without_peft_stops_the_run(saved, tmp_path, monkeypatch):
    """Guards: the base model's tokens under the adapter's name."""
    folder = saved()
    write_adapter(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="adapter lies beside the student") as error:
        load(folder)
    assert "pip install peft" in str(error.value)


def test_an_adapter_with_peft_is_applied(saved, tmp_path):
    """Guards: an adapter that is loaded and not used, or used with another scale."""
    pytest.importorskip("peft")
    folder = saved()
    base = load(folder).model.layers[1].self_attn.q_proj.weight.clone()
    parts = write_adapter(tmp_path)
    merged = load(folder).model.layers[1].self_attn.q_proj
    assert type(merged) is torch.nn.Linear
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    change = 3 * parts[f"{name}.lora_B.weight"] @ parts[f"{name}.lora_A.weight"]
    torch.testing.assert_close(merged.weight, base + change)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*RUN, *REFUSED])
def test_what_a_family_saves_is_all_used(name, tmp_path):
    """Guards: a refusal of a whole model, for names that a family changes as it is loaded."""
    changes = RUN[name] if name in RUN else REFUSED[name][0]
    model = model_of(name, changes)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded) is type(model)
    for key, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight), key
