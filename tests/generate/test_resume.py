"""Run folders of version 0.1.0, whose `config.json` was written before engines had options of their
own.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

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

NEWER = ("mode", "ess_student", "ess_teacher", "curvature", "alpha_weighted")
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
