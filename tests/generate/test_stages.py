"""Runs of stages: who is tried next, what stops, and what another call goes on with."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import optimal_sampling.engines
from optimal_sampling.config import MixtureConfig, PromptConfig, Stage, VerifyConfig
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.generate import Interrupted, folder_status, generate
from optimal_sampling.generate.progress import Progress
from optimal_sampling.records import graded_records, load, merge

ROWS = [{"problem": f"question {number}", "answer": str(number)} for number in range(12)]
STAGES = (
    Stage("own", mode="student", tries=3),
    Stage("veto"),
    Stage("teacher", mode="teacher", mixture=MixtureConfig(top_k=1)),
)
GRADER = """
def check(completion, reference, row):
    "Right with a chance of 30%, a function of the text."
    return sum(map(ord, completion)) % 10 < 3

def never(completion, reference, row):
    return False
"""


@pytest.fixture
def staged(job, tmp_path):
    """A config of stages, graded by a function."""
    path = tmp_path / "own.py"
    path.write_text(GRADER)

    def build(rows=ROWS, stages=STAGES, function="check", **options):
        verify = VerifyConfig(verify=f"{path}:{function}", verify_workers=1)
        return replace(job(rows, **options), verify=verify, stages=stages)

    return build


@pytest.fixture
def opened(fake_engine, monkeypatch):
    """The modes of the engines that were opened, in order."""
    modes = []

    def open_engine(engine, models, mixture, vocabulary, mode):
        modes.append(mode)
        return fake_engine

    monkeypatch.setattr(optimal_sampling.engines, "open_engine", open_engine)
    return modes


def sequences(config):
    """By row: stage, try, `tries` and verdict of its records, in the order of their tries."""
    found = {}
    for record, graded in graded_records(config.run.output_dir):
        step = record["stage"], record["sample_index"], record["tries"], graded["verdict"]
        found.setdefault(record["row_index"], []).append(step)
    return {row: sorted(steps, key=lambda step: step[2]) for row, steps in found.items()}


def contents(config):
    """Records and verdicts by identity, without what may differ between equal runs."""
    found = {}
    for record, graded in graded_records(config.run.output_dir):
        key = record["id"], record["sample_index"]
        assert key not in found
        del record["seconds"]
        found[key] = json.dumps([record, {**graded, "record": ""}])
    return found


def test_each_prompt_stops_at_its_first_correct_completion(opened, staged):
    """Guards: a try after a correct one, a try that is left out, and a wrong count of tries."""
    config = staged()
    summary = generate(config)
    plan = [("own", 0, 1), ("own", 1, 2), ("own", 2, 3), ("veto", 0, 4), ("teacher", 0, 5)]
    found = sequences(config)
    assert len(found) == len(ROWS)
    lengths = set()
    for steps in found.values():
        assert [step[:3] for step in steps] == plan[: len(steps)]
        verdicts = [step[3] for step in steps]
        assert set(verdicts[:-1]) <= {"wrong"}
        assert verdicts[-1] == "correct" or len(steps) == len(plan)
        lengths.add(len(steps))
    assert len(lengths) > 2  # a grader that is right at once, or never, would show nothing
    solved = sum(steps[-1][3] == "correct" for steps in found.values())
    assert (summary.prompts, summary.solved) == (len(ROWS), solved)
    assert opened == ["student", "mixture", "teacher"]
    modes = {record["stage"]: record["mode"] for record in load(config.run.output_dir)}
    assert modes == {"own": "student", "veto": "mixture", "teacher": "teacher"}


def test_tries_of_different_stages_share_no_noise(opened, fake_engine, staged):
    """Guards: a second stage that draws the first one's texts again."""
    generate(staged(function="never"))
    keys = Counter(request.noise_key for request in fake_engine.served)
    assert len(keys) == len(fake_engine.served) == 5 * len(ROWS)


def test_tokens_of_a_stage_do_not_depend_on_the_stages_before(opened, staged):
    """Guards: tokens that change with the tries of other stages, or with their verdicts."""
    whole, alone = staged(function="never", name="whole"), staged(name="alone", stages=STAGES[1:2])
    generate(whole)
    generate(alone)

    def texts(config):
        records = load(config.run.output_dir)
        return {r["row_index"]: r["completion"] for r in records if r["stage"] == "veto"}

    assert texts(alone) == texts(whole)


def test_a_stage_that_nobody_needs_loads_nothing(opened, staged):
    """Guards: minutes of loading a teacher for no prompt."""
    config = staged(ROWS[:1], (Stage("own", mode="student", tries=40), *STAGES[1:]))
    generate(config)
    assert opened == ["student"]
    assert generate(config).status == "complete"
    assert opened == ["student"]


class Interrupting(Progress):
    """Ctrl-C at a given update."""

    def __init__(self, after):
        self.left = after

    def update(self, tally):
        self.tick()

    def show(self, line):
        self.tick()

    def tick(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_as_an_uninterrupted_one(opened, staged):
    """Guards: a prompt tried again after its correct completion, or closed before it."""
    whole = staged(name="whole")
    generate(whole)
    broken, calls = staged(name="broken"), 0
    while True:
        try:
            generate(broken, Interrupting(after=9))
            break
        except Interrupted:
            calls += 1
    assert calls > 3
    assert contents(broken) == contents(whole)


def test_verdicts_that_were_lost_are_made_again(opened, staged):
    """Guards: a resumed run that takes an ungraded completion for a wrong one and tries again."""
    config = staged()
    generate(config)
    before = contents(config)
    (Path(config.run.output_dir) / "verdicts" / "main.jsonl").unlink()
    assert generate(config).generated == 0
    assert contents(config) == before


def test_several_correct_completions(opened, staged):
    """Guards: `--samples-per-prompt` that is ignored, or more of them that begin anew."""
    config = staged(stages=(Stage("own", mode="student", tries=30),))
    generate(config)
    first = contents(config)
    more = replace(config, data=replace(config.data, samples_per_prompt=3))
    generate(more)
    assert contents(more).items() > first.items()
    for steps in sequences(more).values():
        assert [step[3] for step in steps].count("correct") == 3
        assert steps[-1][3] == "correct"


def test_stages_may_go_on_where_others_ended(opened, staged):
    """Guards: records of a longer list that are not those of a run that had it from the start."""
    short = staged(name="short", stages=(STAGES[0], replace(STAGES[1], tries=1)))
    longer = (STAGES[0], replace(STAGES[1], tries=2), STAGES[2])
    whole = staged(name="whole", stages=longer)
    generate(short)
    generate(whole)
    resumed = replace(short, stages=longer)
    assert generate(resumed).generated > 0
    assert contents(resumed) == contents(whole)
    configs = [
        json.loads((Path(each.run.output_dir) / "config.json").read_text())
        for each in (resumed, whole)
    ]
    assert configs[0]["compared"] == configs[1]["compared"]
    with pytest.raises(RunFolderError, match="number of stages: 3 there, 2 now"):
        generate(short)


@pytest.mark.parametrize(
    ("stages", "difference"),
    [
        ((replace(STAGES[0], tries=4), *STAGES[1:]), "stage 1, tries: 3 there, 4 now"),
        (STAGES[:2], "number of stages: 3 there, 2 now"),
        ((), "number of stages: 3 there, 0 now"),
        ((STAGES[1], STAGES[0], STAGES[2]), "stage 1, name: 'own' there, 'veto' now"),
        (
            (replace(STAGES[0], mixture=MixtureConfig(temperature=0.5)), *STAGES[1:]),
            "stage 1, temperature: 1.0 there, 0.5 now",
        ),
        ((*STAGES[:2], replace(STAGES[2], hint="right")), "stage 3, hint: None there, 'right' now"),
    ],
)
def test_other_stages_are_refused(opened, staged, stages, difference):
    """Guards: a folder whose records come from two lists of stages."""
    config = staged(ROWS[:2])
    generate(config)
    with pytest.raises(RunFolderError, match=re.escape(difference)):
        generate(replace(config, stages=stages))


def test_another_grader_is_refused(opened, staged, tmp_path):
    """Guards: prompts closed by one grader and left open by another in one folder."""
    config = staged(ROWS[:2])
    generate(config)
    with pytest.raises(RunFolderError, match=r"grader and reference answer: 'own\.py:check@"):
        generate(replace(config, verify=replace(config.verify, verify="synthetic")))


def test_a_plain_folder_does_not_become_one_of_stages(opened, staged):
    """Guards: records without a stage among those of stages."""
    config = staged(ROWS[:2])
    generate(replace(config, stages=()))
    with pytest.raises(RunFolderError, match="number of stages: 0 there, 3 now"):
        generate(config)


def test_a_try_that_fails_goes_on_with_the_next_stage(opened, fake_engine, staged):
    """Guards: a prompt that one model cannot take, given up for all stages, or tried for ever."""
    fake_engine.fails = lambda request: "too long" if opened[-1] == "student" else ""
    config = staged(function="never", max_attempts=2)
    summary = generate(config)
    assert (summary.status, summary.failed, summary.good) == ("failed", 12, 24)
    assert generate(config).failed == 12  # tried once more
    served = len(fake_engine.served)
    summary = generate(config)
    assert (summary.given_up, len(fake_engine.served)) == (12, served)


def test_rows_without_prompts_or_answers(opened, staged):
    """Guards: a row that fails in every stage, and one without an answer that is tried in all."""
    rows = [*ROWS[:3], {"problem": None, "answer": "1"}, {"problem": "no answer"}, ROWS[0]]
    config = staged(rows, (Stage("own", mode="student", tries=40),))
    config = replace(config, verify=VerifyConfig(verify="synthetic", verify_workers=1))
    config = replace(config, stages=STAGES)
    summary = generate(config)
    assert (summary.failed, summary.duplicate_rows, summary.prompts) == (1, 1, 3)
    assert "1 rows have no answer to grade with, and are left out" in summary.notes.values()
    failed = [r for r in load(config.run.output_dir, failed=True) if r["error"]]
    assert [(r["stage"], r["row_index"]) for r in failed] == [("own", 3)]


def test_a_dataset_without_answers_is_refused(opened, staged):
    """Guards: all stages of every prompt, none of which can be correct."""
    rows = [{"problem": "a question", "answer": None}]
    config = replace(staged(rows), verify=VerifyConfig(verify="synthetic"))
    with pytest.raises(ConfigError, match=r"no row of .* has an answer to grade with"):
        generate(config)
    assert opened == []


def test_a_hint_is_in_the_teachers_prompt_of_its_stage_alone(opened, staged):
    """Guards: a privileged stage whose prompts are those of the others, or the reverse; a row
    without the hint that fails in all stages.
    """
    rows = [{**ROWS[0], "solution": "because"}, {"problem": "other", "answer": "5"}]
    hinted = (STAGES[0], replace(STAGES[2], hint="right"))
    config = staged(rows, hinted, "never")
    config = replace(config, prompt=PromptConfig(teacher_template="{problem}"))
    generate(config)
    for record in load(config.run.output_dir):
        assert "because" not in record["student_prompt"]
        is_shown = record["stage"] == "teacher" and record["row_index"] == 0
        assert ("because" in record["teacher_prompt"]) == is_shown


def test_slices_together_are_the_whole(opened, staged, tmp_path):
    """Guards: shards that hold other records than one run, or that cannot be merged; an
    interrupted shard that is taken for a finished one.
    """
    whole = staged(name="whole")
    generate(whole)
    parts = [staged(name=f"part{part}", data_slice=f"{part}::2") for part in range(2)]
    generate(parts[0])
    with pytest.raises(Interrupted):
        generate(parts[1], Interrupting(after=15))
    folders = [part.run.output_dir for part in parts]
    with pytest.raises(RunFolderError, match="finish it first"):
        merge(folders, tmp_path / "merged")
    generate(parts[1])
    merge(folders, tmp_path / "merged")
    merged = replace(whole, run=replace(whole.run, output_dir=str(tmp_path / "merged")))
    assert contents(merged) == contents(whole)


def test_slices_share_a_folder(opened, fake_engine, staged):
    """Guards: a slice that makes again what another call on the folder has made."""
    config = staged()
    generate(config)
    served = len(fake_engine.served)
    for part in range(2):
        data = replace(config.data, data_slice=f"{part}::2")
        summary = generate(replace(config, data=data))
        assert (summary.generated, summary.status) == (0, "complete")
    assert len(fake_engine.served) == served


def test_models_may_be_shared(fake_engine, staged):
    """Guards: a process that runs many jobs and has to load its models for every stage."""
    asked = []

    @contextmanager
    def shared(engine, models, mixture, vocabulary, mode):
        asked.append((mode, mixture.top_k))
        yield fake_engine

    generate(staged(function="never"), open_with=shared)
    assert asked == [("student", -1), ("mixture", -1), ("teacher", 1)]


def test_the_status_shows_the_stages(opened, staged):
    """Guards: a status that counts tries alone."""
    from io import StringIO

    from rich.console import Console

    config = staged()
    summary = generate(config)
    console = Console(file=StringIO(), width=160)
    console.print(folder_status(config.run.output_dir))
    console.print(summary.table())
    text = console.file.getvalue()
    assert text.count("stage own") == 3  # status, counts of the summary, the plan
    assert text.count(f"{summary.solved} of 12") == 2
    assert "the student alone, 3 tries" in text
    own = summary.stages["own"]
    assert (own["prompts"], own["teacher_tokens"]) == (12, 0)
    assert own["student_tokens"] > own["tries"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "a b"}, "the name of a stage is made of letters"),
        ({"name": "a", "tries": 0}, "tries must be at least 1, got 0"),
        ({"name": "a", "tries": 2, "mixture": MixtureConfig(top_k=1)}, "all 2 tries are the same"),
        ({"name": "a", "mode": "studnt"}, "mode must be one of mixture, student, teacher"),
    ],
)
def test_stages_that_make_no_sense(options, reason):
    """Guards: a stage that does nothing, or the same thing several times."""
    with pytest.raises(ConfigError, match=reason):
        Stage(**options)


def test_lists_that_make_no_sense(job):
    """Guards: records that cannot be told apart, and stages that cannot stop."""
    config = job(ROWS)
    with pytest.raises(ConfigError, match="name a grader: --verify math"):
        replace(config, stages=STAGES)
    graded = replace(config, verify=VerifyConfig(verify="synthetic"))
    with pytest.raises(ConfigError, match="two stages have the name 'own'"):
        replace(graded, stages=(STAGES[0], STAGES[0]))
    with pytest.raises(ConfigError, match="each stage has its own mode"):
        replace(graded, stages=STAGES, run=replace(config.run, mode="student"))
    with pytest.raises(ConfigError, match="stages must be a list, each of the class Stage"):
        replace(graded, stages="escalate")
