"""Run folders -> verdicts: what is graded, how often, and what an end at any moment leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter

import pytest

from optimal_sampling.config import VerifyOptions
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records.schema import Prompt, Sample, key_of, record_of
from optimal_sampling.records.store import RecordFile, Scan
from optimal_sampling.records.verdicts import graded_records, load_verdicts
from optimal_sampling.types import TRACE_FIELDS, Completion, Request, TokenTrace
from optimal_sampling.verify.job import verify
from tests.verify.killing import kill_repeatedly

COMMAND = [sys.executable, "-m", "optimal_sampling", "verify"]
SYNTHETIC = VerifyOptions(grader="synthetic", workers=1)


def make_record(number, text, row, **changes):
    prompt = Prompt(f"{number:032x}", number, row, f"<s>{number}", f"<t>{number}", 4, 5)
    request = Request(prompt.id, 0, 7, (1, 2), (1, 2), 16)
    trace = TokenTrace.from_rows([tuple(0.5 for _ in TRACE_FIELDS)])
    completion = Completion(request, (1,), "stop", trace, seconds=0.25)
    return record_of(Sample(prompt, completion, text, 1)) | changes


def make_run(run, records, shard="main"):
    """A run folder with these records."""
    (run / "records").mkdir(parents=True, exist_ok=True)
    config = {"compared": {"student": "toy-student", "teacher": "toy-teacher"}, "hash": ""}
    (run / "config.json").write_text(json.dumps(config))
    path = run / "records" / f"{shard}.jsonl"
    with RecordFile(path) as file:
        scan = Scan(path)
        list(scan)
        file.open(scan)
        for record in records:
            file.append(record)
    return run


def sums(count, first=0):
    """Records of which each third is wrong."""
    return [
        make_record(number, rf"\boxed{{{number + (number % 3 == 0)}}}", {"answer": str(number)})
        for number in range(first, first + count)
    ]


def lines_of(run):
    """Lines of verdicts; fails on one that is not whole."""
    found = []
    for path in sorted((run / "verdicts").glob("*.jsonl")):
        scan = Scan(path)
        found += list(scan)
        assert scan.bad_lines == scan.torn_lines == 0
    return found


def test_every_record_is_graded_once(tmp_path):
    """Guards: records graded again at each call, and shards that share a file of verdicts."""
    run = make_run(tmp_path, sums(9), "slice-0-9-1")
    make_run(tmp_path, sums(9, 9), "slice-9-18-1")
    first = verify([run], SYNTHETIC)
    assert first.counts == {"correct": 12, "wrong": 6}
    assert verify([run], SYNTHETIC).new == 0
    assert len(lines_of(run)) == 18
    for record, graded in graded_records(run):
        right = record["row_index"] % 3 != 0
        assert graded["verdict"] == ("correct" if right else "wrong")
        assert graded["reference"] == record["row"]["answer"]
    make_run(tmp_path, sums(3, 18), "slice-9-18-1")
    assert verify([run], SYNTHETIC).new == 3


def test_what_a_verdict_is_about_may_change(tmp_path):
    """Guards: verdicts by another grader or another reference that are kept."""
    row = {"answer": "1", "other": "2"}
    run = make_run(tmp_path, [make_record(0, r"\boxed{1}", row)])
    assert verify([run], SYNTHETIC).counts == {"correct": 1}
    other = VerifyOptions(grader="synthetic", reference="other", workers=1)
    assert verify([run], other).counts == {"wrong": 1}
    assert [graded["reference"] for graded in load_verdicts(run).values()] == ["2"]
    assert verify([run], VerifyOptions(grader="math", workers=1)).counts == {"correct": 1}
    again = VerifyOptions(grader="math", workers=1, regrade="all")
    assert verify([run], again).new == 1


def test_the_rules_reach_the_grader(tmp_path):
    """Guards: truncated records, reasoning and rows that are lost on the way to the process."""
    opened = {"student_prompt": "<|im_start|>assistant\n<think>\n"}
    cases = {
        "truncated": (r"\boxed{5}", {"finish_reason": "length"}),
        "no_answer": (r"so \boxed{5}", opened),
        "correct": (r"so \boxed{6}</think>\boxed{5}", opened),
        "wrong": (r"<think>\boxed{5}</think>\boxed{6}", {}),
    }
    records = [
        make_record(number, text, {"answer": "5"}, **changes)
        for number, (text, changes) in enumerate(cases.values())
    ]
    records.append(make_record(9, r"\boxed{5}", {"problem": "?"}))
    records.append(make_record(10, "", {}, error="out of memory", finish_reason="error"))
    run = make_run(tmp_path, records)
    verify([run], VerifyOptions(workers=1))
    found = [graded and graded["verdict"] for _, graded in graded_records(run)]
    assert found == [*cases, "skipped"]


def test_a_function_of_the_user(tmp_path):
    """Guards: a function that is not given the row, and verdicts of an edited file that stay."""
    path = tmp_path / "own.py"
    path.write_text("def check(completion, reference, row):\n    return row['n'] == 1\n")
    records = [make_record(number, "text", {"n": number, "answer": "x"}) for number in range(2)]
    run = make_run(tmp_path / "run", records)
    options = VerifyOptions(grader=f"{path}:check", workers=1)
    assert verify([run], options).counts == {"correct": 1, "wrong": 1}
    assert verify([run], options).new == 0
    path.write_text("def check(completion, reference, row):\n    return row['m']\n")
    tally = verify([run], options)
    assert tally.counts == {"skipped": 2}
    assert tally.failures == {"own.py:check raised KeyError: 'm' (line 2)": 2}
    assert verify([run], options).new == 0
    failed = VerifyOptions(grader=f"{path}:check", workers=1, regrade="failed")
    assert verify([run], failed).new == 2


def test_a_dataset_without_answers_is_named(tmp_path):
    """Guards: a run of which every verdict is `skipped`, called a success."""
    run = make_run(tmp_path, [make_record(0, r"\boxed{1}", {"problem": "?"})])
    with pytest.raises(ConfigError, match=r"no row has a reference answer .* --reference"):
        verify([run], VerifyOptions(workers=1))


def test_a_mistyped_column_leaves_the_verdicts(tmp_path):
    """Guards: a whole run graded as `skipped` before the error about its reference."""
    run = make_run(tmp_path, sums(3))
    verify([run], SYNTHETIC)
    before = lines_of(run)
    own = tmp_path / "own.py"
    own.write_text("def check(completion, reference, row):\n    return True\n")
    for grader in ("synthetic", f"{own}:check"):
        wrong = VerifyOptions(grader=grader, workers=1, reference="anser", regrade="all")
        with pytest.raises(ConfigError, match=r"looked for anser; did you mean 'answer'"):
            verify([run], wrong)
    assert lines_of(run) == before


@pytest.mark.parametrize("options", [{"timeout": 1e30}, {"memory_gib": 1e30}, {"timeout": 0}])
def test_limits_that_no_system_takes_are_refused(options):
    """Guards: an OverflowError of the system call behind a limit."""
    with pytest.raises(ConfigError, match="must lie in"):
        VerifyOptions(**options)


@pytest.mark.parametrize("grader", ["exact", "own"])
@pytest.mark.parametrize("name", ["empty", "missing", "no-lines"])
def test_a_folder_without_records_is_named(tmp_path, name, grader):
    """Guards: a run without a record that was verified without a word, before the first was
    written or by a mistyped path."""
    (tmp_path / "empty" / "records").mkdir(parents=True)
    (tmp_path / "no-lines" / "records").mkdir(parents=True)
    (tmp_path / "no-lines" / "records" / "main.jsonl").touch()
    (tmp_path / "grader.py").write_text("def check(completion, reference, row): return True")
    own = f"{tmp_path / 'grader.py'}:check"
    options = VerifyOptions(grader=own if grader == "own" else "exact")
    with pytest.raises(RunFolderError, match="holds no records"):
        verify([tmp_path / name], options)


SLOW = """
    import time
    def check(completion, reference, row):
        time.sleep(0.02)
        return completion.endswith("{" + reference + "}")
"""


@pytest.mark.parametrize("most", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, most):
    """Guards: a verdict that is lost or written twice, and an end that differs from a run without
    kills.
    """
    own = tmp_path / "own.py"
    own.write_text(textwrap.dedent(SLOW))
    run = make_run(tmp_path / "run", sums(400))
    command = [*COMMAND, str(run), f"--grader={own}:check", "--workers=2"]
    path = run / "verdicts" / "main.jsonl"
    rng = random.Random(5)
    known = kill_repeatedly(command, path, most, rng, 0.1)
    assert 0 < len(known) < 400
    subprocess.run(command, check=True, capture_output=True)
    lines = lines_of(run)
    assert Counter(line["id"] for line in lines).most_common(1)[0][1] == 1
    assert len(lines) == 400
    for record, graded in graded_records(run):
        assert graded["verdict"] == ("wrong" if record["row_index"] % 3 == 0 else "correct")


def test_no_process_outlives_a_killed_parent(tmp_path):
    """Guards: graders that hang on for ever after `kill -9` of the command."""
    own = tmp_path / "own.py"
    own.write_text(
        "import os, pathlib\n"
        "def check(completion, reference, row):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    while True: pass\n"
    )
    run = make_run(tmp_path / "run", sums(1))
    command = [*COMMAND, str(run), f"--grader={own}:check", "--workers=1", "--timeout=0.5"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.002)
    process.kill()
    process.wait()
    child = int((tmp_path / "pid").read_text())
    for _ in range(200):
        if not is_running(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the grader went on")


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_keeps_the_verdicts(tmp_path):
    """Guards: a traceback, waiting verdicts that are lost, and no word on how to go on."""
    own = tmp_path / "own.py"
    own.write_text(textwrap.dedent(SLOW))
    run = make_run(tmp_path / "run", sums(300))
    command = [*COMMAND, str(run), f"--grader={own}:check", "--workers=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stderr.readline()  # the first count
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "new verdicts are safe. To go on:" in said
    count = int(said.split("interrupted; ")[1].split()[0])
    assert 0 < count == len(lines_of(run)) < 300


FULL_DISK = """
    import resource, signal, sys
    from optimal_sampling.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk(tmp_path):
    """Guards: a traceback, half a line, and a grading that cannot go on when there is room."""
    run = make_run(tmp_path, sums(60))
    given = ["verify", str(run), "--grader=synthetic", "--workers=1"]
    full = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), *given], capture_output=True, text=True
    )
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "every record acknowledged before is safe. Free some space" in full.stderr
    kept = lines_of(run)
    assert len(kept) < 60
    subprocess.run([*COMMAND, *given[1:]], check=True, capture_output=True)
    lines = lines_of(run)
    assert lines[: len(kept)] == kept
    assert sorted(line["id"] for line in lines) == sorted(key_of(each)[0] for each in sums(60))


def test_only_failures_change_the_exit_code(tmp_path):
    """Guards: a grader that failed on some completions, and a command that says all is well."""
    own = tmp_path / "own.py"
    own.write_text("def check(completion, reference, row):\n    return 1 / int(reference) > 0\n")
    run = make_run(tmp_path / "run", sums(3))
    command = [*COMMAND, str(run), f"--grader={own}:check", "--workers=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "1 x not graded: own.py:check raised ZeroDivisionError" in done.stdout
    assert "2 correct (100.0%), 1 skipped" in done.stdout
