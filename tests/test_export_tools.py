"""The command `export` on a run of the shipped pair: real tokenizer, real scores."""

from __future__ import annotations

import json

import pytest
from pyarrow import parquet

from optimal_sampling.cli import main
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.scoring import score
from optimal_sampling.records import load
from optimal_sampling.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = "--dataset synthetic --num-examples 6 --max-new-tokens 120 --dtype float32"
    arguments = ["generate", *options.split(), "--device", "cpu", "--output-dir", str(folder)]
    assert main(arguments) == 0
    return folder


def test_scores_are_those_of_the_run(run):
    """Guards: log-probabilities of the tokens before, of the prompt, or without the end token."""
    vocabulary = Vocabulary.load("toy-student", "toy-teacher")
    records = list(load(run))
    pairs = [
        (
            vocabulary.student_tokenizer(each["student_prompt"], add_special_tokens=False)[
                "input_ids"
            ],
            each["completion_ids"],
        )
        for each in records
    ]
    scores = score(ModelConfig(student="toy-student", device="cpu", dtype="float32"), pairs)
    for record, found in zip(records, scores, strict=True):
        drawn = record["log_p_student"] * record["n_completion_tokens"]
        assert found == pytest.approx(drawn, rel=1e-3, abs=1e-3)


def test_the_command(run, tmp_path, capsys):
    """Guards: a command that fails between its parts, or prints another thing than the card."""
    benchmark = tmp_path / "benchmark.jsonl"
    first = next(iter(load(run)))["row"]["problem"]
    benchmark.write_text(json.dumps({"question": first}) + "\n")
    out = tmp_path / "out"
    command = ["export", str(run), "--output-dir", str(out), "--format", "tokens"]
    command += ["--score-rows", "3", "--decontaminate", str(benchmark)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "trl sft --model_name_or_path" in printed
    document = json.loads((out / "export.json").read_text())
    ended = [each["row"]["problem"] for each in load(run) if each["finish_reason"] == "stop"]
    assert first in ended
    assert document["rows"] == {"train": len(ended) - 1}
    exported = document["sections"]["What was exported"]
    measured = exported["student NLL, nats/token, before training"]
    assert f"{document['student_nll']:.4f} (measured on 3 rows)" == measured
    [file] = (out / "data").glob("*.parquet")
    rows = parquet.read_table(file).to_pylist()
    by_id = {each["id"]: each for each in load(run)}
    for row in rows:
        ids = by_id[row["id"]]["completion_ids"]
        assert row["input_ids"][-len(ids) :] == ids
        assert row["labels"][-len(ids) :] == ids
        assert {*row["labels"][: -len(ids)]} == {-100}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the run folders"),
        (["nowhere"], "holds no records"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    """Guards: a traceback for a mistake in the command line."""
    assert main(["export", *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_benchmarks_by_name(run, tmp_path):
    """Guards: a name that is taken for the training problems, all of which would then overlap."""
    out = tmp_path / "out"
    command = ["export", str(run), "--output-dir", str(out), "--decontaminate", "synthetic"]
    assert main(command) == 0
    sections = json.loads((out / "export.json").read_text())["sections"]
    checked = sections["Tokens and checks"]
    assert checked["questions of synthetic, checked for overlap"] == "500"
    problems = {each["row"]["problem"] for each in load(run)}
    assert int(sections["Left out"]["overlapping with synthetic"]) < len(problems)


def test_an_unknown_benchmark(run, tmp_path, capsys):
    """Guards: a mistyped name that decontaminates nothing."""
    command = ["export", str(run), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--decontaminate", "./math5000.jsonl"]) == 2
    assert "math5000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
