"""What `--dry-run` says about a dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optimal_sampling.config import (
    LocalOptions,
    ModelConfig,
    PromptConfig,
    Stage,
    ToyOptions,
    VerifyConfig,
)
from optimal_sampling.engines import open_engine
from optimal_sampling.errors import ConfigError
from optimal_sampling.generate import dry_run, generate
from optimal_sampling.vocabulary import Vocabulary

ROWS = [
    {"problem": "1+1=?"},
    {"problem": None},
    {"problem": "1+1=?"},
    {"problem": "9" * 5000},
    {"problem": "8" * 4090},
    {"problem": "7" * 300},
    {"problem": None},
]


def report(config):
    return "\n".join(dry_run(config).lines())


def test_the_whole_dataset_is_reported(job):
    """Guards: a dry run that looks at three rows, after which the thousandth fails in the run."""
    text = report(job(ROWS))
    assert "=== 7 rows, 2 duplicates (generated once), 2 fail" in text
    assert "1 fail, first row 1: column 'problem' is null" in text
    assert "1 fail, first row 3: the student's prompt has 5003 tokens, and its context" in text
    assert "row 4" not in text


def test_rows_that_fail_in_the_run_are_those_of_the_dry_run(fake_engine, job):
    """Guards: rows that the dry run calls good and no prompt can be made of, and the reverse."""
    rows = [*ROWS, {"other": 1}, {"problem": "half \ud83d"}, {"problem": " "}]
    config = job(rows)
    found = dry_run(config)
    summary = generate(config)
    too_long = 1  # known to the real engines only
    assert sum(map(len, found.failures.values())) == summary.failed + too_long
    assert (found.rows, found.duplicates) == (10, summary.duplicate_rows)
    assert len(found.lengths["student"]) == summary.good - too_long


def test_lengths_of_both_models_are_counted(job):
    """Guards: a histogram of one model, or with rows left out of its bins."""
    config = replace(job(ROWS), prompt=PromptConfig(teacher_template="{problem} and more"))
    found = dry_run(config)
    assert found.lengths == {"student": [8, 303], "teacher": [17, 312]}
    assert "first row 4: the teacher's prompt has 4102 tokens" in report(config)
    table = [line.split() for line in found.lines()]
    assert ["8", "to", "15", "1", "0"] in table
    assert ["16", "to", "31", "0", "1"] in table
    assert ["256", "to", "511", "1", "1"] in table
    assert ["longest", "303", "312"] in table


def test_prompts_without_room_for_an_answer_are_counted(job):
    """Guards: completions that end early because a prompt nearly fills the context."""
    config = job(ROWS[:5])  # at most 8 tokens; the context holds 4096
    assert dry_run(config).cut_short == 1
    assert "1 prompts leave less room in a context than --max-new-tokens 8" in report(config)
    assert dry_run(job(ROWS[:4])).cut_short == 0


def test_long_prompts_are_shortened_on_the_screen(job):
    """Guards: a screen full of one prompt."""
    text = report(job([{"problem": "7" * 3000}]))
    assert "=== row 0, student: 3003 tokens" in text
    assert text.count("7") < 2500
    assert "characters not shown" in text


def test_stages_are_reported_with_their_prompts(job):
    """Guards: a hint that fails in the last stage, known after the other stages have run."""
    rows = [
        {"problem": "1+1=?", "answer": "2", "key": "2"},
        {"problem": "2+1=?", "answer": None, "key": "3"},
    ]
    config = replace(job(rows), verify=VerifyConfig(verify="synthetic", reference="key"))
    stages = (
        Stage("own", mode="student", tries=4),
        Stage("teacher", mode="teacher", hint="right"),
    )
    text = report(replace(config, stages=stages))
    own, teacher = text.split("=== stage ")[1:]
    assert own.startswith("own, where every prompt takes all its tries: the student alone, 4 tries")
    assert "=== 2 rows, 0 duplicates (generated once), 0 fail" in own
    assert "for 8 samples" in own
    assert "Reference solution" not in own
    assert "=== 2 rows, 0 duplicates (generated once), 1 fail" in teacher
    assert "Reference solution:\n2" in teacher
    assert "for 1 samples" in teacher


def test_rows_that_stages_leave_out_are_counted(job):
    """Guards: a dry run that promises completions of rows that no verdict can close, or that is
    content with a dataset that the run refuses.
    """
    rows = [{"problem": "1+1=?", "answer": "2"}, {"problem": "2+1=?", "answer": None}]
    config = replace(job(rows), verify=VerifyConfig(verify="synthetic"))
    config = replace(config, stages=(Stage("own", mode="student", tries=4), Stage("veto")))
    text = report(config)
    assert text.count("1 rows have no answer to grade with, and are left out") == 2
    assert "for 4 samples" in text
    with pytest.raises(ConfigError, match=r"no row of .* has an answer to grade with"):
        report(replace(config, data=job(rows[1:]).data))


def test_what_runs_is_said_before_any_weights_are_loaded(job):
    """Guards: attention, memory, time and mode that are known only when the run has started."""
    config = job(ROWS)
    text = report(replace(config, run=replace(config.run, mode="teacher")))
    assert "note 1: drawn from the teacher alone; the options of alpha do nothing" in text
    assert "attention: PyTorch SDPA: Flash Attention needs a CUDA GPU" in text
    assert "memory: weights 11 MiB (float32)" in text
    assert "for 3 samples if each has --max-new-tokens 8" in text
    both = report(replace(config, models=ModelConfig(student="toy-teacher")))
    assert "memory: weights 11 MiB (float32)" in both  # loaded once
    assert "memory: " not in report(replace(config, engine=ToyOptions()))
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        report(replace(config, engine=LocalOptions(attention="varlen")))


def test_notes_on_the_rows_are_those_of_the_run(fake_engine, job):
    """Guards: a note on control tokens in rows that only the run itself has."""
    config = job([*ROWS, {"problem": "a <|end|> b"}])
    notes = dry_run(config).notes
    assert "1 rows hold texts that are control tokens, such as '<|end|>'" in notes["note 1"]
    assert notes == {k: v for k, v in generate(config).notes.items() if k.startswith("note")}


def test_the_estimate_of_memory_is_that_of_the_models(job):
    """Guards: keys and values of one model or one layer only."""
    config = job([{"problem": "1+1=?"}], samples_per_prompt=4)
    config = replace(config, run=replace(config.run, max_new_tokens=4000))
    with open_engine(
        config.engine, config.models, config.mixture, Vocabulary.load("toy-student", "toy-teacher")
    ) as engine:
        runners = engine.pair.runners.values()
        expected = 4 * 4008 * sum(runner.bytes_per_token for runner in runners)
    assert f"KV caches up to {expected / 2**20:.0f} MiB for 4 requests in flight" in report(config)


def test_nothing_is_written(job):
    """Guards: a dry run that starts a folder."""
    config = job(ROWS)
    assert len(dry_run(config, shown=2).first) == 2
    assert not Path(config.run.output_dir).exists()
