"""What TRL's trainer makes of the exported folder: loss on completions only, one end token."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.records.export.conftest import END, Draw, Runs, build_tokenizer

from optimal_sampling.records.export import export

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

THOUGHT = "<think>\nthe sum: 1+12\n</think>\n\nthe answer is 13"


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Qwen2ForCausalLM(config)


def prepared(folder, model, tokenizer, tmp_path, **settings):
    """The rows that SFTTrainer trains on."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    dataset = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trained"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=512,
        shuffle_dataset=False,
        **settings,
    )
    return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)


def with_loss(row):
    return [label for label in row["labels"] if label != -100]


FORMATS = [
    pytest.param({"format": "text"}, "", id="text"),
    pytest.param({"format": "text", "messages": True}, "\n", id="messages"),
    pytest.param({"format": "tokens"}, "", id="tokens"),
]


@pytest.mark.parametrize(("options", "after"), FORMATS)
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_loss_falls_on_the_completion_only(tmp_path, runs, rows, model, options, after, thinking):
    """Guards: a student that is trained on its prompts, without an end token, or on two of them."""
    text = THOUGHT if thinking == "on" else "the answer is 13"
    draws = [Draw(number, text) for number in range(3)]
    folder = runs.make(draws, rows, thinking=thinking)
    report = export(runs.options(folder, **options), runs.tools)
    trainer = prepared(report.folder, model, runs.tokenizer, tmp_path)
    assert len(trainer.train_dataset) == 3
    for number, row in enumerate(trainer.train_dataset):
        decoded = runs.tokenizer.decode(with_loss(row))
        assert decoded == text + END + after
        whole = runs.tokenizer.decode(row["input_ids"])
        assert whole.endswith(f"<|im_start|>assistant\n{closed(thinking)}{decoded}")
        assert whole.count(f"{number}+12=?") == 1
    assert lines(report)["rows whose text has other ids than were drawn"].startswith("0.0%") or (
        options["format"] == "tokens"
    )


def closed(thinking):
    return "<think>\n\n</think>\n\n" if thinking == "off" else ""


def lines(report):
    found = {name: value for _, section in report.sections for name, value in section}
    return {"rows whose text has other ids than were drawn": "", **found}


def test_ids_are_those_that_were_drawn(tmp_path, runs, rows, model):
    """Guards: `12` that was drawn as `1`, `2` and is trained as one token, also when packed."""
    folder = runs.make([Draw(0, "=12", pieces=("=", "1", "2"))], rows)
    report = export(runs.options(folder, format="tokens"), runs.tools)
    trainer = prepared(report.folder, model, runs.tokenizer, tmp_path, packing=True)
    [row] = trainer.train_dataset
    tokens = runs.tokenizer.convert_ids_to_tokens(with_loss(row))
    assert tokens == ["=", "1", "2", END]


def test_texts_that_read_as_other_ids_are_counted(runs, rows):
    """Guards: drift between the ids that were drawn and those that are trained, unseen."""
    draws = [Draw(0, "=12", pieces=("=", "1", "2")), Draw(1, "=12"), Draw(2, "=13")]
    folder = runs.make(draws, rows)
    for output, options in (("text", {}), ("messages", {"messages": True})):
        target = str(runs.root / output)
        report = export(runs.options(folder, output_dir=target, **options), runs.tools)
        changed = lines(report)["rows whose text has other ids than were drawn"]
        assert changed == ("33.3% (1 of 3)" if output == "text" else "100.0% (3 of 3)"), changed


def test_another_end_token_is_named(tmp_path, runs, rows, model):
    """Guards: a base model that learns `<|endoftext|>` where its texts ended with `<|im_end|>`."""
    tokenizer = build_tokenizer(eos="<|endoftext|>")
    runs = Runs(tmp_path / "base", tokenizer)
    folder = runs.make([Draw(0, "it is 12")], rows)
    report = export(runs.options(folder), runs.tools)
    assert "--eos_token '<|im_end|>'" in report.command
    tokenizer.eos_token = END  # what that option does
    trainer = prepared(report.folder, model, tokenizer, tmp_path)
    assert tokenizer.decode(with_loss(trainer.train_dataset[0])) == "it is 12<|im_end|>"


@pytest.mark.parametrize("options", [{}, {"format": "tokens"}], ids=["text", "tokens"])
def test_one_bos(tmp_path, rows, model, options):
    """Guards: the BOS of a chat template and that of the tokenizer, both in one row."""
    runs = Runs(tmp_path, build_tokenizer(bos=True))
    folder = runs.make([Draw(0, "it is 12")], rows)
    report = export(runs.options(folder, **options), runs.tools)
    trainer = prepared(report.folder, model, runs.tokenizer, tmp_path)
    [row] = trainer.train_dataset
    assert runs.tokenizer.decode(row["input_ids"]).count("<s>") == 1
    assert runs.tokenizer.decode(with_loss(row)) == "it is 12<|im_end|>"


@pytest.mark.parametrize("options", [{}, {"format": "tokens"}, {"messages": True}])
def test_reference_solutions(tmp_path, runs, rows, model, options):
    """Guards: a warm start on completions that were drawn, or on solutions without an end."""
    draws = [Draw(number, "wrong", sample) for number in range(2) for sample in range(2)]
    folder = runs.make(draws, rows, thinking="off")
    report = export(runs.options(folder, kind="warmstart", **options), runs.tools)
    trainer = prepared(report.folder, model, runs.tokenizer, tmp_path)
    texts = [runs.tokenizer.decode(with_loss(row)).strip() for row in trainer.train_dataset]
    assert texts == ["it is 12<|im_end|>", "it is 13<|im_end|>"]


def test_prompts_for_distillation(tmp_path, runs, rows):
    """Guards: a hint that the student sees, or that the teacher's trainer does not find."""
    from datasets import load_dataset

    draws = [Draw(number, "x", sample) for number in range(2) for sample in range(2)]
    folder = runs.make(draws, rows, teacher_template="{problem}\n\nSolution: {solution}")
    report = export(runs.options(folder, format="prompts"), runs.tools)
    dataset = load_dataset(str(report.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(dataset.column_names) == {"prompt", "privileged_context", "id"}
    assert dataset["prompt"][1] == [{"role": "user", "content": "1+12=?"}]
    assert list(dataset["privileged_context"]) == ["Solution: it is 12", "Solution: it is 13"]
    assert report.command is None


def test_training_runs(tmp_path, runs, rows, model):
    """Guards: a folder that loads and cannot be trained on."""
    folder = runs.make([Draw(number, "it is 12") for number in range(4)], rows)
    report = export(runs.options(folder), runs.tools)
    trainer = prepared(report.folder, model, runs.tokenizer, tmp_path, max_steps=1)
    assert trainer.train().training_loss > 0
    assert Path(report.folder, "README.md").exists()


@pytest.mark.slow
def test_the_command_as_printed(tmp_path):
    """Guards: a command line in the card that TRL refuses. (`--use_cpu` is for this machine.)"""
    export_command = "export run --output-dir sft --max-per-prompt 1"
    generate = "generate --dataset synthetic --num-examples 8 --max-new-tokens 60 --output-dir run"
    for command in (generate, export_command):
        words = [sys.executable, "-m", "optimal_sampling", *command.split()]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "sft" / "README.md").read_text()
    [line] = [each.strip() for each in text.splitlines() if each.strip().startswith("trl sft")]
    words = [str(Path(sys.executable).with_name("trl")), *shlex.split(line)[1:], "--use_cpu"]
    words += ["--bf16", "False", "--report_to", "none", "--max_steps", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "checkpoints" / "sft").glob("*.safetensors"))
