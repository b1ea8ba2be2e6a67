"""`optimal-sampling sft` on the shipped student: what is trained, refused and resumed."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from optimal_sampling import toy_pair
from optimal_sampling.cli import main
from optimal_sampling.records.export.tokens import vocabulary_hash
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.train import SftOptions
from optimal_sampling.train.checkpoints import defect, find_checkpoints
from optimal_sampling.train.data import load_split

STUDENT = AutoTokenizer.from_pretrained(toy_pair.path("toy-student"))


def as_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["problem"]}],
        "completion": [{"role": "assistant", "content": row["solution"]}],
    }


def as_texts(row):
    return {
        "prompt": f"<|user|>{row['problem']}<|end|><|assistant|>",
        "completion": f"{row['solution']}<|end|>",
    }


def as_tokens(row):
    texts = as_texts(row)
    prompt, completion = (STUDENT.encode(texts[name]) for name in ("prompt", "completion"))
    return {
        "input_ids": [*prompt, *completion],
        "labels": [-100] * len(prompt) + completion,
    }


@pytest.fixture
def export(tmp_path):
    """Write rows as an exported folder; its path."""

    def write(rows, name="data"):
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        Dataset.from_list(list(rows)).to_parquet(folder / "data" / "train-00000.parquet")
        return folder

    return write


@pytest.fixture
def sft(tmp_path, capsys):
    """Run the command; exit code, standard output and standard error."""

    def run(data, *arguments, output="model"):
        given = ["--dataset_name", data, "--output_dir", tmp_path / output, *arguments]
        defaults = ["--learning_rate", "1e-3", "--check_prompts", "0"]
        try:
            code = main(["sft", *defaults, *map(str, given)])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, " ".join(said.err.split())

    return run


def rows(count, shape=as_messages):
    return [shape(row) for row in synthetic_rows(1, count)]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def losses(folder):
    """The loss of every update, from the newest checkpoint."""
    path = find_checkpoints(folder).last / "trainer_state.json"
    history = json.loads(path.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("shape", [as_messages, as_texts, as_tokens])
def test_loss_is_on_the_completion_and_its_end_token(export, sft, shape):
    """Guards: a prompt that is trained, and an end token that is not, in each form of the data."""
    code, _, said = sft(export(rows(4, shape)), "--max_steps", "1")
    assert code == 0
    row = next(synthetic_rows(1, 1))
    assert f"no loss | '<|user|>{row['problem']}<|end|><|assistant|>'" in said
    solution = repr(f"{row['solution']}<|end|>")
    assert f"| {solution} 1/1 updates" in said
    assert "all examples end with '<|end|>'" in said


@pytest.fixture
def model_with(tmp_path):
    """A copy of the student with another chat template; its folder."""

    def make(template):
        folder = tmp_path / "templated"
        shutil.copytree(toy_pair.path("toy-student"), folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


def test_reasoning_in_a_turn_of_qwen3_is_trained(export, sft, model_with):
    """Guards: reasoning that the template of Qwen3 drops, and a prompt that is trained."""
    path = files("trl") / "chat_templates" / "qwen3.jinja"
    template = path.read_text().replace("<|im_end|>", "<|end|>")
    row = as_messages(next(synthetic_rows(1, 1)))
    row["completion"][0]["content"] = "<think>\nso 4\n</think>\n\nIt is 4."
    model = model_with(template)
    code, _, said = sft(export([row]), "--max_steps", 1, "--model_name_or_path", model)
    assert code == 0
    assert "loss | '<think>\\nso 4\\n</think>\\n\\nIt is 4.<|end|>\\n'" in said
    assert "<|im_start|>assistant\\n' loss" in said
    assert "otherwise for training" not in said


def test_a_prompt_that_is_rendered_in_two_ways_is_named(export, sft, model_with):
    """Guards: training on another context than that of generation, without a word."""
    own = (toy_pair.path("toy-student") / "chat_template.jinja").read_text()
    opened = own + "{% if add_generation_prompt %}<think>{% endif %}"
    model = model_with(opened)
    code, _, said = sft(export(rows(3)), "--max_steps", 1, "--model_name_or_path", model)
    assert code == 0
    assert "renders 3 of the first 3 prompts otherwise for training" in said
    assert "where they go on with '<think>'" in said


def test_the_forms_train_the_same_model(export, sft, tmp_path):
    """Guards: a form whose tokens or labels differ from the others'."""
    for shape in (as_messages, as_texts, as_tokens):
        data = export(rows(8, shape), shape.__name__)
        assert sft(data, "--max_steps", "2", output=f"m-{shape.__name__}")[0] == 0
    assert same(tmp_path / "m-as_messages", tmp_path / "m-as_tokens")
    assert same(tmp_path / "m-as_messages", tmp_path / "m-as_texts")
    assert not same(tmp_path / "m-as_messages", toy_pair.path("toy-student"))


def test_packing_leaves_the_loss_alone(export, sft, tmp_path):
    """Guards: packed examples that see each other, and a loss on the first token of each."""
    data = export(rows(8, as_tokens))
    one = ["--max_steps", "1", "--per_device_train_batch_size"]
    assert sft(data, *one, "8", output="apart")[0] == 0
    code, _, _ = sft(data, *one, "1", "--packing", "--max_length", "2048", output="packed")
    assert code == 0
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "apart"), rel=1e-5)


def test_an_example_that_would_be_cut_is_refused(export, sft):
    """Guards: a silent cut, which removes the answer and the end token."""
    data = export(rows(12))
    code, _, said = sft(data, "--max_length", "60")
    assert code == 2
    assert "of 12 examples are longer than --max_length of 60 tokens and would be cut" in said
    lengths = sorted((len(row["input_ids"]) for row in rows(12, as_tokens)), reverse=True)
    assert f": {', '.join(str(length) for length in lengths[:5] if length > 60)}" in said
    code, _, said = sft(data, "--max_length", "60", "--allow_cut", "--max_steps", "1")
    assert code == 0
    assert "are cut (--allow_cut)" in said


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "TRL would train on the prompts too"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "only where it is told to"),
        ({"text": "1+1=2<|end|>"}, "does not say where its prompt ends"),
        ({"prompt": "a", "privileged_context": "b"}, "prompts without completions"),
        ({"input_ids": [1, 257], "labels": [1, 257]}, "have loss on every token"),
        ({"input_ids": [1, 257], "labels": [-100, 5]}, "are not their own tokens"),
        ({"input_ids": [1, 257], "labels": [-100, -100]}, "have no token with loss"),
        ({"input_ids": [1, 50, 51], "labels": [-100, 50, 51]}, "learn never to stop"),
        ({"prompt": "a", "completion": None}, "is null in 1 rows"),
        ({"prompt": 1, "completion": 2}, "both have to be texts, or both lists of messages"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "both have to be"),
        ({"input_ids": [1, -2, 257], "labels": [-100, -2, 257]}, "no tokens of the model"),
        ({"input_ids": [1, 99999, 257], "labels": [-100, 99999, 257]}, "no tokens of the model"),
    ],
)
def test_data_that_would_train_something_else_is_refused(export, sft, row, reason):
    """Guards: hours of training on prompts, on nothing, or towards a model that never stops."""
    code, _, said = sft(export([row]))
    assert code == 2
    assert reason in said


@pytest.mark.parametrize("shape", [as_messages, as_texts, as_tokens])
def test_empty_completions_are_counted(export, sft, shape):
    """Guards: examples that teach the model to answer nothing, without a word."""
    rows = [*synthetic_rows(0, 6)]
    for row in rows[:2]:
        row["solution"] = ""
    code, _, said = sft(export(map(shape, rows)), "--max_steps", "1")
    assert code == 0
    assert "2 of 6 examples have an empty completion" in said


def test_a_resumed_training_is_the_uninterrupted_one(export, sft, tmp_path):
    """Guards: another order of examples, optimizer state or learning rate after a kill."""
    data = export(rows(40))
    arguments = ["--num_train_epochs", "2", "--save_steps", "3", "--dataset_num_proc", "1"]
    assert sft(data, *arguments, output="whole")[0] == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(whole, killed)
    for name in ("summary.json", "model.safetensors"):
        (killed / name).unlink()
    torn = killed / "checkpoint-9" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    shutil.rmtree(killed / "checkpoint-10")
    code, _, said = sft(data, *arguments, output="killed")
    assert code == 0
    assert "checkpoint-9 is skipped: optimizer.pt is cut short" in said
    assert f"going on from {killed / 'checkpoint-6'}" in said
    assert same(whole, killed)
    code, out, said = sft(data, *arguments, output="killed")
    assert (code, "nothing to do" in said) == (0, True)
    assert "10" in out


def test_another_training_in_the_same_folder_is_refused(export, sft, tmp_path):
    """Guards: a model that was trained half with one rate or on one dataset, half with another."""
    data = export(rows(8))
    assert sft(data, "--max_steps", "2")[0] == 0
    code, _, said = sft(data, "--max_steps", "2", "--learning_rate", "5e-4")
    assert (code, "learning_rate was 0.001, is 0.0005" in said) == (2, True)
    code, _, said = sft(export(rows(9), "more"), "--max_steps", "2")
    assert (code, "examples was" in said) == (2, True)
    shutil.copytree(toy_pair.path("toy-student"), tmp_path / "other")
    code, _, said = sft(data, output="other")
    assert (code, "did not begin" in said) == (2, True)


def test_the_saved_model_is_asked_for_completions(export, sft):
    """Guards: a model that is saved in a form that does not load, or that does not stop."""
    code, out, _ = sft(export(rows(16)), "--max_steps", "1", "--check_prompts", "3")
    assert code == 0
    assert "3 of 3" in " ".join(out.split())
    assert "<|end|>" in out


def test_an_adapter_is_trained_and_goes_on(export, sft, tmp_path):
    """Guards: LoRA flags that do nothing, and an adapter that begins anew after a kill."""
    data = export(rows(16))
    arguments = ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--max_steps", "4"]
    arguments += ["--save_steps", "2", "--check_prompts", "1"]
    assert sft(data, *arguments, output="whole")[0] == 0
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert json.loads((whole / "adapter_config.json").read_text())["r"] == 4
    assert not (whole / "model.safetensors").exists()
    shutil.copytree(whole, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "checkpoint-4")
    assert sft(data, *arguments, output="killed")[0] == 0
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--learning-rat", "1"], "did you mean 'learning_rate'"),
        (["--warmup_step", "1"], "did you mean 'warmup_steps'"),
        (["--warmup_steps", "few"], "warmup_steps"),
        (["--packing"], "--packing needs --max_length"),
        (["--fsdp", "half_shard"], "unknown part 'half_shard'"),
        (["--packing", "False", "--model_name_or_path", "/no/model"], "/no/model"),
        (["--dataset_train_split", "tran"], "has no split 'tran'; it has train"),
        (["--eos_token", "<|nope|>"], "<|nope|>"),
    ],
)
def test_wrong_options_are_named(export, sft, arguments, reason):
    """Guards: a typing error that is ignored, or ends in a traceback of a library."""
    code, _, said = sft(export(rows(2)), *arguments)
    assert (code, reason in said) == (2, True), said


def test_the_source_documents_command_line_is_understood(export, sft):
    """Guards: flags of existing training scripts that are refused."""
    code, _, said = sft(
        export(rows(4)),
        *("--model_name_org_path", "toy-student", "--fsdp", "full_shard auto_wrap"),
        *("--num_train_epochs", 1, "--per_device_train_batch_size", 2),
        *("--gradient_accumulation_steps", 2, "--max_length", 2048, "--gradient_checkpointing"),
        *("--eos_token", "<|end|>", "--save_steps", 20, "--use_liger_kernel"),
        *("--report_to", "none", "--packing", "False"),
    )
    assert code == 0
    assert "--fsdp has no effect: one process" in said
    assert "--use_liger_kernel has no effect on a CPU" in said


def test_data_of_another_tokenizer_is_refused(export, sft, tmp_path):
    """Guards: ids that mean other tokens to the model that is trained on them."""
    folder = export(rows(2, as_tokens))
    facts = {"model": "toy-student", "vocabulary": vocabulary_hash(STUDENT.get_vocab())}
    (folder / "export.json").write_text(json.dumps(facts))
    model = tmp_path / "renamed"
    shutil.copytree(toy_pair.path("toy-student"), model)
    given = ["--max_steps", "1", "--model_name_or_path", model]
    assert sft(folder, *given, output="same")[0] == 0
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<think>", "<reason>"))
    code, _, said = sft(folder, *given, output="other")
    assert (code, "was exported for toy-student, whose tokens have other ids" in said) == (2, True)


def test_the_loss_on_the_validation_split_is_shown(export, sft):
    """Guards: a validation split that is never read, or is trained on."""
    folder = export(rows(6))
    Dataset.from_list(rows(8)[6:]).to_parquet(folder / "data" / "validation-00000.parquet")
    code, _, said = sft(folder, "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2)
    assert code == 0
    assert re.search(r"validation loss 0\.\d+ after 2 updates", said)
    assert "6 examples" in said
    assert "2 examples" in said


def test_what_a_checkpoint_lacks_is_said(export, sft, tmp_path):
    """Guards: training that goes on from a checkpoint which a kill or a full disk cut short."""
    assert sft(export(rows(4)), "--max_steps", "1")[0] == 0
    whole = tmp_path / "model" / "checkpoint-1"
    assert defect(whole) == ""
    for name in sorted(path.name for path in whole.iterdir()):
        copy = tmp_path / name / "checkpoint-1"
        shutil.copytree(whole, copy)
        content = (copy / name).read_bytes()
        needed = name in (
            *("model.safetensors", "optimizer.pt", "rng_state.pth"),
            *("scheduler.pt", "trainer_state.json"),
        )
        (copy / name).write_bytes(content[: len(content) // 2])
        assert bool(defect(copy)) == needed, name
        (copy / name).unlink()
        assert bool(defect(copy)) == needed, name


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
"""


def test_the_rows_are_those_of_the_folder(export):
    """Guards: rows of another folder with the same last name, or from before an overwrite, out of
    the cache of `datasets`; and a file beside data/ that is read as rows."""
    for parent, count in (("one", 3), ("two", 5), ("two", 4)):
        folder = export(rows(count), f"{parent}{count}/data")
        (folder / "README.md").write_text(CARD)
        (folder / "export.json").write_text('{"made": "by a test"}')
        assert len(load_split(SftOptions(dataset_name=str(folder)), "train")) == count
    other = Dataset.from_list(rows(2))
    other.to_parquet(folder / "data" / "train-00000.parquet")
    assert len(load_split(SftOptions(dataset_name=str(folder)), "train")) == 2
