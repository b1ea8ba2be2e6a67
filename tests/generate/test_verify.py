"""`generate --verify`: verdicts on completions as they are finished."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.verify.killing import kill_repeatedly

from optimal_sampling.config import VerifyConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.generate import Interrupted, folder_status, generate
from optimal_sampling.generate.progress import Progress
from optimal_sampling.records.store import Scan
from optimal_sampling.records.verdicts import graded_records

ROWS = [{"problem": f"question {number}", "answer": str(number)} for number in range(12)]


@pytest.fixture
def graded_job(job, tmp_path):
    """A config that grades with a function: the rows with an even answer are right."""
    path = tmp_path / "own.py"
    path.write_text(
        "def check(completion, reference, row):\n"
        "    assert row['answer'] == reference\n"
        "    return int(reference) % 2 == 0\n"
    )

    def build(rows=ROWS, grader=f"{path}:check", **options):
        verify = VerifyConfig(verify=grader, verify_workers=1)
        return replace(job(rows, **options), verify=verify)

    return build


def verdicts(config):
    """Verdicts by answer, of all good records; None: it has none."""
    records = graded_records(config.run.output_dir)
    return {record["row"]["answer"]: graded and graded["verdict"] for record, graded in records}


EXPECTED = {row["answer"]: "wrong" if int(row["answer"]) % 2 else "correct" for row in ROWS}


def test_each_completion_has_its_verdict(fake_engine, graded_job):
    """Guards: verdicts that are missing when the run ends, or that belong to another record."""
    config = graded_job()
    summary = generate(config)
    assert verdicts(config) == EXPECTED
    assert summary.verdicts == {"correct": 6, "wrong": 6}


class Interrupting(Progress):
    """Ctrl-C after some completions."""

    def update(self, tally):
        if tally.made.records == 5:
            raise KeyboardInterrupt


def test_what_an_interrupt_left_is_graded_later(fake_engine, graded_job):
    """Guards: completions of an interrupted call that never get a verdict, or get two."""
    config = graded_job()
    with pytest.raises(Interrupted):
        generate(config, Interrupting())
    early = verdicts(config)
    assert len(early) == 5
    assert all(word in (None, EXPECTED[answer]) for answer, word in early.items())
    generate(config)
    assert verdicts(config) == EXPECTED
    path = Path(config.run.output_dir) / "verdicts" / "main.jsonl"
    assert len(list(Scan(path))) == len(ROWS)


def test_a_finished_run_is_graded_without_the_engine(fake_engine, graded_job):
    """Guards: `--verify` on a run that was made without it, which does nothing."""
    config = graded_job()
    generate(replace(config, verify=VerifyConfig()))
    assert set(verdicts(config).values()) == {None}
    served = len(fake_engine.served)
    assert generate(config).verdicts == {"correct": 6, "wrong": 6}
    assert len(fake_engine.served) == served
    assert verdicts(config) == EXPECTED


def test_verdicts_are_in_the_status(fake_engine, graded_job, capsys):
    """Guards: a status that leaves out what was asked for."""
    config = graded_job()
    generate(config)
    Console(width=120).print(folder_status(config.run.output_dir))
    assert "6 correct (50.0%), 6 wrong (own.py:check@" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("grader", "reason"),
    [
        ("maths", "unknown grader 'maths'; did you mean 'math'"),
        ("math", "no row has a reference answer .*name its column with --reference"),
    ],
)
def test_a_grader_that_cannot_work_is_refused_before_the_run(
    fake_engine, graded_job, grader, reason
):
    """Guards: hours of generation before an error about the grader."""
    config = graded_job([{"problem": "a question"}], grader)
    with pytest.raises(ConfigError, match=reason):
        generate(config)
    assert fake_engine.served == []


def test_a_broken_file_is_refused_before_the_run(fake_engine, graded_job, tmp_path):
    """Guards: models that are loaded for a grader that cannot be."""
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\ndef check(completion, reference, row): ...\n")
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        generate(graded_job(grader=f"{path}:check"))
    assert fake_engine.served == []


def test_tokens_do_not_depend_on_grading(fake_engine, graded_job):
    """Guards: records that change with an option that only grades them."""
    graded, plain = graded_job(name="graded"), graded_job(name="plain")
    plain = replace(plain, verify=VerifyConfig())
    found = []
    for config in (graded, plain):
        generate(config)
        records = [record for record, _ in graded_records(config.run.output_dir)]
        found.append([json.dumps({**record, "seconds": 0}) for record in records])
    assert found[0] == found[1]


@pytest.mark.parametrize("most", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_generates_and_grades(tmp_path, most):
    """Guards: completions of a killed run that have no verdict in the end, or several."""
    own = tmp_path / "own.py"
    own.write_text(
        "import time\n"
        "def check(completion, reference, row):\n"
        "    time.sleep(0.01)\n"
        "    return int(reference) % 2 == 0\n"
    )
    run = tmp_path / "run"
    options = ["--engine=toy", "--num-examples=150", "--max-new-tokens=200", "--verify-workers=1"]
    command = [sys.executable, "-m", "optimal_sampling", "generate", *options]
    command += [f"--output-dir={run}", f"--verify={own}:check"]
    path = run / "verdicts" / "main.jsonl"
    rng = random.Random(7)
    kill_repeatedly(command, path, most, rng, 0.05)
    subprocess.run(command, check=True, capture_output=True)
    lines = [(line["id"], line["sample_index"], line["record"]) for line in Scan(path)]
    assert len(lines) == len(set(lines))
    pairs = list(graded_records(run))
    assert len({record["id"] for record, _ in pairs}) == len(pairs) >= 140
    for record, graded in pairs:
        if record["finish_reason"] == "length":
            assert graded["verdict"] == "truncated"
        else:
            even = int(record["row"]["answer"]) % 2 == 0
            assert graded["verdict"] == ("correct" if even else "wrong")
    assert {graded["verdict"] for _, graded in pairs} == {"correct", "wrong", "truncated"}


def test_a_grader_that_fails_is_counted(fake_engine, graded_job, tmp_path):
    """Guards: exit code 0 for a run of which no completion could be graded."""
    path = tmp_path / "raises.py"
    path.write_text("def check(completion, reference, row):\n    raise ValueError\n")
    summary = generate(graded_job(grader=f"{path}:check"))
    assert summary.verdicts == {"skipped": summary.not_graded}
    assert summary.not_graded > 0
