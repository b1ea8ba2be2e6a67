"""Revisions of models from the hub. (A stand-in for the hub: tests have no network.)"""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest

from optimal_sampling import toy_pair
from optimal_sampling.config import GenerateConfig, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.errors import ModelError
from optimal_sampling.generate.fingerprint import model_facts
from optimal_sampling.records.run_folder import compared, flat
from optimal_sampling.vocabulary import Vocabulary, resolve_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub model `owner/pair`, whose revision v1 is the toy student and v2 the toy teacher."""
    asked = []

    def snapshot_download(name, revision, ignore_patterns):
        asked.append((name, revision, "*.safetensors" not in ignore_patterns))
        role = {"v1": "toy-student", "v2": "toy-teacher"}.get(revision)
        if name != "owner/pair" or role is None:
            raise OSError("404\nRevision Not Found")
        return str(shutil.copytree(toy_pair.path(role), tmp_path / revision, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost")  # a host that exists
    return asked


PAIR = ModelConfig(
    student="owner/pair", student_revision="v1", teacher="owner/pair", teacher_revision="v2"
)


def test_both_models_are_of_their_revisions(hub):
    """Guards: `--student-revision` read for the tokenizer and not for the weights, and two
    revisions of one name loaded as one model.
    """
    vocabulary = Vocabulary.load(PAIR.student, PAIR.teacher, revisions=PAIR.revisions)
    assert hub == [("owner/pair", "v1", False), ("owner/pair", "v2", False)]
    assert vocabulary.student_tokenizer.name_or_path.endswith("v1")
    assert vocabulary.teacher_tokenizer.name_or_path.endswith("v2")
    engine = LocalEngine.load(PAIR, MixtureConfig(), LocalOptions(), vocabulary)
    own = ModelConfig()
    toy = Vocabulary.load(own.student, own.teacher)
    expected = LocalEngine.load(own, MixtureConfig(), LocalOptions(), toy)
    for role in ("student", "teacher"):
        found, wanted = (each.pair.runners[role].model.state_dict() for each in (engine, expected))
        assert all(found[name].equal(wanted[name]) for name in wanted)
    assert hub[2:] == [("owner/pair", "v1", True), ("owner/pair", "v2", True)]
    assert "student_files" not in model_facts(PAIR)


def test_a_revision_that_does_not_exist(hub):
    """Guards: a traceback, or another revision."""
    with pytest.raises(
        ModelError, match=r"cannot download revision 'v3' of model 'owner/pair': 404"
    ):
        resolve_model("owner/pair", "v3")


def test_a_folder_has_no_revision(hub, tmp_path):
    """Guards: an option that is ignored without a word."""
    folder = shutil.copytree(toy_pair.path("toy-student"), tmp_path / "model")
    for name in (str(folder), "toy-student"):
        with pytest.raises(ModelError, match="is a folder, which has no revision 'v1'"):
            resolve_model(name, "v1")
    assert not hub


def test_another_revision_is_another_run():
    """Guards: a folder that goes on with other weights under the same name."""
    options = [compared(flat(GenerateConfig(models=each))) for each in (PAIR, ModelConfig())]
    assert options[0]["student_revision"] == "v1"
    assert options[1]["student_revision"] is None
