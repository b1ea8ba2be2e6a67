"""`generate` on real problems with the shipped pair, whose answers are nonsense."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from optimal_sampling import toy_pair
from optimal_sampling.cli import main
from optimal_sampling.records import load

HERE = Path(__file__).parent
TOKENIZER = AutoTokenizer.from_pretrained(toy_pair.path("toy-teacher"))
BESIDE = HERE.parents[2] / "shared" / "data"
"""Larger sets, where a checkout has them beside it."""


def run(dataset, folder, *options):
    arguments = [
        "--dataset",
        str(dataset),
        "--output-dir",
        str(folder),
        "--max-new-tokens",
        "16",
        *options,
    ]
    return main(["generate", *arguments])


def check(folder, dataset, count):
    """Every row is there, its prompts whole, its ids within the vocabulary."""
    lines = (
        dataset.read_bytes().rstrip(b"\n").split(b"\n")
    )  # text.splitlines() would also split at U+2028
    source = [json.loads(line) for line in lines]
    records = list(load(folder))
    assert len(records) == count
    for record in records:
        row = source[record["row_index"]]
        assert record["row"] == row
        assert row["problem"] in record["student_prompt"]
        student_ids = TOKENIZER.encode(record["student_prompt"], add_special_tokens=False)
        assert record["n_student_prompt_tokens"] == len(student_ids)
        *before, last = record["completion_ids"]
        assert TOKENIZER.eos_token_id not in before
        assert max(before, default=0) < len(TOKENIZER)
        if last == TOKENIZER.eos_token_id:
            assert record["finish_reason"] == "stop"
        else:
            assert (record["finish_reason"], record["n_completion_tokens"]) == ("length", 16)


def test_latex_long_prompts_and_solutions_in_the_teachers_prompt(tmp_path):
    """Guards: braces of LaTeX taken for placeholders, prompts that are cut, the student seeing the
    solution.
    """
    dataset = HERE / "data" / "real_prompts.jsonl"
    assert run(dataset, tmp_path / "run", "--teacher-template", "{problem}\nHint: {solution}") == 0
    check(tmp_path / "run", dataset, 10)
    for record in load(tmp_path / "run"):
        solution = record["row"]["solution"]
        if solution:
            assert solution in record["teacher_prompt"]
            assert solution not in record["student_prompt"]


@pytest.mark.skipif(not BESIDE.is_dir(), reason="the larger sets are not beside this checkout")
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "deepscaler_10k.jsonl"])
def test_a_slice_of_the_larger_sets(name, tmp_path):
    """Guards: what ten rows do not show: rare characters, very long problems, rows without a
    solution.
    """
    folder = tmp_path / "run"
    assert run(BESIDE / name, folder, "--num-examples", "2000", "--data-slice", "0::80") == 0
    check(folder, BESIDE / name, 25)
