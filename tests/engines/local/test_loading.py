"""Models that cannot be loaded get one clear message."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines import open_engine
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local.loading import load_model, prepare_pair
from optimal_sampling.engines.local.shrinking import small_model
from optimal_sampling.engines.local.slots.slot_runner import SlotRunner
from optimal_sampling.errors import ConfigError, EngineError, MissingDependencyError, ModelError
from optimal_sampling.toy_pair import path
from optimal_sampling.types import Request
from optimal_sampling.vocabulary import Vocabulary
from tests.engines.local import families


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(path("toy-student"), folder)
    return folder


def test_the_shipped_models_load_in_the_precision_that_was_asked_for():
    """Guards: bfloat16 weights taken for a reason to compute in bfloat16."""
    model = load_model(str(path("toy-student")), ModelConfig(device="cpu"), "student")
    assert model.dtype == torch.float32
    assert not model.training
    half = load_model(
        str(path("toy-student")), ModelConfig(device="cpu", dtype="bfloat16"), "student"
    )
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged_weights_name_the_model(copy, damage):
    """Guards: a traceback from within a file format; random weights in place of missing ones."""
    weights = copy / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000] if damage == "truncated" else b"")
    with pytest.raises(ModelError, match="the student model"):
        load_model(str(copy), ModelConfig(device="cpu"), "student")


def test_weights_that_lack_a_layer_are_refused(copy):
    """Guards: random numbers in place of missing weights, with no more than a warning."""
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj"):
        load_model(str(copy), ModelConfig(device="cpu"), "student")


def test_pickled_weights_are_not_loaded(copy):
    """Guards: code that runs when weights are loaded."""
    (copy / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_model(str(copy), ModelConfig(device="cpu"), "student")


def test_an_unknown_architecture_is_no_traceback(copy):
    """Guards: a KeyError for a model type that Transformers does not know."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"model_type": "nonsense", "architectures": ["Nonsense"]})
    )
    with pytest.raises(ModelError, match="student"):
        load_model(str(copy), ModelConfig(device="cpu"), "student")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_asked_for_and_absent():
    """Guards: a silent fall back to the CPU."""
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", ["tpu", "cpu:x", "", "meta"])
def test_devices_that_are_none(name):
    """Guards: PyTorch's own message for a misspelt device."""
    with pytest.raises(ConfigError, match="device"):
        resolve_device(name)


def test_auto_precision():
    """Guards: bfloat16 on a CPU, where equality of tokens is promised in float32."""
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_four_bits_without_bitsandbytes(monkeypatch):
    """Guards: an ImportError from within Transformers."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        load_model(
            str(path("toy-student")), ModelConfig(device="cpu", load_in_4bit=True), "student"
        )


def test_the_same_model_twice_is_loaded_once(copy):
    """Guards: two copies of one folder's weights, also where it is spelled in two ways."""
    models = ModelConfig(teacher=str(copy), student=str(copy.parent / "." / "model"), device="cpu")
    vocabulary = Vocabulary.load(models.student, models.teacher)
    with open_engine(LocalOptions(), models, MixtureConfig(), vocabulary) as engine:
        assert engine.pair.runners["student"] is engine.pair.runners["teacher"]
        assert "loaded once" in engine.notes()["weights"]
        request = Request("a", 0, 0, (5, 6), (7, 8, 9), 4)
        [done] = engine.generate([request])
        assert done.error == ""
    with pytest.raises(EngineError, match="closed"):
        next(engine.generate([request]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families.IMAGES_AND_TEXT)
def test_models_of_images_and_text_load_their_language_model(family, tmp_path):
    """Guards: models refused for an image encoder that no prompt needs; one kept in memory."""
    config = CONFIG_MAPPING[family](**families.IMAGES_AND_TEXT[family])
    whole = small_model(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config, torch.float32)
    whole.save_pretrained(tmp_path)
    ids = torch.arange(5, 30)[None]
    expected = whole(input_ids=ids).logits
    model = load_model(str(tmp_path), ModelConfig(device="cpu"), "teacher")
    assert [name for name, _ in model.base_model.named_children()] == ["language_model"]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    runners, _ = prepare_pair({"teacher": model}, 90, LocalOptions())
    assert isinstance(runners["teacher"], SlotRunner)
