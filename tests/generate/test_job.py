"""From rows to records: what is owed, what fails, what is counted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import optimal_sampling.engines.local.engine as engine_module
from optimal_sampling import toy_pair
from optimal_sampling.config import MixtureConfig, ModelConfig, PromptConfig, RunConfig, ToyOptions
from optimal_sampling.engines import load as load_engine
from optimal_sampling.engines.toy import ToyEngine
from optimal_sampling.errors import ConfigError, DatasetError, EngineError, RunFolderError
from optimal_sampling.generate import Interrupted, dry_run, generate
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.records import RunFolder, load, merge
from optimal_sampling.records.run_folder import Ledger, config_hash
from optimal_sampling.types import Request, prompt_id

ROWS = [{"problem": f"{n}+1=?", "answer": str(n + 1)} for n in range(12)]
ODD_ROWS = [
    r"If $xy = b$ and $\frac{1}{x^2} + \frac{1}{y^2} = a$, "
    r"then \[(x + y)^2 = \boxed{?}\] {problem} {{x}}",
    "[asy]\ndraw(Circle(origin,1));\n[/asy]\n" * 40,
    "设 x≤π，求 ∑ 1/x² 的值。 \U0001f600 e\u0301 \u2028 \u0085 \x00 \t",
    "<|end|> 100% <|assistant|> C:\\path\\n %s %(x)s",
]


def records(config, failed=False):
    return {(r["id"], r["sample_index"]): r for r in load(config.run.output_dir, failed=failed)}


def without_times(found):
    return {key: {**record, "seconds": 0} for key, record in found.items()}


def test_a_run(fake_engine, job):
    """The story: every row becomes a record that says what was asked and what came of it."""
    config = job(ROWS, samples_per_prompt=2)
    summary = generate(config)
    assert (summary.status, summary.asked, summary.good, summary.generated) == (
        "complete",
        24,
        24,
        24,
    )
    found = records(config)
    assert len(found) == 24
    for (name, _), record in found.items():
        assert name == prompt_id(record["student_prompt"], record["teacher_prompt"])
        assert record["row"] == ROWS[record["row_index"]]
        assert record["row"]["problem"] in record["student_prompt"]
        assert record["completion"] == bytes(record["completion_ids"]).decode()
    assert json.loads((Path(config.run.output_dir) / "summary.json").read_text())["asked"] == 24
    assert summary.notes["device"] == "none"
    assert fake_engine.closed


def test_a_finished_run_loads_no_models(fake_engine, job, monkeypatch):
    """Guards: minutes of loading to find that nothing is owed."""
    config = job(ROWS)
    generate(config)
    monkeypatch.setattr(
        "optimal_sampling.engines.open_engine", lambda *_: pytest.fail("models were loaded")
    )
    summary = generate(config)
    assert (summary.already_good, summary.generated, summary.status) == (12, 0, "complete")
    assert summary.folder_records == 12


def test_more_of_the_same(fake_engine, job):
    """Guards: making again what is there when more rows or samples are asked for."""
    generate(job(ROWS, num_examples=5))
    served = len(fake_engine.served)
    summary = generate(job(ROWS, samples_per_prompt=2))
    assert (served, summary.already_good, summary.generated) == (5, 5, 19)
    assert len(fake_engine.served) == 24


@pytest.mark.parametrize("config", [{}, None, "run.yaml"])
def test_generate_says_what_to_pass(config):
    """Guards: an AttributeError for options given in another form than a GenerateConfig."""
    with pytest.raises(ConfigError, match=r"config must be a GenerateConfig, such as .*, got"):
        generate(config)


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({"fixed_alpha": 0.7}, {"alpha_method": "fixed"}),
        ({"trust_region": 5.0}, {"alpha_method": "trust_region"}),
        ({"schedule_tokens": 9}, {"alpha_method": "schedule"}),
        ({"schedule_start": 0.9}, {"alpha_method": "schedule"}),
        ({"schedule_end": 0.9}, {"alpha_method": "schedule"}),
        ({"veto_min_p": 0.2}, {"alpha_method": "veto"}),
        ({"interleaved_min_p": 0.2}, {"alpha_method": "interleaved"}),
        ({"interleaved_top_k": 9}, {"alpha_method": "interleaved"}),
        ({"arithmetic_weight": 0.2}, {"alpha_method": "arithmetic"}),
    ],
)
def test_an_option_of_another_method_is_noted(fake_engine, job, options, others):
    """Guards: `--fixed-alpha 0.3` that is silently ignored for want of `--alpha-method fixed`."""
    [(name, value)] = options.items()
    config = replace(job(ROWS[:1]), mixture=MixtureConfig(**options))
    method = others["alpha_method"]
    assert generate(config).notes["note 1"] == (
        f"{name} ({value}) does nothing with alpha_method kl_symmetry; "
        f"it belongs to alpha_method {method}"
    )
    fitting = job(ROWS[:1], "fitting")
    fitting = replace(fitting, mixture=MixtureConfig(**options, **others))
    assert "note 1" not in generate(fitting).notes


def test_an_interrupt_between_a_write_and_its_count(fake_engine, job, monkeypatch):
    """Guards: a summary that names fewer records than are on the disk."""
    config = job(ROWS, "broken")
    count, seen = Ledger.add, []

    def interrupted(ledger, record):
        seen.append(record)
        interrupt(len(seen) == 3)
        count(ledger, record)

    monkeypatch.setattr(Ledger, "add", interrupted)
    summary = outcome(config)
    assert summary.status == "interrupted"
    assert summary.folder_records == len(records(config)) == 3


def test_an_interrupted_run_goes_on(fake_engine, job):
    """Guards: a record lost or made twice by Ctrl-C, and a resumed run that differs from an
    uninterrupted one.
    """
    whole, broken = (
        job(ROWS, "whole", samples_per_prompt=3),
        job(ROWS, "broken", samples_per_prompt=3),
    )
    generate(whole)
    calls = 0
    while True:
        limit = len(fake_engine.served) + 5
        fake_engine.fails = lambda request, limit=limit: interrupt(len(fake_engine.served) > limit)
        summary = outcome(broken)
        if summary.status == "complete":
            break
        calls += 1
        assert summary.status == "interrupted"
        assert summary.folder_records == 5 * calls
    assert calls > 5
    assert without_times(records(broken)) == without_times(records(whole))
    assert (
        len((Path(broken.run.output_dir) / "records" / "main.jsonl").read_bytes().splitlines())
        == 36
    )


def outcome(config):
    try:
        return generate(config)
    except Interrupted as stop:
        return stop.summary


def interrupt(now):
    if now:
        raise KeyboardInterrupt
    return ""


def test_an_engine_that_gives_up_loses_nothing(fake_engine, job):
    """Guards: records in a buffer that die with the engine."""

    def fail(request):
        if len(fake_engine.served) > 6:
            raise EngineError("out of memory")
        return ""

    fake_engine.fails = fail
    with pytest.raises(EngineError):
        generate(job(ROWS))
    assert len(records(job(ROWS))) == 6
    fake_engine.fails = lambda request: ""
    assert generate(job(ROWS)).generated == 6


def test_null_and_empty_prompts_fail_alone(fake_engine, job):
    """Guards: one bad row ending a run, or a record that hides it."""
    rows = [
        *ROWS[:2],
        {"problem": None, "n": 1},
        {"problem": "  "},
        {"other": "x"},
        {"problem": 5},
        *ROWS[2:4],
    ]
    config = job(rows)
    summary = generate(config)
    assert (summary.status, summary.good, summary.failed) == ("failed", 5, 3)
    errors = {
        record["row_index"]: record["error"]
        for record in records(config, failed=True).values()
        if record["error"]
    }
    assert errors == {
        2: "column 'problem' is null",
        3: "column 'problem' is empty",
        4: "the row has no column 'problem'; it has: other",
    }
    assert summary.errors["column 'problem' is null"] == 1


def test_failures_are_tried_again_until_they_are_not(fake_engine, job):
    """Guards: retrying for ever, never retrying, and losing count between calls."""
    fake_engine.fails = lambda request: "NaN logits" if request.id == bad else ""
    config = job(ROWS, max_attempts=2)
    bad = prompt_id(*[dry_run(config).first[0][1].student_text] * 2)
    first, second, third = generate(config), generate(config), generate(config)
    assert [s.failed for s in (first, second, third)] == [1, 1, 1]
    assert [s.generated for s in (first, second, third)] == [11, 0, 0]
    assert len(fake_engine.served) == 13
    assert records(config, failed=True)[bad, 0]["attempts"] == 2
    fake_engine.fails = lambda request: ""
    more = generate(replace(config, run=replace(config.run, max_attempts=3)))
    assert (more.status, more.generated) == ("complete", 1)
    assert records(config)[bad, 0]["attempts"] == 3


def test_duplicates_are_made_once_and_counted(fake_engine, job):
    """Guards: two records of one identity, or a count that never adds up."""
    summary = generate(job([*ROWS[:3], ROWS[0], {**ROWS[1], "answer": "other"}]))
    assert (summary.asked, summary.good, summary.duplicate_rows, summary.owed) == (3, 3, 2, 0)


@pytest.mark.parametrize("text", ODD_ROWS)
def test_odd_text_arrives_whole(fake_engine, job, text):
    """Guards: LaTeX braces read as a template, line separators splitting a record, text that is
    normalised.
    """
    config = job([{"problem": text, "answer": r"\frac{1}{2}"}])
    config = replace(config, prompt=PromptConfig(teacher_template="{problem}\nHint: {answer}"))
    assert generate(config).good == 1
    (record,) = records(config).values()
    assert text in record["student_prompt"]
    assert text + "\nHint: \\frac{1}{2}" in record["teacher_prompt"]
    assert record["row"]["problem"] == text


def test_a_lone_surrogate_fails_alone_and_survives(fake_engine, job):
    """Guards: UnicodeEncodeError on the way to the tokenizer or to the disk."""
    config = job([{"problem": "half \ud83d a character"}, *ROWS[:2]])
    assert (generate(config).good, generate(config).failed) == (2, 1)
    failed = [record for record in records(config, failed=True).values() if record["error"]]
    assert failed[0]["row"]["problem"] == "half \ud83d a character"
    assert "surrogate" in failed[0]["error"]


def test_a_template_with_an_unknown_column_fails_at_once(fake_engine, job):
    """Guards: a run of which every row fails."""
    config = replace(job(ROWS), prompt=PromptConfig(teacher_template="{problem} {solutoin}"))
    with pytest.raises(ConfigError, match="solutoin"):
        generate(config)
    assert not Path(config.run.output_dir).exists()


def test_a_bad_dataset_leaves_no_folder(fake_engine, job):
    """Guards: an empty run folder for every typing mistake."""
    config = job("missing.jsonl")
    with pytest.raises(DatasetError):
        generate(config)
    assert not Path(config.run.output_dir).exists()


def test_shards_together_are_the_whole(fake_engine, job, tmp_path):
    """Guards: records that depend on the shard they were made in; shards that cannot be put
    together.
    """
    whole, shared = job(ROWS, "whole"), job(ROWS, "shared")
    generate(whole)
    for part in range(3):
        generate(job(ROWS, "shared", data_slice=f"{part}::3"))
        generate(job(ROWS, f"part{part}", data_slice=f"{part}::3"))
    assert without_times(records(shared)) == without_times(records(whole))
    merge([tmp_path / f"part{part}" for part in range(3)], tmp_path / "merged")
    merged = replace(whole, run=RunConfig(output_dir=str(tmp_path / "merged"), max_new_tokens=8))
    assert without_times(records(merged)) == without_times(records(whole))
    with RunFolder(merged) as folder:
        assert len(folder.ledger.good) == 12


def test_a_dry_run_writes_nothing(job):
    """Guards: a dry run that starts a folder or loads weights."""
    config = job([ROWS[0], {"problem": None}, *ROWS[1:]])
    (first, rendered), (second, reason) = dry_run(config, shown=2).first
    assert (first, second) == (0, 1)
    assert "0+1=?" in rendered.student_text
    assert len(rendered.student_ids) > 5
    assert reason == "column 'problem' is null"
    assert not Path(config.run.output_dir).exists()


def test_few_prompts_are_held(fake_engine, job):
    """Guards: rendering the whole dataset before the first token is drawn."""
    fake_engine.window = 2
    pulled = []
    original = fake_engine.generate

    def watched(requests):
        def counted():
            for request in requests:
                pulled.append(request)
                yield request

        for done, completion in enumerate(original(counted()), start=1):
            assert len(pulled) <= done + 2
            yield completion

    fake_engine.generate = watched
    generate(job(ROWS))
    assert len(pulled) == 12


def test_an_overwritten_checkpoint_is_another_model(fake_engine, job, tmp_path):
    """Guards: half of a dataset made by a student that was trained further in the same folder."""
    student = tmp_path / "student"
    shutil.copytree(toy_pair.path("toy-student"), student)
    config = job(ROWS)
    config = replace(config, models=ModelConfig(student=str(student)))
    generate(replace(config, data=replace(config.data, num_examples=3)))
    weights = next(student.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    weights.write_bytes(data)
    with pytest.raises(RunFolderError, match="content hash of the student's folder"):
        generate(config)
    assert len(records(config)) == 3


def test_a_lost_request_is_no_success(fake_engine, job):
    """Guards: reporting a complete run when an engine forgot a request."""
    original = fake_engine.generate
    fake_engine.generate = lambda requests: list(original(requests))[:-1]
    with pytest.raises(EngineError, match="ended without 1 of its requests"):
        generate(job(ROWS))


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_a_baseline_has_the_same_records(fake_engine, job, mode):
    """Guards: a baseline without records, or records that do not say what they were drawn from."""
    config = job(ROWS)
    config = replace(config, run=replace(config.run, mode=mode))
    summary = generate(config)
    assert (summary.mode, summary.good) == (mode, 12)
    assert {record["mode"] for record in records(config).values()} == {mode}
    assert (
        json.loads(Path(config.run.output_dir, "config.json").read_text())["compared"]["mode"]
        == mode
    )
    assert f"drawn from the {mode} alone" in summary.notes["note 1"]


def test_another_mode_is_refused(fake_engine, job):
    """Guards: records of the student in a folder of q*, in a new folder or one of before modes."""
    config = job(ROWS)
    generate(config)
    baseline = replace(config, run=replace(config.run, mode="student"))
    with pytest.raises(RunFolderError, match="--mode: 'mixture' there, 'student' now"):
        generate(baseline)
    path = Path(config.run.output_dir, "config.json")
    document = json.loads(path.read_text())
    del document["compared"]["mode"]  # as version 0.1.0 wrote it
    document["hash"] = config_hash(document["compared"])
    path.write_text(json.dumps(document))
    assert generate(config).good == 12
    with pytest.raises(RunFolderError, match="--mode"):
        generate(baseline)


@pytest.mark.parametrize("student", ["toy-student", "toy-teacher"])
@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_one_model_alone_is_loaded_and_drawn_from(job, monkeypatch, mode, student):
    """Guards: a baseline that loads both models, or is drawn from the other one; and a model that
    is named in both roles."""
    loaded = []
    original = engine_module.load_model

    def load_model(path, models, role, *rest):
        loaded.append(role)
        return original(path, models, role, *rest)

    monkeypatch.setattr(engine_module, "load_model", load_model)
    config = replace(job(ROWS[:3]), models=ModelConfig(student=student))
    generate(replace(config, run=replace(config.run, mode=mode)))
    made = {key: record["completion_ids"] for key, record in records(config).items()}
    assert loaded == ([mode] if student == "toy-student" else loaded[:1])
    with load_engine(config.models) as engine:
        renderer = PromptRenderer(config.prompt, engine.vocabulary)
        for record in records(config).values():
            prompt = renderer.render(record["row"])
            request = Request(record["id"], 0, 0, prompt.student_ids, prompt.teacher_ids, 8)
            [done] = engine.view(mode=mode).generate([request])
            assert list(done.token_ids) == made[request.key]


def test_a_mode_that_the_engine_lacks_is_refused_before_loading(job, monkeypatch):
    """Guards: minutes of starting vLLM, which has no mode `student`, before the refusal."""
    monkeypatch.setattr(ToyEngine, "modes", frozenset({"mixture", "teacher"}))
    monkeypatch.setattr(ToyEngine, "load", None)
    config = replace(job(ROWS), engine=ToyOptions())
    with pytest.raises(ConfigError, match="toy has no mode 'student'; it has: mixture, teacher"):
        generate(replace(config, run=replace(config.run, mode="student")))


def test_hints_of_the_next_row(fake_engine, job):
    """Guards: a slice whose hints differ from those of the whole run, a hint in the record's row,
    and a hint that nobody is shown, without a word.
    """
    prompt = PromptConfig(chat_template=False, hint="other", teacher_template="{problem} {hint}")
    config = replace(job(ROWS), prompt=prompt)
    generate(config)
    expected = {f"{n}+1=? {(n + 1) % 12 + 1}" for n in range(12)}
    assert {r["teacher_prompt"] for r in load(config.run.output_dir)} == expected
    assert all(r["row"] == ROWS[r["row_index"]] for r in load(config.run.output_dir))
    sliced = replace(config, data=replace(config.data, data_slice="1::2"))
    assert generate(sliced).generated == 0
    assert dry_run(sliced).first[0][1].teacher_text == "1+1=? 3"
    alone = job(ROWS, name="alone")
    alone = replace(alone, prompt=prompt, run=replace(alone.run, mode="student"))
    assert "hint other does nothing" in " ".join(generate(alone).notes.values())
