"""The comparison with Transformers, on a runner whose models are Transformers' own."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from optimal_sampling.engines.vllm.model_check import check_models
from optimal_sampling.errors import ModelError
from tests.engines.vllm.quantised import quantise
from tests.engines.vllm.tiny import CONTEXT, VOCAB, tiny_model


class Runner:
    """What `check_models` needs of a model runner. `run`: the models that it runs, by role."""

    device = torch.device("cpu")
    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1))

    def __init__(self, folders, run, dtype=torch.float32, quantization=None):
        self.run = {role: model.to(dtype) for role, model in run.items()}
        configs = {
            role: SimpleNamespace(
                model=folder,
                dtype=dtype,
                quantization=quantization,
                trust_remote_code=False,
                max_model_len=CONTEXT,
                hf_text_config=transformers.AutoConfig.from_pretrained(folder),
            )
            for role, folder in folders.items()
        }
        settings = SimpleNamespace(shared=False, vocab_size=VOCAB)
        self.model = SimpleNamespace(role_configs=configs, settings=settings, **self.run)

    def get_model(self):
        return self.model

    def most_tokens(self):
        return 10_000

    def role_logits(self, role, ids, piece):
        return self.run[role](ids[None]).logits[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checked")
    tiny_model(1, kind="Mistral", sliding_window=16).save_pretrained(root / "student")
    tiny_model(2).save_pretrained(root / "teacher")
    return {role: str(root / role) for role in ("student", "teacher")}


def models(folders):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return {
        role: load(folder, dtype=torch.float32, attn_implementation="eager")
        for role, folder in folders.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_pass(folders, dtype):
    """Guards: a limit below the noise of a precision; a role that is left out."""
    found = check_models(Runner(folders, models(folders), dtype), "auto")
    assert list(found) == ["teacher", "student"]
    assert all(
        "nats on 8 tokens" in note and f"on {CONTEXT} tokens" in note for note in found.values()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_window_is_refused(folders, dtype):
    """Guards: texts that end before the window, or limits that let another model pass."""
    run = models(folders)
    run["student"] = tiny_model(1, kind="Mistral", sliding_window=None)
    with pytest.raises(ModelError, match=f"another student .* of a text of {CONTEXT} tokens"):
        check_models(Runner(folders, run, dtype), "auto")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_are_compared(folders, tmp_path, scheme):
    """Guards: a layer that a checkpoint keeps whole, taken for a quantised one or left empty."""
    name = "model.layers.1.self_attn.o_proj"
    path = str(tmp_path / "quantised")
    logits = quantise(folders["teacher"], path, scheme, [name])
    both = {"teacher": path, "student": path}

    class Quantised(torch.nn.Module):
        def forward(self, ids):
            texts = [ids[0, : place + 1].tolist() for place in range(ids.shape[1])]
            return SimpleNamespace(logits=torch.tensor([[logits(text) for text in texts]]))

    run = {"teacher": Quantised(), "student": Quantised()}
    found = check_models(Runner(both, run, quantization="compressed-tensors"), "on")
    assert all(f"on {CONTEXT} tokens" in note for note in found.values())
    worst = [float(each) for each in re.findall(r"(\S+) nats on", " ".join(found.values()))]
    assert len(worst) == 4
    assert max(worst) < 1e-4
    whole = models({"student": folders["teacher"]})["student"]
    whole.get_submodule(name).weight.data.zero_()
    with pytest.raises(ModelError, match="another student"):
        check_models(
            Runner(both, {**run, "student": whole}, quantization="compressed-tensors"), "on"
        )


def test_what_is_not_compared_is_said(folders):
    """Guards: a note that claims a comparison."""
    found = check_models(Runner(folders, models(folders), quantization="awq"), "on")
    assert set(found.values()) == {"not compared: its weights are quantised (awq)"}
    run = models(folders)
    run["teacher"].parameters = lambda: [SimpleNamespace(numel=lambda: 3 * 10**9)]
    assert "2e9 parameters" in check_models(Runner(folders, run), "auto")["teacher"]
    assert "nats on" in check_models(Runner(folders, run), "on")["teacher"]
