"""Folders that are no model, or not all of one: what they are, and what to do."""

from pathlib import Path

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.errors import ModelError
from optimal_sampling.vocabulary import resolve_model
from optimal_sampling.vocabulary.model_folder import check_weight_files
from optimal_sampling.vocabulary.tokens import load_tokens

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060522240\n"

OTHER_KINDS = {
    "an adapter": (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
    "weights for llama.cpp": (["model-Q4_K_M.gguf"], "GGUF"),
    "a diffusers pipeline": (["model_index.json", "unet/config.json"], "diffusers"),
    "the authors' own form": (["params.json", "consolidated.00.pth"], "Transformers saves it"),
    "the hub's cache": (["refs/main", "snapshots/0ab1/config.json"], "snapshots/0ab1"),
    "a trainer": (
        ["checkpoint-500/config.json", "checkpoint-1000/config.json", "runs/events"],
        "checkpoint-1000",
    ),
    "a trainer of adapters": (["checkpoint-20/adapter_config.json"], "merge_and_unload"),
    "a folder of models": (["a/config.json", "b/config.json"], "/b"),
    "a trainer's state": (["trainer_state.json", "optimizer.pt"], "save the model itself"),
    "DeepSpeed": (["zero_to_fp32.py", "global_step9/x.pt"], r"run its zero_to_fp32\.py"),
    "a distributed checkpoint": (["__0_0.distcp", ".metadata"], "convert it"),
    "nothing known": (["readme.md"], r"there is no .*config\.json"),
}


def write(folder, *names, text="{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path, kind):
    """Guards: "no config.json" for a folder that is something well known."""
    files, said = OTHER_KINDS[kind]
    write(tmp_path, *files)
    with pytest.raises(ModelError, match=said) as error:
        resolve_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "tokenizer.json", "config.json", "model-00001-of-00004.safetensors"],
)
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    """Guards: a parser's message about a file that was never downloaded."""
    write(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
    write(tmp_path, name, text=POINTER)
    with pytest.raises(ModelError, match="git lfs pull") as error:
        resolve_model(str(tmp_path))
    assert name in str(error.value)


def test_a_link_to_a_file_that_is_gone_is_named(tmp_path):
    """Guards: the same for a download that was broken off, or for git-annex."""
    write(tmp_path, "config.json")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "91ab")
    with pytest.raises(ModelError, match="not there") as error:
        resolve_model(str(tmp_path))
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("model-Q8_0.gguf", "GGUF"),
        ("tokenizer.json", "no weights"),
    ],
)
def test_weights_in_another_form_are_named(tmp_path, name, said):
    """Guards: "no file named model.safetensors" beside weights of another form."""
    write(tmp_path, "config.json", name)
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ModelError, match=said) as error:
        check_weight_files("the teacher model", tmp_path)
    assert "the teacher model" in str(error.value)
    write(tmp_path, "model.safetensors.index.json")
    check_weight_files("the teacher model", tmp_path)


def test_shipped_models_and_hub_ids_pass():
    """Guards: a check that refuses whole models."""
    for name in toy_pair.NAMES:
        assert resolve_model(name) == str(toy_pair.path(name))
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("name", ["toy-studnt", "toy_teacher"])
def test_a_name_near_a_shipped_model_is_told(name):
    """Guards: the hub asked for a mistyped name, and its message about a repository."""
    with pytest.raises(ModelError, match="did you mean 'toy-"):
        resolve_model(name)


def test_a_folder_named_tilde_is_no_home(tmp_path, monkeypatch):
    """Guards: `./~/m` read from the home folder, when resolved once or twice."""
    write(tmp_path / "~" / "m", "config.json")
    monkeypatch.chdir(tmp_path)
    found = resolve_model("./~/m")
    assert found == resolve_model(found) == str(tmp_path / "~" / "m")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", '{"model_type": "qwen3", "eos_token_id": "x"}', "eos_token_id': .*TypeErr"),
        ("tokenizer.json", "{}", "KeyError: '"),
    ],
)
def test_a_broken_file_says_the_whole_reason(model_folder, file, text, said):
    """Guards: a first line that ends in a colon, or a KeyError's key alone."""
    folder = Path(model_folder("m", {"eos_token_id": 258}))
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=said):
        load_tokens(str(folder))
