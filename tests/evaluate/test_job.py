"""Checkpoints on benchmarks: what is scored, what is named, and what a second call does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from optimal_sampling import toy_pair
from optimal_sampling.errors import ConfigError, DatasetError, OptimalSamplingError, RunFolderError
from optimal_sampling.evaluate import EvaluateConfig, evaluate
from optimal_sampling.evaluate.job import run_folder
from optimal_sampling.records import load, load_verdicts
from optimal_sampling.toy_pair.problems import is_correct, synthetic_rows


def config_for(tmp_path, **options):
    options = {
        "extra_models": ("toy-student",),
        "benchmarks": ("synthetic",),
        "num_examples": 6,
        "max_new_tokens": 100,
        "output_dir": str(tmp_path / "out"),
        **options,
    }
    return EvaluateConfig(**options)


def checkpoint(path):
    shutil.copytree(toy_pair.path("toy-student"), path)
    return path


def records(config, label="toy-student", benchmark="synthetic"):
    found = load(run_folder(config, label, benchmark))
    return {(r["id"], r["sample_index"]): r for r in found}


def rows_of(report):
    return {(row["checkpoint"], row["benchmark"]): row for row in report.summary["rows"]}


def write_questions(path, count, answers=True):
    rows = synthetic_rows(3, count)
    lines = ({"problem": r["problem"], "answer": r["answer"] if answers else None} for r in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_scores_are_those_of_the_records(tmp_path):
    """Guards: scores of other completions than those on the disk, settings that are not stored, and
    a baseline that is not the first model.
    """
    config = config_for(tmp_path, extra_models=("toy-student", "toy-teacher"), samples=2)
    said = []
    report = evaluate(config, say=said.append)
    assert report.missing == []
    for label in config.extra_models:
        found = records(config, label)
        right = [is_correct(r["completion"], r["row"]["answer"]) for r in found.values()]
        row = rows_of(report)[label, "synthetic"]
        assert len(right) == 12
        assert row["scores"]["avg@2"]["value"] == pytest.approx(sum(right) / 12)
        tokens = sum(r["n_completion_tokens"] for r in found.values()) / 12
        assert row["mean_tokens"] == pytest.approx(tokens)
        assert {r["mode"] for r in found.values()} == {"student"}
    settings = row["settings"]
    assert (settings["temperature"], settings["thinking"], settings["hint"]) == (
        0.6,
        "default",
        "none",
    )
    assert (settings["precision"], settings["grader"]) == ("float32", "synthetic")
    assert report.summary["baseline"] == "toy-student"
    assert row["differences"]["avg@2"]["value"] == pytest.approx(
        row["scores"]["avg@2"]["value"]
        - rows_of(report)["toy-student", "synthetic"]["scores"]["avg@2"]["value"]
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == report.summary
    assert "toy-teacher" in (tmp_path / "out" / "results.md").read_text()
    assert "[2/2] toy-teacher on synthetic" in said


def test_a_second_call_makes_nothing_again(tmp_path):
    """Guards: answers that are drawn or graded again, and more samples that replace the first."""
    config = config_for(tmp_path)
    first = evaluate(config)
    before = records(config)
    again = evaluate(config)
    assert records(config) == before
    assert again.summary == first.summary
    more = replace(config, samples=2)
    report = evaluate(more)
    after = records(more)
    assert {key: after[key] for key in before} == before
    assert len(after) == 12
    assert rows_of(report)["toy-student", "synthetic"]["samples"] == 2
    fewer = evaluate(config)
    assert (
        rows_of(fewer)["toy-student", "synthetic"]["scores"]
        == (rows_of(first)["toy-student", "synthetic"]["scores"])
    )


def test_a_verdict_that_was_lost_is_made_again(tmp_path):
    """Guards: a kill between the answers and the verdicts that leaves an evaluation without end."""
    config = config_for(tmp_path)
    first = evaluate(config)
    folder = run_folder(config, "toy-student", "synthetic")
    verdicts = folder / "verdicts" / "main.jsonl"
    lines = verdicts.read_bytes().splitlines(keepends=True)
    verdicts.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert len(load_verdicts(folder)) == 3
    assert evaluate(config).summary == first.summary
    assert len(load_verdicts(folder)) == 6


def test_truncated_and_unanswered_count_as_wrong(tmp_path):
    """Guards: a score over the completions that have an answer."""
    report = evaluate(config_for(tmp_path, max_new_tokens=5))
    row = rows_of(report)["toy-student", "synthetic"]
    assert row["truncated"]["value"] == 1
    assert row["scores"]["avg@1"]["value"] == 0
    assert row["questions"] == 6


def test_a_sample_that_fails_counts_as_wrong_and_is_named(tmp_path):
    """Guards: a question that is too long for the model and silently left out of its score."""
    file = write_questions(tmp_path / "q.jsonl", 3)
    with file.open("a") as opened:
        opened.write(json.dumps({"problem": "1+" * 5000 + "1=?", "answer": "5001"}) + "\n")
    config = config_for(tmp_path, benchmarks=(), benchmark_file=(f"mine={file}",))
    report = evaluate(config)
    row = rows_of(report)["toy-student", "mine"]
    assert (row["questions"], row["no_answer"]["value"] >= 0.25) == (4, True)
    (line,) = report.missing
    assert "1 samples of toy-student on mine failed and count as wrong" in line
    assert "its context holds" in line


def test_what_cannot_be_reached_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    """Guards: one unreachable benchmark or one broken checkpoint that costs all other scores."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = write_questions(tmp_path / "q.jsonl", 3, answers=False)
    config = config_for(
        tmp_path,
        extra_models=("toy-student", str(tmp_path / "none")),
        benchmarks=("aime24", "synthetic", "blank"),
        benchmark_file=(f"aime24={tmp_path / 'gone.jsonl'}", f"blank={file}"),
    )
    report = evaluate(config)
    assert list(rows_of(report)) == [("toy-student", "synthetic")]
    lines = "\n".join(report.missing)
    assert "aime24: dataset" in lines
    assert "blank: no question" in lines
    assert f"{tmp_path / 'none'}: " in lines
    assert report.summary["missing"] == report.missing
    assert "aime24" in (tmp_path / "out" / "results.md").read_text()
    with pytest.raises(DatasetError, match="does not exist"):
        evaluate(replace(config, benchmarks=("aime24",), benchmark_file=config.benchmark_file[:1]))
    with pytest.raises(OptimalSamplingError, match="none"):
        evaluate(
            replace(
                config,
                extra_models=config.extra_models[1:],
                benchmarks=("synthetic",),
                benchmark_file=(),
            )
        )


def test_a_checkpoint_that_changed_is_noticed(tmp_path):
    """Guards: scores of two checkpoints in one row, after training wrote over the first."""
    folder = checkpoint(tmp_path / "models" / "m")
    config = config_for(tmp_path, extra_models=(), checkpoint_dir=str(folder.parent))
    evaluate(config)
    weights = load_file(folder / "model.safetensors")
    changed = {name: each * 1.01 for name, each in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFolderError, match="content hash of the student's folder"):
        evaluate(config)


def test_equal_checkpoints(tmp_path):
    """Guards: a difference between a checkpoint and its copy, or an error where there is none."""
    for name in ("checkpoint-9", "checkpoint-10"):
        checkpoint(tmp_path / "models" / name)
    config = config_for(tmp_path, extra_models=(), checkpoint_dir=str(tmp_path / "models"))
    report = evaluate(config)
    first, second = report.summary["rows"]
    assert (first["checkpoint"], second["checkpoint"]) == ("checkpoint-9", "checkpoint-10")
    assert second["differences"]["avg@1"]["value"] == 0
    assert first["scores"] == second["scores"]
    facts = report.summary["checkpoints"]
    assert facts["checkpoint-9"]["files"] == facts["checkpoint-10"]["files"] is not None


def test_half_written_checkpoints_are_skipped(tmp_path):
    """Guards: exit code 3 because training goes on, and a skipped checkpoint without a word."""
    checkpoint(tmp_path / "m" / "a")
    (checkpoint(tmp_path / "m" / "b") / "config.json").unlink()
    said = []
    config = config_for(tmp_path, extra_models=(), checkpoint_dir=str(tmp_path / "m"))
    report = evaluate(config, say=said.append)
    assert report.missing == []
    assert any(line.startswith("skipped b: half-written") for line in said)
    assert "b" in report.summary["skipped"]


def test_hints_are_shown_to_the_model(tmp_path):
    """Guards: a control in which the evaluated model sees no hint, or the right one."""
    prompts = {}
    for hint in ("none", "right", "wrong", "other"):
        config = config_for(tmp_path, hint=hint, output_dir=str(tmp_path / hint), num_examples=3)
        report = evaluate(config)
        assert report.summary["rows"][0]["settings"]["hint"] == hint
        found = sorted(records(config).values(), key=lambda r: r["row_index"])
        prompts[hint] = [(r["student_prompt"], r["row"]["solution"]) for r in found]
    for prompt, solution in prompts["none"]:
        assert solution not in prompt
    for prompt, solution in prompts["right"]:
        assert solution in prompt
    for prompt, solution in prompts["wrong"]:
        assert solution not in prompt
        assert solution.partition(r"\boxed")[0] in prompt
    for (prompt, _), (_, solution) in zip(prompts["other"], prompts["other"][1:], strict=False):
        assert solution in prompt


def test_questions_are_left_out_by_their_reference_alone(tmp_path):
    """Guards: scores of one checkpoint that change when another is added, because a question was
    left out only where some completion had an answer to compare, or only where it did not fail.
    """
    unusable = "See the proof above, which also shows that there is no other one."
    rows = [
        {"problem": "1+1=?", "answer": "2"},
        {"problem": "2+1=?", "answer": unusable},
        {"problem": "1+" * 5000 + "1=?", "answer": unusable},
        {"problem": "3+1=?", "answer": None},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"benchmarks": (), "benchmark_file": (f"mine={file}",), "max_new_tokens": 3}
    said = []
    report = evaluate(config_for(tmp_path, **options), say=said.append)
    row = rows_of(report)["toy-student", "mine"]
    assert (row["questions"], row["skipped"], row["truncated"]["value"]) == (1, 3, 1)
    assert report.missing == []
    assert any("3 questions are left out" in line and "rows 2, 3, 4 of" in line for line in said)


def test_a_benchmark_without_answers_is_named_before_it_is_asked(tmp_path):
    """Guards: hours of completions that nobody can grade."""
    file = write_questions(tmp_path / "q.jsonl", 3, answers=False)
    config = config_for(tmp_path, benchmarks=(), benchmark_file=(f"mine={file}",))
    with pytest.raises(DatasetError, match=r"no question of .*q\.jsonl has a usable"):
        evaluate(config)
    assert not run_folder(config, "toy-student", "mine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 4, "pass_at": (1, 8)}, "--pass-at 8 needs 8 samples per question"),
        ({"pass_at": (0,)}, "--pass-at 0"),
        ({"workers": 2}, "--workers 2: one process evaluates on one device"),
        ({"samples": 2, "temperature": 0.0}, "2 equal completions"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"resume": False}, "choose another --output-dir"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        ({"baseline": "toy-teachr", "extra_models": ("toy-teacher",)}, "did you mean"),
        ({"extra_models": ()}, "name what to evaluate"),
        ({"template": "Say five."}, r"--template has no \{problem\}"),
    ],
)
def test_refusals(tmp_path, options, message):
    """Guards: an evaluation of hours that ends with a table nobody asked for."""
    with pytest.raises(ConfigError, match=message):
        evaluate(config_for(tmp_path, **options))
    assert not (tmp_path / "out").exists()


def test_greedy_and_verbose(tmp_path):
    """Guards: a temperature of 0 that divides by it, and `--verbose` that shows nothing."""
    said = []
    config = config_for(tmp_path, temperature=0.0, verbose=True, tensor_parallel_size=8)
    report = evaluate(config, say=said.append)
    first = records(config)
    assert report.summary["rows"][0]["settings"]["temperature"] == 0
    assert any("--tensor-parallel-size 8 changes nothing" in line for line in said)
    shown = "\n".join(said)
    right = [r for r in first.values() if is_correct(r["completion"], r["row"]["answer"])]
    assert any(r["student_prompt"] + r["completion"] in shown for r in right)
    other = replace(config, seed=1, output_dir=str(tmp_path / "other"))
    evaluate(other)
    texts = {key: r["completion"] for key, r in first.items()}
    assert {key: r["completion"] for key, r in records(other).items()} == texts
