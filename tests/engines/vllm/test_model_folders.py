"""Models that vLLM would load as others than they are."""

import json
import shutil

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.vllm.engine_arguments import engine_arguments
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.vocabulary import Vocabulary

VOCABULARY = Vocabulary(size=264, stop_ids=frozenset({0}))


def arguments(**models):
    return engine_arguments(ModelConfig(**models), MixtureConfig(), VllmOptions(), VOCABULARY, {})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_beside_a_model_is_refused(tmp_path, role):
    """Guards: the base model's tokens under the adapter's name."""
    folder = tmp_path / "model"
    shutil.copytree(toy_pair.path("toy-student"), folder)
    assert arguments(**{role: str(folder)})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match=f"adapter lies beside the {role}"):
        arguments(**{role: str(folder)})


@pytest.mark.parametrize("name", ["adapter_config.json", "model.gguf"])
def test_a_folder_that_is_no_model_is_refused(tmp_path, name):
    """Guards: another message, or none, than from the local engine."""
    (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match="it is"):
        arguments(student=str(tmp_path))


def test_an_option_without_effect_is_refused():
    """Guards: an option that is ignored."""
    with pytest.raises(ConfigError, match="allow_unused_weights"):
        arguments(allow_unused_weights=True)


def test_pickled_weights_are_refused(tmp_path):
    """Guards: `pytorch_model.bin`, whose reading runs code, loaded because there is no other."""
    folder = tmp_path / "model"
    shutil.copytree(toy_pair.path("toy-student"), folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    for role in ("student", "teacher"):
        with pytest.raises(ModelError, match="pickled"):
            arguments(**{role: str(folder)})
    assert arguments()["load_format"] == "safetensors"
