"""Lists of stages: the built-in recipes, and YAML files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from optimal_sampling.cli import main, parse_generate
from optimal_sampling.config import MixtureConfig, Stage
from optimal_sampling.errors import ConfigError
from optimal_sampling.generate.recipes import escalate, read_stages

DOCS = Path(__file__).parents[2] / "docs" / "escalation.md"
TOY = ["--engine=toy", "--num-examples=4", "--max-new-tokens=8", "--verify=synthetic"]


@pytest.fixture
def stages_file(tmp_path):
    def write(text):
        path = tmp_path / "stages.yaml"
        path.write_text(text)
        return path

    return write


def test_the_recipe():
    """Guards: a recipe whose stages are others than the documentation says."""
    cool = MixtureConfig(temperature=0.7)
    own, veto, teacher = escalate(cool, 2)
    assert own == Stage("own", mode="student", tries=2, mixture=cool)
    assert veto == Stage("veto", mixture=replace(cool, alpha_method="veto"))
    assert teacher == Stage("teacher", mode="teacher", mixture=replace(cool, top_k=1))
    assert escalate()[0].tries == 4
    assert escalate(privileged=True)[2].hint == "right"
    with pytest.raises(ConfigError, match="the recipe has a stage `veto` in its place"):
        escalate(MixtureConfig(alpha_method="mirror"))


def test_the_file_of_the_documentation_runs(tmp_path, stages_file):
    """Guards: an example that is out of date, and a file whose stages are not those of the run."""
    [text] = re.findall("```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    path = stages_file(text)
    stages = read_stages(path, MixtureConfig(temperature=0.9))
    assert [stage.name for stage in stages] == re.findall("- name: (.*)", text)
    assert {stage.mixture.temperature for stage in stages} == {0.9, 0.5}
    run = str(tmp_path / "run")
    assert main(["generate", *TOY, f"--output-dir={run}", f"--stages={path}"]) == 0
    assert main(["status", run]) == 0


def test_what_a_stage_does_not_say_is_as_on_the_command_line(stages_file):
    """Guards: a temperature of the command line that holds in no stage."""
    path = stages_file("- name: own\n  mode: student\n- name: cool\n  temperature: 0.5\n")
    options = parse_generate([*TOY, f"--stages={path}", "--temperature=0.7", "--top-p=0.9"])
    own, cool = options.generate_config().stages
    assert own == Stage("own", mode="student", mixture=MixtureConfig(temperature=0.7, top_p=0.9))
    assert cool.mixture == MixtureConfig(temperature=0.5, top_p=0.9)


def test_a_stage_may_take_over_another_ones_options(stages_file):
    """Guards: YAML's merge key, refused as a tag that nobody knows."""
    path = stages_file(
        "- &own {name: own, mode: student, temperature: 0.5}\n- {<<: *own, name: more, tries: 2}"
    )
    own, more = read_stages(path, MixtureConfig())
    assert (more.name, more.tries) == ("more", 2)
    assert (more.mode, more.mixture) == (own.mode, own.mixture)


def test_a_file_of_options_may_name_the_stages(tmp_path, stages_file):
    """Guards: `recipe` and `stages` that a file of options does not know."""
    path = tmp_path / "run.yaml"
    path.write_text("recipe: escalate\nown_tries: 3\nverify: synthetic\n")
    stages = parse_generate(["--config", str(path)]).generate_config().stages
    assert stages == escalate(own_tries=3)
    path.write_text(f"stages: {stages_file('- name: own')}\nverify: synthetic\n")
    assert parse_generate(["--config", str(path)]).generate_config().stages == (Stage("own"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold a list of stages"),
        ("name: own", "must hold a list of stages"),
        ("- own", "stage 1 has no name, got 'own'"),
        ("- mode: student", "stage 1 has no name"),
        ("- name: [", "is not YAML"),
        ("- name: a\n  temprature: 1", "unknown option 'temprature'; did you mean 'temperature'"),
        ("- name: a\n  seed: 1", "stage 'a': unknown option 'seed'; a stage has name, mode"),
        ("- name: a\n  tries: 0", "stage 'a': tries must be at least 1, got 0"),
        ("- name: a\n  tries: two", "stage 'a': tries must be a whole number, got 'two'"),
        ("- name: a\n  mode: pupil", "stage 'a': mode must be one of mixture, student"),
        ("- name: a\n  hint: yes", "stage 'a': hint must be one of"),
        ("- name: 4", "stage 4: name must be a text, got 4"),
        ("- name: a\n  tries: 2\n  tries: 3", "'tries' is given twice"),
        ("- name: a\n  top_k: 1\n  top-k: 2", "stage 'a': top_k is given twice"),
        ("- name: a\n  alpha_method: veto\n  alpha_min: 0.2", "alpha_min .0.2. does nothing"),
        ("- name: a\n  alpha_min: 0.9\n  alpha_max: 0.1", "stage 'a': alpha_min .* larger"),
        ("- name: a\n  tries: 3\n  top_k: 1", "all 3 tries are the same text"),
    ],
)
def test_files_that_make_no_sense(stages_file, text, reason):
    """Guards: a traceback, an option that is ignored, a message that does not name the stage."""
    with pytest.raises(ConfigError, match=reason):
        read_stages(stages_file(text), MixtureConfig())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--recipe=escalate"], "name a grader: --verify math"),
        (["--stages=no.yaml"], "cannot read --stages no.yaml: No such file"),
        (["--recipe=escalate", "--stages=no.yaml"], "give one of them"),
        (["--own-tries=2"], "--own-tries belongs to --recipe"),
        (["--recipe=escalate", "--verify=synthetic", "--own-tries=0"], "tries must be at least 1"),
        (["--recipe=escalate", "--verify=synthetic", "--mode=student"], "each stage has its own"),
        (["--recipe=escalate", "--verify=synthetic", "--alpha-min=0.2"], "which has no bounds"),
    ],
)
def test_command_lines_that_make_no_sense(capsys, options, reason):
    """Guards: a run that begins although its stages cannot be what was meant."""
    assert main(["generate", "--engine=toy", *options]) == 2
    assert reason in capsys.readouterr().err
