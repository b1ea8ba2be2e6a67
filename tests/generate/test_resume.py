"""Run folders of version 0.1.0, whose `config.json` was written before engines had options of their
own.
"""

import json
import os
import shutil
import time
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path

import pytest

from optimal_sampling import toy_pair
from optimal_sampling.config import (
    DataConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    ToyOptions,
)
from optimal_sampling.errors import RunFolderError
from optimal_sampling.generate import generate
from optimal_sampling.records import RunFolder, load

NEWER = ("completion_raw", "mode", "ess_student", "ess_teacher", "curvature", "alpha_weighted")
NEWER += ("chernoff", "log_p_student", "nll_student", "vetoed", "log_p_student_restricted")
NEWER += ("kl_student_restricted", "kl_teacher_restricted")
NEWER += ("granularity", "token_vetoed")
"""Fields that version 0.1.0 did not write."""

FOLDERS = Path(__file__).parent / "data" / "run_folders"


def config_of(run, engine):
    return GenerateConfig(
        models=ModelConfig(device="cpu"),
        mixture=MixtureConfig(alpha_min=0.2),
        data=DataConfig(num_examples=5),
        prompt=PromptConfig(teacher_template="{problem} ({answer})"),
        run=RunConfig(output_dir=str(run), max_new_tokens=12),
        engine=engine,
    )


def lines(path):
    """Records by id, without the times, and so without the checksums, and without NEWER fields."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["id"]: record for record in records}
    assert len(found) == len(records)
    for record in records:
        for name in {"seconds", "checksum", *NEWER} & record.keys():
            del record[name]
    return found


@pytest.mark.parametrize("engine", [LocalOptions(batch_size=3), ToyOptions()])
def test_a_folder_of_an_earlier_version_resumes(tmp_path, engine):
    """Guards: a folder that is refused or begun again by a newer version, or goes on with other
    draws.
    """
    run = shutil.copytree(FOLDERS / engine.name, tmp_path / "run")
    before = (run / "records" / "main.jsonl").read_bytes()
    summary = generate(config_of(run, engine))
    after = (run / "records" / "main.jsonl").read_bytes()
    assert (summary.already_good, summary.generated, summary.status) == (3, 2, "complete")
    assert after.startswith(before)
    whole = lines(FOLDERS / f"{engine.name}-whole.jsonl")
    assert lines(run / "records" / "main.jsonl") == whole
    for changed in (MixtureConfig(alpha_min=0.3), MixtureConfig(alpha_min=0.2, top_k=5)):
        with pytest.raises(RunFolderError, match="was made with other options"):
            generate(replace(config_of(run, engine), mixture=changed))


def test_another_engine_does_not_resume(tmp_path):
    """Guards: half of a folder drawn by another engine."""
    run = shutil.copytree(FOLDERS / "local", tmp_path / "run")
    with pytest.raises(RunFolderError, match="--engine: 'local' there, 'toy' now"):
        generate(config_of(run, ToyOptions()))
    local = config_of(run, LocalOptions(batch_invariant=False))
    with pytest.raises(RunFolderError, match="--batch-invariant: True there, False now"):
        generate(local)


def dated_config(tmp_path, name):
    """A run whose chat template prints the date, to the second."""
    model = tmp_path / "model"
    if not model.exists():
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(toy_pair.path("toy-student"), model, ignore=ignored)
        template = model / "chat_template.jinja"
        dated = "{{- strftime_now('%d %b %Y %H:%M:%S') -}}" + template.read_text()
        template.write_text(dated)
    config = config_of(tmp_path / name, ToyOptions())
    return replace(config, models=ModelConfig(student=str(model), teacher=str(model)))


def prompts(config):
    return [record["student_prompt"] for record in load(config.run.output_dir)]


def test_prompts_with_a_date_are_made_once(tmp_path):
    """Guards: a template that prints the date, which gives every prompt a new id at every call."""
    config = dated_config(tmp_path, "run")
    assert generate(config).generated == 5
    time.sleep(1.1)  # past the next second
    summary = generate(config)
    assert (summary.already_good, summary.generated) == (5, 0)
    assert all(date.today().strftime("%d %b %Y 00:00:00") in each for each in prompts(config))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_resumed_run_prints_the_date_of_its_first_call(tmp_path, recorded):
    """Guards: half of a folder's prompts with the date of another day; in folders of earlier
    versions, which do not say their date, the first half again.
    """
    first = dated_config(tmp_path, "first")
    generate(first)
    config = dated_config(tmp_path, "resumed")
    facts = {"template_date": "2020-02-03"} if recorded else {}
    with RunFolder(config, facts) as folder:
        folder.add(next(load(first.run.output_dir)))
    if not recorded:
        day = datetime(2020, 2, 3, 11).timestamp()
        os.utime(Path(config.run.output_dir) / "config.json", (day, day))
    generate(config)
    assert ["03 Feb 2020" in each for each in prompts(config)] == [False] + [True] * 5
