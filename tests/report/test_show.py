"""`show`: which sample is meant, and what is said of it."""

from __future__ import annotations

import pytest
from rich.console import Console

from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.report import ShowOptions
from optimal_sampling.report.show import show


@pytest.fixture
def said():
    def run(*target, **options):
        console = Console(width=160)
        with console.capture() as capture:
            console.print(show(ShowOptions(target=tuple(map(str, target)), **options)))
        return capture.get()

    return run


@pytest.fixture
def run(make_run, draw):
    draws = [draw(f"{row}+{k}", "correct", row=row, sample=k) for row in (3, 14) for k in (0, 1)]
    return make_run("run", [*draws, draw(error="no [/room] left", row=20)])


@pytest.mark.parametrize(
    ("wanted", "text"),
    [((), "3+0"), (("14",), "14+0"), (("14:1",), "14+1"), ((f"{14:032x}",), "14+0")],
)
def test_the_sample_that_is_meant(said, run, wanted, text):
    """Guards: an id of digits taken for a row, and the first sample for the second."""
    assert f"\n{text} <|end|>" in said(run, *wanted)


def test_what_is_said_of_it(said, run):
    """Guards: a text without verdict, prompts and numbers."""
    output = said(run, "3", tokens=2)
    for part in ("row 3, sample 0", "correct (answer 2, reference 2)", "ask 3", "teach", "<|end|>"):
        assert part in output
    assert "the 2 of 3 tokens at which the models differ most" in output
    assert output.count("0.500") >= 2  # KL to the student, of both


def test_top_tokens_are_beside(said, make_run, draw):
    """Guards: the teacher's tokens under the student's name."""
    output = said(make_run("top", [draw("ab", top=2)]))
    line = next(line for line in output.splitlines() if line.split()[:2] == ["0", "a"])
    assert line.split()[-12:] == ["(", "60", "a", "30", "a", "80", "(", "10", "a", "90", "(", "5"]


def test_a_failed_sample(said, run):
    """Guards: markup in an error that ends the command."""
    assert "failed: no [/room] left" in said(run, "20")


def test_colours_that_are_not_there(said, run):
    """Guards: alpha shown under the name of what was asked for."""
    with pytest.raises(ConfigError, match=r"no acceptance per token; it has: alpha"):
        said(run, colour_by="acceptance")
    assert "the models differ" in said(run, colour_by="kl_student", tokens=1)


def test_what_cannot_be_shown(said, run, tmp_path):
    """Guards: a traceback, or another sample, for one that is not there."""
    with pytest.raises(ConfigError, match="no sample '99'"):
        said(run, "99")
    with pytest.raises(ConfigError, match="name a run folder"):
        said()
    with pytest.raises(RunFolderError, match="there is no folder"):
        said(tmp_path / "gone")
    (run / "records" / "main.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="no records yet"):
        said(run)
