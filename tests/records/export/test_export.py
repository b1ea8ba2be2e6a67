"""Exports of run folders: what is in them, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import parquet
from tests.records.export.conftest import Draw, Runs, build_tokenizer

from optimal_sampling.cli import parse_generate
from optimal_sampling.config import Stage
from optimal_sampling.errors import (
    ConfigError,
    DatasetError,
    RunFolderError,
    StorageError,
    TokenizerMismatchError,
)
from optimal_sampling.records.export import ExportOptions, export, push
from optimal_sampling.records.export.decontaminate import Questions
from optimal_sampling.records.export.folder import ParquetShards, new_folder
from optimal_sampling.records.export.job import Tools
from optimal_sampling.records.export.selection import is_validation


def table(report, split="train"):
    [file] = sorted(Path(report.folder, "data").glob(f"{split}-*.parquet"))
    return parquet.read_table(file).to_pylist()


def lines(report):
    return {name: value for _, section in report.sections for name, value in section}


def completions(report, split="train"):
    return [row["completion"] for row in table(report, split)]


def test_rows_are_in_the_order_of_the_dataset(runs, rows):
    """Guards: an export that depends on which request happened to finish first."""
    draws = [Draw(number, f"{number}.{sample}", sample) for number in range(3) for sample in (0, 1)]
    first = export(runs.options(runs.make(draws, rows)), runs.tools)
    other = runs.make(draws[::-1], rows, "other")
    second = export(runs.options(other, output_dir=str(runs.root / "out2")), runs.tools)
    assert table(first) == table(second)
    assert completions(first) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


@pytest.mark.parametrize("output", [{}, {"messages": True}, {"format": "tokens"}])
def test_load_dataset(tmp_path, runs, rows, output):
    """Guards: a manifest, a lock or a card that `load_dataset` takes for data."""
    datasets = pytest.importorskip("datasets")
    draws = [Draw(number, f"text {number}") for number in range(8)]
    folder = runs.make(draws, rows)
    report = export(runs.options(folder, validation_share=0.4, **output), runs.tools)
    loaded = datasets.load_dataset(str(report.folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == report.rows
    assert set(report.rows) == {"train", "validation"}
    assert sum(report.rows.values()) == 8


def test_the_cache_of_datasets_tells_exports_apart(tmp_path, runs, rows):
    """Guards: the rows of another folder of the same last name, or from before an overwrite."""
    datasets = pytest.importorskip("datasets")
    counts = []
    for name, count in (("one", 1), ("two", 2), ("two", 3)):
        run = runs.make([Draw(number, "text") for number in range(count)], rows, f"run{count}")
        target = str(tmp_path / name / "data")
        report = export(runs.options(run, output_dir=target, overwrite=True), runs.tools)
        loaded = datasets.load_dataset(str(report.folder), cache_dir=str(tmp_path / "cache"))
        counts.append(loaded["train"].num_rows)
    assert counts == [1, 2, 3]


def test_only_correct(runs, rows):
    """Guards: wrong, truncated, skipped or ungraded completions among those called correct."""
    verdicts = ["correct", "wrong", "no_answer", "skipped", None, "correct"]
    draws = [Draw(number, f"{number}", verdict=each) for number, each in enumerate(verdicts)]
    draws.append(Draw(6, "cut", verdict="truncated", reason="length"))
    report = export(runs.options(runs.make(draws, rows), only="correct"), runs.tools)
    assert completions(report) == ["0", "5"]
    found = lines(report)
    assert found["share right"] == "40.0% (2 of 5)"
    assert (found["truncated"], found["not graded"], found["not correct"]) == ("1", "1", "2")
    assert found["without usable reference"] == "1"


STAGES = (Stage("own", mode="student", tries=2), Stage("veto", hint="right"))


def test_of_stages_the_first_correct_completion(runs, rows):
    """Guards: wrong tries in a training set, and a late stage in place of an early one."""
    draws = [
        Draw(0, "late", 0, "correct", stage="veto", tries=3),
        Draw(0, "early", 1, "correct", stage="own", tries=2),
        Draw(0, "wrong", 0, "wrong", stage="own", tries=1),
        Draw(1, "never", 0, "wrong", stage="own", tries=1),
        Draw(2, "b", 0, "correct", stage="veto", tries=3),
    ]
    folder = runs.make(draws, rows, stages=STAGES)
    report = export(runs.options(folder), runs.tools)
    assert completions(report) == ["early", "late", "b"]
    assert lines(report)["not correct"] == "2"
    one = export(runs.options(folder, max_per_prompt=1, overwrite=True), runs.tools)
    assert completions(one) == ["early", "b"]
    whole = export(runs.options(folder, only="all", overwrite=True), runs.tools)
    assert len(completions(whole)) == 5
    assert lines(report)["stage 1"] == "own: the student alone, 2 tries"
    assert lines(report)["stage 2"] == "veto: the mixture, 1 try, hint right"
    text = (report.folder / "README.md").read_text()
    assert "In stages (own, veto): each prompt has the first completion" in text
    assert "--stages=stages.yaml" in text
    with pytest.raises(RunFolderError, match="take --kind optimal_sampling"):
        export(runs.options(folder, kind="baseline", overwrite=True), runs.tools)


def test_stages_without_verdicts(runs, rows):
    """Guards: an export of tries of which nobody knows which one ended them."""
    folder = runs.make([Draw(0, "a", stage="own", tries=1)], rows, stages=STAGES)
    with pytest.raises(RunFolderError, match="the runs hold no verdicts"):
        export(runs.options(folder), runs.tools)


def test_a_verdict_of_a_record_that_was_replaced_does_not_count(runs, rows):
    """Guards: a completion that is called correct because an earlier one was."""
    folder = runs.make([Draw(0, "right", verdict="correct"), Draw(1, "x", verdict="wrong")], rows)
    path = Path(folder, "verdicts", "main.jsonl")
    before = path.read_text()
    other = runs.make([Draw(0, "other", verdict="wrong"), Draw(1, "x", verdict="wrong")], rows, "b")
    Path(other, "verdicts", "main.jsonl").write_text(before)
    with pytest.raises(DatasetError, match="1 not correct"):
        export(runs.options(other, only="correct"), runs.tools)


@pytest.mark.parametrize(
    ("prefer", "expected"), [("first", "long one"), ("shortest", "b"), ("on-policy", "likely")]
)
def test_preferences(runs, rows, prefer, expected):
    """Guards: a preference that keeps the other completion, or drops a prompt."""
    draws = [
        Draw(0, "long one", 0, log_p_student=-3.0),
        Draw(0, "likely", 1, log_p_student=-0.1),
        Draw(0, "b", 2, log_p_student=-2.0),
        Draw(1, "only", 0),
    ]
    options = runs.options(runs.make(draws, rows), max_per_prompt=1, prefer=prefer)
    report = export(options, runs.tools)
    assert completions(report) == [expected, "only"]
    assert lines(report)["more than 1 of a prompt"] == "2"


def test_on_policy_needs_the_student(runs, rows):
    """Guards: a preference by numbers that the records do not have."""
    folder = runs.make([Draw(0, "a", log_p_student=float("nan"))], rows)
    options = runs.options(folder, max_per_prompt=1, prefer="on-policy")
    with pytest.raises(RunFolderError, match="log_p_student"):
        export(options, runs.tools)


def test_duplicates_are_those_of_one_prompt(runs, rows):
    """Guards: equal answers to different questions that are called duplicates."""
    draws = [Draw(0, "13"), Draw(0, "13", 1), Draw(0, "14", 2), Draw(1, "13")]
    report = export(runs.options(runs.make(draws, rows), dedup=True), runs.tools)
    assert completions(report) == ["13", "14", "13"]
    assert lines(report)["duplicates of a prompt"] == "25.0% (1 of 4)"


def test_truncated_completions(runs, rows):
    """Guards: texts cut by length that get an end token and teach to stop in mid-thought."""
    folder = runs.make([Draw(0, "done"), Draw(1, "cut", reason="length")], rows)
    assert completions(export(runs.options(folder), runs.tools)) == ["done"]
    with pytest.raises(ConfigError, match="--format tokens"):
        runs.options(folder, drop_truncated=False)
    options = runs.options(folder, drop_truncated=False, format="tokens", overwrite=True)
    kept = table(export(options, runs.tools))
    end = runs.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [row["input_ids"][-1] == end for row in kept] == [True, False]


def test_decontamination(runs):
    """Guards: benchmark questions in other punctuation or case, and innocent rows left out."""
    rows = [
        {"problem": "Please tell: what is TWELVE plus one, and then minus three (now)?"},
        {"problem": "What is twelve plus two and then minus three now?"},
        {"problem": "1+1=?"},
    ]
    folder = runs.make([Draw(number, f"{number}") for number in range(3)], rows)
    report = export(runs.options(folder, decontaminate=("mine",)), runs.tools)
    assert completions(report) == ["1", "2"]
    assert lines(report)["overlapping with mine"] == "1"
    assert lines(report)["questions of mine, checked for overlap"] == "1"


CHINESE = "已知函数的图像经过原点并且在区间上单调递增求实数的取值范围"
JAPANESE = "次の文章を読んで、最も適切な答えを一つ選びなさい。ただし根拠も述べること。"
THAI = "จงหาผลบวกของจำนวนเต็มบวกทั้งหมดที่น้อยกว่าหนึ่งร้อย"


@pytest.mark.parametrize("question", [CHINESE, JAPANESE, THAI])
def test_scripts_without_spaces_overlap_too(question):
    """Guards: a whole sentence that counts as one word, so that only an equal text overlaps."""
    questions = Questions()
    questions.add("mine", [question])
    assert questions.match(f"第一问：{question[2:]} (2024)") == "mine"
    assert questions.match(f"请看。{question[4:21]}") == "mine"
    assert questions.match(question[4:16]) is None
    assert questions.match("完全不同的一道题目，求三角形的面积和周长各是多少？") is None


def test_words_beside_letters_without_spaces():
    """Guards: numbers and Latin words that are cut apart, or count for half."""
    questions = Questions()
    questions.add("mine", ["one two three four five six seven 求值"])
    assert questions.match("so: One two three four five six seven 求值!") == "mine"
    assert questions.match("one two three four five six seven 求") is None
    questions.add("short", ["求值"])
    assert questions.match("求值") == "short"
    assert questions.match("求值吗") is None


def test_an_empty_benchmark_is_refused(runs, rows):
    """Guards: a decontamination against nothing that reports no overlap."""
    tools = Tools(runs.tools.vocabulary, lambda name: [], runs.tools.score)
    options = runs.options(runs.make([Draw(0, "a")], rows), decontaminate=("mine",))
    with pytest.raises(DatasetError, match="no questions"):
        export(options, tools)


def test_validation_is_split_by_the_students_prompt(runs, rows):
    """Guards: samples of one prompt in both splits, or other splits for other teachers."""
    draws = [Draw(number, f"{number}", sample) for number in range(8) for sample in (0, 1)]
    plain = runs.make(draws, rows)
    hinted = runs.make(
        draws, rows, "teacher", mode="teacher", teacher_template="{problem} {solution}"
    )
    options = {"validation_share": 0.4}
    first = export(runs.options(plain, **options), runs.tools)
    second = export(
        runs.options(hinted, output_dir=str(runs.root / "b"), kind="baseline", **options),
        runs.tools,
    )
    for report in (first, second):
        train, validation = ({*completions(report, x)} for x in ("train", "validation"))
        assert not train & validation
    assert completions(first, "validation") == completions(second, "validation")


def test_the_validation_share():
    """Guards: a share that is that of bytes below 128, or the complement."""
    prompts = [number.to_bytes(16, "big")[::-1] for number in range(0, 2**64, 2**54)]
    assert sum(is_validation(each, 0.25) for each in prompts) == len(prompts) // 4
    assert not any(is_validation(each, 0.0) for each in prompts)


@pytest.mark.parametrize(
    ("mode", "kind", "right"),
    [("teacher", "optimal_sampling", "baseline"), ("mixture", "baseline", "optimal_sampling")],
)
def test_the_kind_is_that_of_the_run(runs, rows, mode, kind, right):
    """Guards: an arm of an experiment that holds the data of another."""
    folder = runs.make([Draw(0, "a")], rows, mode=mode)
    with pytest.raises(RunFolderError, match=f"--kind {right}"):
        export(runs.options(folder, kind=kind), runs.tools)


def test_runs_with_other_options(runs, rows):
    """Guards: two experiments in one training set, unnoticed."""
    first = runs.make([Draw(0, "a")], rows, "a", seed=1)
    second = runs.make([Draw(0, "b")], rows, "b", seed=2)
    with pytest.raises(RunFolderError, match=r"--seed: 1 there, 2 in the other"):
        export(runs.options(first, second), runs.tools)
    assert not (runs.root / "out").exists()
    report = export(runs.options(first, second, mix=True), runs.tools)
    assert completions(report) == ["a", "b"]


def test_a_sample_that_two_folders_hold_is_taken_once(runs, rows):
    """Guards: overlapping shards that count double."""
    first = runs.make([Draw(0, "a"), Draw(1, "b")], rows, "a")
    second = runs.make([Draw(1, "b"), Draw(2, "c")], rows, "b")
    assert completions(export(runs.options(first, second), runs.tools)) == ["a", "b", "c"]


def test_records_of_another_tokenizer(runs, rows):
    """Guards: ids that mean something else to the model that is trained on them."""
    folder = runs.make([Draw(0, "the answer")], rows)
    swapped = build_tokenizer()
    backend = json.loads(swapped.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(backend))
    with pytest.raises(TokenizerMismatchError, match="--model"):
        export(runs.options(folder), Runs(runs.root / "swapped", swapped).tools)
    assert not (runs.root / "out").exists()


def test_nothing_to_export(runs, rows):
    """Guards: an empty training set, which fails hours later or not at all."""
    folder = runs.make([Draw(0, "a", verdict="wrong")], rows)
    with pytest.raises(DatasetError, match=r"of 1 good records were left out: .*1 not correct"):
        export(runs.options(folder, only="correct"), runs.tools)
    ungraded = runs.make([Draw(0, "a")], rows, "ungraded")
    with pytest.raises(RunFolderError, match="optimal-sampling verify"):
        export(runs.options(ungraded, only="correct"), runs.tools)
    with pytest.raises(DatasetError, match="no good record"):
        export(runs.options(runs.make([], rows, "failed", failed=2)), runs.tools)
    with pytest.raises(RunFolderError, match="holds no records"):
        export(runs.options(str(runs.root / "nowhere")), runs.tools)
    options = runs.options(folder, kind="warmstart", solution_column="solutions")
    with pytest.raises(DatasetError, match="'solutions'"):
        export(options, runs.tools)
    assert not (runs.root / "out").exists()


@pytest.mark.parametrize("content", ["{}", '{"compared": []}', "[]", '{"compared": {}}'])
def test_a_config_without_options(runs, rows, content):
    """Guards: a traceback for a file that was edited or written by something else."""
    folder = runs.make([Draw(0, "a")], rows)
    Path(folder, "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        export(runs.options(folder), runs.tools)


def test_rows_without_a_solution(runs, rows):
    """Guards: a warm start that one row without a solution stops, or that leaves it out unsaid."""
    rows = [rows[0], rows[1] | {"solution": None}, rows[2] | {"solution": " "}]
    folder = runs.make([Draw(place, "a") for place in range(3)], rows)
    report = export(runs.options(folder, kind="warmstart"), runs.tools)
    assert completions(report) == [rows[0]["solution"]]
    assert lines(report)["left out: no solution in the column 'solution'"] == "2"


def test_a_command_of_several_lines_in_the_card(runs, rows):
    """Guards: a block of code in the card that ends, or changes an option, at a line break."""
    folder = runs.make([Draw(0, "a")], rows, teacher_template="{problem}\n\nSolution: {solution}")
    text = (export(runs.options(folder), runs.tools).folder / "README.md").read_text()
    [block] = re.findall("^~~~sh$(.*?)^~~~$", text, re.DOTALL | re.MULTILINE)
    words = shlex.split(block)
    assert "--teacher-template={problem}\n\nSolution: {solution}" in words


def test_the_folder_behind_a_link_is_replaced(runs, rows):
    """Guards: an overwrite that fails on a link after it has moved the old export away."""
    folder = runs.make([Draw(0, "a")], rows)
    report = export(runs.options(folder), runs.tools)
    link = runs.root / "link"
    link.symlink_to(report.folder)
    again = export(runs.options(folder, output_dir=str(link), overwrite=True), runs.tools)
    assert link.is_symlink()
    assert completions(again) == ["a"]


def test_exports_with_dots_in_their_names_do_not_wait(tmp_path):
    """Guards: Qwen3-1.7B and Qwen3-1.5B with one lock, of which the second is refused."""
    first, second = tmp_path / "Qwen3-1.7B", tmp_path / "Qwen3-1.5B"
    with new_folder(first, overwrite=False), new_folder(second, overwrite=False):
        pass
    assert first.is_dir()
    assert second.is_dir()


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_an_empty_name_is_no_default(name):
    """Guards: `--output-dir ""` of an unset variable, which wrote into the default folder."""
    with pytest.raises(ConfigError, match="output_dir"):
        ExportOptions(("run",), output_dir=name)


def test_a_folder_that_is_not_empty(runs, rows):
    """Guards: a folder of the user's that is overwritten; an export that is overwritten unasked."""
    folder = runs.make([Draw(0, "a")], rows)
    export(runs.options(folder), runs.tools)
    with pytest.raises(RunFolderError, match="--overwrite"):
        export(runs.options(folder), runs.tools)
    export(runs.options(folder, overwrite=True), runs.tools)
    (runs.root / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"thesis\.tex"):
        export(runs.options(folder, overwrite=True), runs.tools)
    assert (runs.root / "out" / "thesis.tex").read_text() == "years of work"


def test_coverage_of_what_the_student_cannot_do(runs, rows):
    """Guards: coverage of the problems that the student solves anyway."""
    alone = [("correct", 0), ("wrong", 1), ("wrong", 2), ("wrong", 3)]
    runs.make(
        [Draw(row, "s", verdict=each) for each, row in alone], rows, "student", mode="student"
    )
    mixed = [("wrong", 0), ("correct", 1), ("wrong", 2), ("correct", 2), ("wrong", 3)]
    draws = [Draw(row, "m", place, each) for place, (each, row) in enumerate(mixed)]
    found = lines(export(runs.options(runs.make(draws, rows)), runs.tools))
    assert found["problems with a right completion"] == "50.0% (2 of 4)"
    hard = found["of those that the student alone never solves"]
    assert hard.startswith("66.7% (2 of 3), student run ")


def test_near_copies_of_the_hint(runs, rows):
    """Guards: a privileged teacher that dictates its solution, unseen."""
    solution = "first add the tens then add the ones and write it"
    rows = [each | {"solution": solution} for each in rows]
    draws = [Draw(0, f"well: {solution}!"), Draw(1, "I add the tens and then stop"), Draw(2, "12")]
    folder = runs.make(draws, rows, teacher_template="{problem} {solution}")
    found = lines(export(runs.options(folder), runs.tools))
    assert found["near-copies of the shown solution"] == "33.3% (1 of 3)"
    assert found["longest span in common with it"] == "mean 3.7 words, 33.3% of it; most 11 words"


def test_the_students_nll(runs, rows):
    """Guards: an NLL of the prompt, of the wrong sign, or of a mean of means."""
    draws = [Draw(0, "a", log_p_student=-0.25), Draw(1, "a a a", log_p_student=-0.75)]
    report = export(runs.options(runs.make(draws, rows), score_rows=2), runs.tools)
    found = lines(report)
    assert found["student NLL, nats/token, before training"] == "2.0000 (measured on 2 rows)"
    lengths = [len(runs.tokenizer(draw.text)["input_ids"]) + 1 for draw in draws]
    mean = (0.25 * lengths[0] + 0.75 * lengths[1]) / sum(lengths)
    assert found["student NLL while drawing, nats/token"] == f"{mean:.4f}"
    assert json.loads((report.folder / "export.json").read_text())["student_nll"] == 2.0


def test_the_command_of_the_run(runs, rows):
    """Guards: a card from which the data cannot be made again."""
    hint = "{problem} {solution}"
    folder = runs.make([Draw(0, "a")], rows, teacher_template=hint, chat_template=True)
    text = (export(runs.options(folder), runs.tools).folder / "README.md").read_text()
    [line] = [each.strip() for each in text.splitlines() if "optimal-sampling generate" in each]
    options = parse_generate(shlex.split(line)[2:])
    assert options.prompt.teacher_template == hint
    assert (options.models.student, options.data.dataset) == ("tiny", "rows.jsonl")
    assert (options.run.seed, options.run.output_dir) == (7, folder)


def test_the_card(runs, rows):
    """Guards: a card that lacks what a person needs to judge the data."""
    folder = runs.make([Draw(0, "a", verdict="correct")], rows)
    report = export(runs.options(folder, licence="mit"), runs.tools, ["optimal-sampling export x"])
    text = (report.folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n")
    for title, section in report.sections:
        assert f"## {title}" in text
        assert all(f"| {name} |" in text for name, _ in section)
    assert report.command in text
    assert "\noptimal-sampling export x\n" in text
    wanted = ("share right", "alpha where the models differ", "clamped share", "truncated")
    wanted += ("Chernoff information, nats/token", "tokens with loss", "teacher", "alpha method")
    assert not {*wanted} - lines(report).keys()


KILLED = """
import os, sys, time
from pathlib import Path
from optimal_sampling.records.export.folder import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "data").mkdir()
    (folder / "README.md").write_text(sys.argv[2] * 1000)
    print("writing", flush=True)
    if sys.argv[3] == "hang":
        time.sleep(60)
"""


def writer(target, text, then):
    command = [sys.executable, "-c", KILLED, str(target), text, then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)


def finish(process, number=None):
    """Wait for a writer, after a signal where there is one; its exit code."""
    with process:
        if number is not None:
            process.stdout.readline()
            process.send_signal(number)
        return process.wait(60)


def test_kill(tmp_path):
    """Guards: half a folder under the final name, and leftovers that stop the next export."""
    target = tmp_path / "out"
    assert finish(writer(target, "a", "end")) == 0
    assert finish(writer(target, "b", "hang"), signal.SIGKILL) == -signal.SIGKILL
    assert (target / "README.md").read_text() == "a" * 1000
    assert (tmp_path / ".out.partial").exists()
    assert finish(writer(target, "c", "end")) == 0
    assert (target / "README.md").read_text() == "c" * 1000
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "out"]


def interrupted(target):
    with new_folder(target, overwrite=True) as folder:
        (folder / "data").mkdir()
        raise KeyboardInterrupt


EXPORT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from optimal_sampling.records.export import export
from tests.records.export.conftest import Runs
runs = Runs(Path(sys.argv[2]))
print("ready", flush=True)
export(runs.options(sys.argv[3], overwrite=True, format="tokens"), runs.tools)
"""


def exporting(root, folder):
    """A process that exports, once it says that it begins."""
    here = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", EXPORT, here, str(root), folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random(runs, rows):
    """Guards: 20 kills in an export that leave half of one, lose one, or change the next."""
    draws = [Draw(row, f"{row} {place} " * 20, place) for row in range(8) for place in range(100)]
    folder = runs.make(draws, rows)
    started = time.monotonic()
    assert finish(exporting(runs.root, folder)) == 0
    seconds = time.monotonic() - started
    [whole] = [path.read_bytes() for path in (runs.root / "out" / "data").iterdir()]
    choice, killed = random.Random(0), 0
    for _ in range(20):
        process = exporting(runs.root, folder)
        time.sleep(choice.random() * seconds)
        killed += process.poll() is None
        process.kill()
        finish(process)
        out = runs.root / "out"
        if out.exists():  # it may lie under the hidden name, from which the next export restores it
            assert [path.read_bytes() for path in (out / "data").iterdir()] == [whole]
    assert killed >= 5
    assert finish(exporting(runs.root, folder)) == 0
    assert [path.read_bytes() for path in (runs.root / "out" / "data").iterdir()] == [whole]
    assert sorted(path.name for path in runs.root.iterdir()) == [".out.lock", "out", "run"]


def test_killed_between_the_two_renames(tmp_path):
    """Guards: an export that is gone because its replacement was interrupted."""
    old = tmp_path / ".out.old"
    old.mkdir()
    (old / "README.md").write_text("the export")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "the export"
    assert sorted(os.listdir(tmp_path)) == [".out.lock", "out"]


def test_two_processes(tmp_path):
    """Guards: two exports that write one folder."""
    process = writer(tmp_path / "out", "a", "hang")
    process.stdout.readline()
    with (
        pytest.raises(RunFolderError, match="another process"),
        new_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    process.kill()
    finish(process)


def test_a_full_disk(runs, rows, monkeypatch):
    """Guards: a truncated Parquet file under the final name; a traceback."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = runs.make([Draw(0, "a")], rows)
    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(StorageError, match=r"No space left.*Free some space"):
        export(runs.options(folder), runs.tools)
    assert not (runs.root / "out").exists()
    assert not (runs.root / ".out.partial").exists()


def test_memory_is_flat(tmp_path):
    """Guards: all rows in memory until the end."""
    import pyarrow as pa

    shards = ParquetShards(tmp_path, "train", pa.schema({"text": pa.string()}))
    for _ in range(2500):
        shards.add({"text": "x" * 1000})
    [file] = (tmp_path / "data").iterdir()
    assert len(shards._waiting) == 500
    shards.close()
    [file] = (tmp_path / "data").iterdir()
    assert file.name == "train-00000-of-00001.parquet"
    assert parquet.ParquetFile(file).num_row_groups == 3


class Hub:
    """A hub that records what it is asked, or refuses."""

    def __init__(self, error=None):
        self.error = error
        self.calls = []

    def create_repo(self, repository, **options):
        if self.error:
            raise self.error
        self.calls.append((repository, options))

    def upload_folder(self, **options):
        self.calls.append(options)


def test_push(tmp_path):
    """Guards: a public repository by default, a model repository, a traceback of the hub."""
    hub = Hub()
    assert push(tmp_path, "me/data", private=True, api=hub).endswith("/datasets/me/data")
    (repository, created), uploaded = hub.calls
    assert (repository, created["private"], created["repo_type"]) == ("me/data", True, "dataset")
    assert (uploaded["repo_type"], uploaded["folder_path"]) == ("dataset", str(tmp_path))
    with pytest.raises(ConfigError, match=r"401.*hf upload me/data"):
        push(tmp_path, "me/data", private=True, api=Hub(OSError("401 unauthorised")))


def test_options():
    """Guards: options that contradict each other and are accepted."""
    for wrong in (
        {"messages": True, "format": "tokens"},
        {"kind": "warmstart", "only": "correct"},
        {"validation_share": 1.0},
        {"max_per_prompt": 0},
        {"score_rows": -1},
    ):
        with pytest.raises(ConfigError):
            ExportOptions(("run",), **wrong)
    assert ExportOptions(("run",), kind="baseline").output_dir == "outputs/sft/baseline_sft"


def test_spans():
    """Guards: a longest span that ends at a gap, or a quadratic search in repeated text."""
    from optimal_sampling.records.export.spans import longest_common_span

    text, other = (
        ["a", "b", "c", "d", "e", "f", "x", "a", "b", "c", "d"],
        ["z", "a", "b", "c", "d", "e", "y", "c", "d", "e", "f"],
    )
    assert longest_common_span(text, other) == 5
    assert longest_common_span(["a", "b", "c"], ["a", "b", "c"]) == 0
    started = time.perf_counter()
    assert longest_common_span(["1"] * 3000, ["1"] * 1000) == 1000
    assert time.perf_counter() - started < 20
