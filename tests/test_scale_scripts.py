"""The scripts for Slurm and SSH, with stand-ins for `srun`, `scontrol`, `ssh` and `rsync`."""

import os
import subprocess
from pathlib import Path

import pytest

from optimal_sampling.cli import main
from optimal_sampling.records import load

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ("slurm/array.sh", "slurm/ray.sh", "ssh.sh")
OPTIONS = ("--engine", "toy", "--num-examples", "6", "--max-new-tokens", "4")

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >requeued; fi',
    "optimal-sampling": 'line=$(printf "%q " "$@"); echo "$line" >>called',
    "ssh": 'shift 2; exec bash -c "$*"',
    "rsync": 'echo "$@" >>copied',
}
"""Programs in place of the real ones, which note how they were called."""


def run_script(folder, name, *arguments, stand_ins=STAND_INS, **variables):
    """Run a script of `examples/` in a folder, with programs of its own."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for program, text in stand_ins.items():
        (programs / program).write_text(f"#!/bin/bash\n{text}\n")
        (programs / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables}
    command = ["bash", str(EXAMPLES / name), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def called(folder):
    """How `optimal-sampling` was called, one list of arguments per call."""
    script = "printf '%s\\0' {}"
    lines = (folder / "called").read_text().splitlines()
    texts = [
        subprocess.check_output(["bash", "-c", script.format(line)], text=True) for line in lines
    ]
    return [text.split("\0")[:-1] for text in texts]


def task(number, of, **more):
    """What Slurm sets for a task of an array."""
    numbers = {"SLURM_ARRAY_TASK_ID": number, "SLURM_ARRAY_TASK_COUNT": of}
    return {
        name: str(value) for name, value in (numbers | {"SLURM_ARRAY_JOB_ID": 7} | more).items()
    }


def completions(folder):
    """Completions of a run, by row."""
    return sorted((record["row_index"], record["completion_ids"]) for record in load(folder))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_scripts(name):
    """Guards: a syntax error that shows when the job starts, hours later."""
    path = EXAMPLES / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_the_tasks_of_an_array_make_one_run(tmp_path, monkeypatch):
    """Guards: slices that overlap or leave rows out, or folders that cannot be merged."""
    for number in range(2):
        done = run_script(tmp_path, "slurm/array.sh", *OPTIONS, **task(number, 2), RUN="run")
        assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    for call in called(tmp_path):
        assert main(call) == 0
    assert main(["merge", "run/shard-0", "run/shard-1", "--output-dir", "all"]) == 0
    assert main(["generate", *OPTIONS, "--output-dir", "plain"]) == 0
    assert len(completions("all")) == 6
    assert completions("all") == completions("plain")


@pytest.mark.parametrize(("code", "is_requeued"), [(130, True), (0, False), (3, False), (2, False)])
def test_an_interrupted_task_is_queued_again(tmp_path, code, is_requeued):
    """Guards: a job that ends at its time limit for good, or one with a mistake that never ends."""
    stand_ins = STAND_INS | {"optimal-sampling": f"exit {code}"}
    done = run_script(tmp_path, "slurm/array.sh", stand_ins=stand_ins, **task(3, 8))
    assert done.returncode == code
    requeued = tmp_path / "requeued"
    assert requeued.exists() == is_requeued
    if is_requeued:
        assert requeued.read_text() == "requeue 7_3\n"


def test_a_task_that_is_submitted_alone_must_say_of_how_many(tmp_path):
    """Guards: slice 3::1, which is nearly all of the dataset, in the folder of slice 3::8."""
    done = run_script(tmp_path, "slurm/array.sh", **task(3, 1))
    assert done.returncode == 2
    assert "SHARDS=8" in done.stderr
    assert not (tmp_path / "called").exists()
    done = run_script(tmp_path, "slurm/array.sh", **task(3, 1, SHARDS=8))
    assert done.returncode == 0
    assert called(tmp_path)[0][1:3] == ["--data-slice", "3::8"]


def test_every_machine_makes_its_slice_by_ssh(tmp_path):
    """Guards: options that lose their quotes on the way, shards that are not brought together."""
    options = ("--teacher-template", '{problem}\n\nIt\'s "quoted": $HOME')
    done = run_script(tmp_path, "ssh.sh", *options, HOSTS="a b", RUN="my run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "my run"
    *generated, merged = called(tmp_path)
    assert sorted(generated) == [
        ["generate", *options, "--data-slice", f"{i}::2", "--output-dir", f"{run}/shard-{i}"]
        for i in range(2)
    ]
    assert merged == ["merge", str(run / "shard-*"), "--output-dir", str(run / "merged")]
    copied = (tmp_path / "copied").read_text().splitlines()
    paths = [f"{run}/shard-{i}".replace(" ", "\\ ") for i in range(2)]
    assert copied == [f"-a {host}:{path} {run}/" for host, path in zip("ab", paths, strict=True)]


def test_a_machine_that_fails_is_named(tmp_path):
    """Guards: half of a dataset merged as if it were whole."""
    stand_ins = STAND_INS | {"ssh": 'echo "cannot load"; [ "$2" = good ]'}
    done = run_script(tmp_path, "ssh.sh", stand_ins=stand_ins, HOSTS="good bad", RUN="run")
    assert done.returncode == 1
    assert "bad: exit code 1" in done.stderr
    assert "good: exit code" not in done.stderr
    assert not (tmp_path / "run" / "merged").exists()
    assert (tmp_path / "run" / "bad.log").read_text() == "cannot load\n"


@pytest.mark.parametrize(("code", "is_requeued"), [(143, True), (130, True), (3, False)])
def test_a_ray_cluster_is_made_for_the_job(tmp_path, code, is_requeued):
    """Guards: another address than the head's, telemetry, or a cluster that anyone may use."""
    stand_ins = STAND_INS | {"ray": f'echo "$@" >ray; env | grep ^RAY_ >variables; exit {code}'}
    job = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7"}
    done = run_script(tmp_path, "slurm/ray.sh", "--config", "r.yaml", stand_ins=stand_ins, **job)
    assert done.returncode == code
    start, _, command = (tmp_path / "ray").read_text().strip().partition(" -- ")
    assert start.startswith("symmetric-run --address first:6379")
    assert command == "optimal-sampling generate --config r.yaml --ray first:6379"
    lines = (tmp_path / "variables").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in lines)
    assert variables["RAY_AUTH_MODE"] == "token"
    assert len(variables["RAY_AUTH_TOKEN"]) == 64
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert (tmp_path / "requeued").exists() == is_requeued
