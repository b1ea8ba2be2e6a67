"""Graders in processes: what hangs or dies costs one completion."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from optimal_sampling.errors import ConfigError
from optimal_sampling.verify import GraderPool, Task


@pytest.fixture
def grader(tmp_path):
    """A file with a grader that does what the completion says."""
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent(
            '''
            import os, signal, time

            def check(completion, reference, row):
                """Do what the completion says."""
                print("printing must not disturb the messages")
                if completion == "hang":
                    time.sleep(1000)
                if completion == "exit":
                    os._exit(7)
                if completion == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if completion == "raise":
                    raise KeyError("a column")
                if completion == "memory":
                    return len(bytearray(1 << 40)) > 0
                if completion == "number":
                    return 0.5
                if completion == "verdict":
                    return "no_answer"
                return completion == reference and row["n"] == 1
            '''
        )
    )
    return f"{path}:check"


def test_only_the_failed_completion_is_lost(grader):
    """Guards: a pool that a hanging or dying grader ends, or that drops its neighbours."""
    odd = ["hang", "exit", "kill", "raise", "memory", "number", "verdict"]
    completions = [text for word in odd for text in (word, "yes", "no")]
    with GraderPool(grader, workers=2, timeout=1.0) as pool:
        tasks = ((place, Task(text, "yes", row={"n": 1})) for place, text in enumerate(completions))
        grades = dict(pool.map(tasks))
    assert sorted(grades) == list(range(len(completions)))
    by_text = {completions[place]: grade for place, grade in grades.items()}
    for place, text in enumerate(completions):
        if text in ("yes", "no"):
            assert grades[place].verdict == ("correct" if text == "yes" else "wrong")
            assert not grades[place].failed
    assert by_text["verdict"].verdict == "no_answer"
    details = {
        "hang": "the grader took longer than 1 s",
        "exit": "the grader's process ended (exit code 7)",
        "kill": "the grader's process ended (SIGKILL)",
        "raise": "own.py:check raised KeyError: 'a column' (line 14)",
        "memory": "the grader needed more than 4.0 GiB",
    }
    for word, detail in details.items():
        assert (by_text[word].verdict, by_text[word].detail) == ("skipped", detail)
        assert by_text[word].failed
    assert "returned 0.5 instead of True, False or one of correct" in by_text["number"].detail


def test_a_function_of_other_arguments_is_named(tmp_path):
    """Guards: a line of this package, given as one of the user's file."""
    path = tmp_path / "own.py"
    path.write_text("def check(completion):\n    return True\n")
    with GraderPool(f"{path}:check", workers=1) as pool:
        [(_, grade)] = pool.map([(0, Task("a", "a"))])
    assert grade.verdict == "skipped"
    assert grade.detail.startswith("own.py:check raised TypeError: check() takes 1 positional")
    assert "(line" not in grade.detail


def test_closing_drops_what_is_pending(grader):
    """Guards: an interrupt that waits for graders that hang."""
    with GraderPool(grader, workers=1, timeout=100.0) as pool:
        for place in range(5):
            pool.submit(place, Task("hang", "yes"))
        pool.check()
        child = pool._processes[0]._process.pid
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module\ndef check(*_): ...", "No module named 'no_such_module'"),
        ("check = 3", "check of .* is no function"),
        ("import os\nos._exit(9)\ndef check(*_): ...", "could be started: exit code 9"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path, source, reason):
    """Guards: a traceback, or a run in which each completion fails, for a broken file."""
    path = tmp_path / "own.py"
    path.write_text(source)
    with GraderPool(f"{path}:check", workers=1) as pool, pytest.raises(Exception, match=reason):
        list(pool.map([(0, Task("yes", "yes"))]))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("maths", "unknown grader 'maths'; did you mean 'math'"),
        ("nowhere.py:check", "cannot read the grader's file nowhere.py"),
        ("{own}:chek", "no function 'chek'; did you mean 'check'"),
    ],
)
def test_an_unknown_grader_is_refused_before_anything_runs(grader, spec, reason):
    """Guards: an error that comes after the models were loaded."""
    with pytest.raises(ConfigError, match=reason):
        GraderPool(spec.format(own=grader.rpartition(":")[0]))


def test_math_and_synthetic_run_in_the_pool():
    """Guards: a grader that works only in the process of the tests."""
    for name in ("math", "synthetic"):
        with GraderPool(name, workers=1) as pool:
            tasks = [(text, Task(rf"\boxed{{{text}}}", "7")) for text in ("7", "8")]
            grades = {tag: grade.verdict for tag, grade in pool.map(tasks)}
        assert grades == {"7": "correct", "8": "wrong"}
