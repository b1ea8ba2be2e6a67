"""Benchmarks: every format on a local file, pinned questions, and questions that change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from optimal_sampling.errors import ConfigError, DatasetError, OptimalSamplingError
from optimal_sampling.evaluate.benchmarks import (
    BENCHMARKS,
    DEFAULT_BENCHMARKS,
    benchmark_row,
    chosen_benchmarks,
    prepare,
    question_hash,
)
from optimal_sampling.evaluate.options import EvaluateConfig
from optimal_sampling.prompts.hints import wrong_answer
from optimal_sampling.verify import GraderPool, Task

SHARED = Path(__file__).parents[2] / "../shared/data"

# One row in the form of each source, with the row that it becomes.
FORMATS = {
    "gsm8k": (
        {"question": "2 clips and 1,000?", "answer": "2+1000=<<2+1000=1002>>1002\n#### 1,002"},
        {
            "problem": "2 clips and 1,000?",
            "answer": "1002",
            "solution": "2+1000=<<2+1000=1002>>1002\n#### 1,002",
        },
    ),
    "math500": (
        {
            "problem": "Half?",
            "solution": r"So $\boxed{\frac{1}{2}}$.",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        {
            "problem": "Half?",
            "answer": r"\frac{1}{2}",
            "solution": r"So $\boxed{\frac{1}{2}}$.",
        },
    ),
    "aime24": (
        {"id": 60, "problem": "Walk?", "solution": r"\boxed{204}", "url": "https://x.org/1"},
        {"problem": "Walk?", "answer": "204", "solution": r"\boxed{204}"},
    ),
    "aime25": (
        {"problem": "Bases?", "answer": "70", "id": "0"},
        {"problem": "Bases?", "answer": "70"},
    ),
    "amc23": (
        {"id": 0, "question": "Cities?", "answer": 27.0, "url": "https://x.org/2"},
        {"problem": "Cities?", "answer": "27"},
    ),
    "minerva": (
        {"question": "Wavelength?", "answer": "1.5e-7"},
        {"problem": "Wavelength?", "answer": "1.5e-7"},
    ),
    "olympiadbench": (
        {
            "question": "Roots?",
            "solution": ["First $1$,", "then $2$."],
            "final_answer": ["1", "2"],
            "answer_type": "Numerical",
            "is_multiple_answer": True,
        },
        {"problem": "Roots?", "answer": "1, 2", "solution": "First $1$,\n\nthen $2$."},
    ),
    "synthetic": (
        {"problem": "1+1=?", "answer": "2", "solution": r"1+1=2. \boxed{2}", "steps": 1},
        {"problem": "1+1=?", "answer": "2", "solution": r"1+1=2. \boxed{2}"},
    ),
}


def config_for(tmp_path, **options):
    options = {"extra_models": ("toy-student",), "output_dir": str(tmp_path / "out"), **options}
    return EvaluateConfig(**options)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(questions):
    return [json.loads(line) for line in questions.path.read_text().splitlines()]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_local_file_of_each_format(tmp_path, name, ending):
    """Guards: a benchmark whose question or answer stands in a column that is not looked at."""
    given, expected = FORMATS[name]
    file = write_rows(tmp_path / f"rows.{ending}", [given])
    config = config_for(tmp_path, benchmark_file=(f"{name}={file}",), allow_other_questions=True)
    (benchmark,) = chosen_benchmarks(config)
    questions = prepare(benchmark, config)
    assert kept(questions) == [expected]
    assert (questions.count, questions.source) == (1, str(file))
    assert questions.digest == question_hash([expected["problem"]])


def test_every_benchmark_has_a_format():
    """Guards: a benchmark that was added without a test of its format."""
    assert FORMATS.keys() == BENCHMARKS.keys()
    assert "synthetic" not in DEFAULT_BENCHMARKS


@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("aime24", 30), ("amc23", 40)])
def test_the_pinned_questions(tmp_path, name, count):
    """Guards: a hash that is not that of the public file."""
    if not SHARED.is_dir():
        pytest.skip("the public files are not here")
    config = config_for(tmp_path, data_dir=str(SHARED))
    questions = prepare(BENCHMARKS[name], config)
    assert (questions.count, questions.digest) == (count, BENCHMARKS[name].pinned)
    assert all(row["answer"] for row in kept(questions))


def test_the_synthetic_questions_are_pinned(tmp_path):
    """Guards: other problems after a change of the generator."""
    questions = prepare(BENCHMARKS["synthetic"], config_for(tmp_path))
    assert questions.digest == BENCHMARKS["synthetic"].pinned
    assert len({row["problem"] for row in kept(questions)}) == questions.count == 500


def test_other_questions_under_a_known_name(tmp_path):
    """Guards: the score of thirty easy questions in a table under the name of aime24."""
    file = write_rows(tmp_path / "easy.jsonl", [{"problem": "1+1?", "answer": "2"}])
    config = config_for(tmp_path, benchmark_file=(f"aime24={file}",))
    with pytest.raises(DatasetError, match="does not hold the questions of aime24"):
        prepare(BENCHMARKS["aime24"], config)
    allowed = prepare(BENCHMARKS["aime24"], replace(config, allow_other_questions=True))
    assert allowed.note == "other questions"


def test_the_hash_is_of_the_questions_alone():
    """Guards: a hash that changes with the order of a mirror or its line breaks, or with none."""
    first = question_hash(["What is  2?", "Café\n1"])
    assert first == question_hash(["Cafe\u0301 1", "What is 2? "])
    assert first != question_hash(["What is 2?", "Café 2"])
    assert question_hash(["ab", "c"]) != question_hash(["a", "bc"])


def test_questions_and_answers_that_change(tmp_path):
    """Guards: a mirror that was edited between two calls whose scores stand in one table."""
    file = tmp_path / "aime25.jsonl"
    config = config_for(tmp_path, data_dir=str(tmp_path))
    benchmark = BENCHMARKS["aime25"]
    write_rows(file, [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}])
    first = prepare(benchmark, config)
    assert prepare(benchmark, config) == first
    write_rows(file, [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "3"}])
    with pytest.raises(DatasetError, match="the answers of aime25 are not those"):
        prepare(benchmark, config)
    write_rows(file, [{"problem": "a", "answer": "1"}, {"problem": "c", "answer": "2"}])
    with pytest.raises(DatasetError, match="the questions of aime25 are not those"):
        prepare(benchmark, config)
    assert [row["problem"] for row in kept(first)] == ["a", "b"]
    write_rows(file, kept(first))
    first.path.write_text('{"problem": "edited", "answer": "1"}\n')
    assert [row["problem"] for row in kept(prepare(benchmark, config))] == ["a", "b"]


def test_repeated_questions_are_named(tmp_path):
    """Guards: a question that is asked once, counted once, and missing from the count unsaid."""
    texts = [("a b", "1"), ("c", "2"), ("a  b ", "1"), ("c", "3")]
    rows = [{"problem": problem, "answer": answer} for problem, answer in texts]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    config = config_for(tmp_path, benchmark_file=(f"mine={file}",))
    (benchmark,) = chosen_benchmarks(config)
    questions = prepare(benchmark, config)
    assert kept(questions) == rows[:2]
    assert (questions.count, questions.digest) == (2, question_hash(text for text, _ in texts))
    assert questions.note == (
        "2 repeated questions are left out: row 3 is row 1 again, "
        "row 4 is row 2 again with another answer"
    )


def test_a_source_that_is_gone(tmp_path, monkeypatch):
    """Guards: a finished evaluation that cannot be shown again without the network, and questions
    that were edited where they are kept.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "mine.jsonl", [{"problem": "a\u2028b", "answer": "1"}])
    config = config_for(tmp_path, benchmark_file=(f"mine={file}",), output_dir="out")
    (benchmark,) = chosen_benchmarks(config)
    first = prepare(benchmark, config)
    file.unlink()
    again = prepare(benchmark, config)
    assert (again.digest, again.source, again.count) == (first.digest, str(file), 1)
    assert again.path == first.path
    assert "does not exist" in again.note
    again.path.write_text('{"problem": "b", "answer": "1"}\n')
    with pytest.raises(DatasetError, match="was changed after it was written"):
        prepare(benchmark, config)
    with pytest.raises(OptimalSamplingError):
        prepare(BENCHMARKS["aime25"], config)


def test_names(tmp_path):
    """Guards: a mistyped benchmark that is left out, and a file that nobody reads."""
    assert [b.name for b in chosen_benchmarks(config_for(tmp_path))] == [*DEFAULT_BENCHMARKS]
    with pytest.raises(ConfigError, match=r"unknown benchmark 'amie24'; did you mean 'aime24'\?"):
        chosen_benchmarks(config_for(tmp_path, benchmarks=("amie24",)))
    both = config_for(tmp_path, benchmarks=("gsm8k",), benchmark_file=("mine=x.jsonl",))
    with pytest.raises(ConfigError, match=r"mine=.* is not among --benchmarks"):
        chosen_benchmarks(both)
    with pytest.raises(ConfigError, match="must be NAME=PATH"):
        config_for(tmp_path, benchmark_file=("x.jsonl",))
    with pytest.raises(DatasetError, match="no folder"):
        prepare(BENCHMARKS["gsm8k"], config_for(tmp_path, data_dir=str(tmp_path / "none")))


@pytest.mark.parametrize("row", [{"text": "x"}, {"problem": None}, {"problem": " "}])
def test_a_row_without_a_question_is_named(tmp_path, row):
    """Guards: an empty prompt, and an error that does not say which row."""
    file = write_rows(tmp_path / "mine.jsonl", [{"problem": "x", "answer": "1"}, row])
    config = config_for(tmp_path, benchmark_file=(f"mine={file}",))
    with pytest.raises(DatasetError, match=r"row 2 of .*mine\.jsonl has no question as text"):
        prepare(chosen_benchmarks(config)[0], config)


@pytest.mark.parametrize("value", [None, "", [], True, {"x": 1}, float("nan"), float("inf")])
def test_what_is_no_answer(value):
    """Guards: a reference that is the text of Python's None, nan or a dict, equal to no answer."""
    assert benchmark_row({"problem": "x", "answer": value})["answer"] is None
    assert benchmark_row({"problem": "x", "answer": value, "ground_truth": 3})["answer"] == "3"


@pytest.mark.parametrize("name", ["math500", "aime24", "amc23"])
def test_wrong_hints_are_graded_wrong(tmp_path, name):
    """Guards: a control with a wrong solution whose answer is right after all, such as 5 cm^3 for
    5 cm^2.
    """
    if not SHARED.is_dir():
        pytest.skip("the public files are not here")
    pytest.importorskip("math_verify")
    rows = kept(prepare(BENCHMARKS[name], config_for(tmp_path, data_dir=str(SHARED))))
    with GraderPool("math", workers=1) as pool:
        tasks = [Task(rf"\boxed{{{wrong_answer(row['answer'])}}}", row["answer"]) for row in rows]
        verdicts = {grade.verdict for _, grade in pool.map(enumerate(tasks))}
        right = [Task(rf"\boxed{{{row['answer']}}}", row["answer"]) for row in rows[:20]]
        assert {grade.verdict for _, grade in pool.map(enumerate(right))} == {"correct"}
    assert verdicts == {"wrong"}
