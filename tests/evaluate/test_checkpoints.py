"""Which folders below a checkpoint folder are evaluated, and what is said of the others."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.evaluate.checkpoints import find_checkpoints


def checkpoint(path):
    """A complete checkpoint: a copy of the shipped student."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(toy_pair.path("toy-student"), path)
    return path


def labels(found):
    return [each.label for each in found]


def only_skipped(tmp_path):
    """What is said of the one incomplete checkpoint beside a complete one."""
    complete, skipped = find_checkpoints(str(tmp_path), ())
    assert labels(complete) == ["whole"]
    (one,) = skipped
    return one


def test_every_complete_checkpoint_in_order(tmp_path):
    """Guards: checkpoint-100 before checkpoint-20, a run's own final model that is left out, and
    folders of an evaluation that are taken for checkpoints.
    """
    for name in ("a/checkpoint-100", "a/checkpoint-20", "b", "b/checkpoint-3", "out/merged/x"):
        if not (tmp_path / name).exists():
            checkpoint(tmp_path / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "config.json").write_text('{"dataset": "x"}')
    (tmp_path / "again").symlink_to(tmp_path / "a")
    found, skipped = find_checkpoints(str(tmp_path), (), leave_out=str(tmp_path / "out"))
    names = ["a/checkpoint-20", "a/checkpoint-100", "b", "b/checkpoint-3"]
    assert labels(found) in (names, [name.replace("a/", "again/") for name in names])
    assert skipped == []
    assert [each.model for each in find_checkpoints(str(tmp_path / "b"), ())[0]] == [
        str(tmp_path / "b"),
        str(tmp_path / "b" / "checkpoint-3"),
    ]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def with_header(header):
    def write(path):
        text = json.dumps(header).encode()
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return write


HALF_WRITTEN = {
    "model.safetensors is cut short": lambda path: cut(path / "model.safetensors"),
    "config.json is missing": lambda path: (path / "config.json").unlink(),
    "config.json is missing or cut short": lambda path: cut(path / "config.json"),
    "it has no weights": lambda path: (path / "model.safetensors").unlink(),
    "model-2.safetensors is missing": without_a_shard,
    "model.safetensors.index.json is cut short": lambda path: (
        path / "model.safetensors.index.json"
    ).write_text('{"weight_map": {"a":'),
    "index.json is cut short": lambda path: (path / "model.safetensors.index.json").write_text(
        "{}"
    ),
    "safetensors is cut short": with_header([]),
    "model.safetensors is cut": with_header({"weight": {}}),
    "their index is missing": lambda path: (path / "model.safetensors").rename(
        path / "model-00001-of-00002.safetensors"
    ),
}


@pytest.mark.parametrize("reason", HALF_WRITTEN)
def test_half_written_checkpoints(tmp_path, reason):
    """Guards: a checkpoint that training has not finished, evaluated or ending the whole call."""
    checkpoint(tmp_path / "whole")
    HALF_WRITTEN[reason](checkpoint(tmp_path / "half"))
    one = only_skipped(tmp_path)
    assert (one.label, one.is_half_written) == ("half", True)
    assert reason in one.reason
    assert one.reason.startswith("half-written: ")


def test_checkpoints_that_need_a_step(tmp_path):
    """Guards: pickled weights that are loaded, and a guess at the tokenizer."""
    checkpoint(tmp_path / "whole")
    bare = checkpoint(tmp_path / "bare")
    for file in bare.glob("token*"):
        file.unlink()
    assert "it has no tokenizer" in only_skipped(tmp_path).reason
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    one = only_skipped(tmp_path)
    assert "pickled" in one.reason
    assert not one.is_half_written


def test_no_complete_checkpoint(tmp_path):
    """Guards: an empty table with the exit code of success."""
    with pytest.raises(ModelError, match="holds no complete checkpoint"):
        find_checkpoints(str(tmp_path), ())
    (checkpoint(tmp_path / "half") / "config.json").unlink()
    with pytest.raises(ModelError, match=r"half: half-written: config\.json is missing"):
        find_checkpoints(str(tmp_path), ("toy-teacher",))
    with pytest.raises(ModelError, match="is no folder"):
        find_checkpoints(str(tmp_path / "none"), ())


def test_names_of_extra_models(tmp_path):
    """Guards: two models whose scores stand under one name."""
    first, second = checkpoint(tmp_path / "a" / "m"), checkpoint(tmp_path / "b" / "m")
    found, _ = find_checkpoints(None, (str(first), str(second), "toy-teacher", "Qwen/Qwen3-1.7B"))
    assert labels(found) == [str(first), str(second), "toy-teacher", "Qwen/Qwen3-1.7B"]
    assert labels(find_checkpoints(None, (str(first),))[0]) == ["m"]
    with pytest.raises(ConfigError, match="'m' is given twice"):
        find_checkpoints(str(tmp_path / "b"), (str(first),))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_a_lora_adapter_names_the_command_that_merges_it(tmp_path):
    """Guards: an adapter that is evaluated as its base model, and a command that does not work."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = checkpoint(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapter = tmp_path / "adapter with a space"
    peft.get_peft_model(model, lora).save_pretrained(adapter)
    one = only_skipped(tmp_path)
    assert (one.label, one.is_half_written) == (adapter.name, False)
    assert find_checkpoints(None, ("toy-student", str(adapter)))[1] == [one]
    with pytest.raises(ModelError, match="is a LoRA adapter; merge it first: python"):
        find_checkpoints(None, (str(adapter),))
    command = shlex.split(one.reason.partition("merge it first: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    found, skipped = find_checkpoints(str(tmp_path), ())
    assert labels(found) == [f"{adapter.name}-merged", "whole"]
    assert skipped == []
    # as an extra model, and where the adapter is the folder itself
    assert find_checkpoints(None, (str(adapter),)) == (found[:1], [])
    assert find_checkpoints(str(adapter), ()) == (found[:1], [])
    merged = AutoModelForCausalLM.from_pretrained(found[0].model).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name in before if not before[name].equal(merged[name])}
    assert changed
    assert all("q_proj" in name for name in changed)


def test_an_adapter_that_was_trained_again_is_merged_again(tmp_path):
    """Guards: scores of the old adapter under the name of the new one."""
    checkpoint(tmp_path / "whole")
    merged = checkpoint(tmp_path / "adapter-merged")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "whole"}')
    weights = adapter / "adapter_model.safetensors"
    shutil.copy(merged / "model.safetensors", weights)
    written = (merged / "model.safetensors").stat().st_mtime
    os.utime(weights, (written - 10, written - 10))
    assert labels(find_checkpoints(str(tmp_path), ())[0]) == ["adapter-merged", "whole"]
    os.utime(weights, (written + 10, written + 10))
    complete, skipped = find_checkpoints(str(tmp_path), ())
    assert labels(complete) == ["whole"]
    reasons = {each.label: each.reason for each in skipped}
    assert reasons["adapter-merged"].startswith("older than adapter, which it was merged from:")
    assert "merge it first: python" in reasons["adapter"]
    for name in (adapter, merged):
        with pytest.raises(ModelError, match="merge it first: python"):
            find_checkpoints(None, (str(name),))


def test_shards_of_fsdp_name_the_command_that_merges_them(tmp_path):
    """Guards: a command of accelerate that does not exist, or reads another folder."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from torch.distributed import checkpoint as distributed

    whole = checkpoint(tmp_path / "whole")
    sharded = tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0"
    sharded.parent.mkdir()
    state = {"model": {"weight": torch.arange(6.0)}}
    with pytest.warns(UserWarning, match="single process"):
        distributed.save(state, checkpoint_id=sharded)
    one = only_skipped(tmp_path)
    assert (one.label, one.is_half_written) == ("checkpoint-5", False)
    command = shlex.split(one.reason.partition("merge them first: ")[2].partition("  (then")[0])
    program = os.path.join(os.path.dirname(sys.executable), command[0])
    subprocess.run([program, *command[1:]], check=True, capture_output=True)
    merged = tmp_path / "checkpoint-5-merged"
    assert list(merged.glob("*.safetensors"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, merged)
    assert labels(find_checkpoints(str(tmp_path), ())[0]) == ["checkpoint-5-merged", "whole"]
