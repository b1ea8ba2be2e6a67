"""Training in processes of its own: signals, and several processes at once."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset
from safetensors.torch import load_file

from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.train import SftOptions
from optimal_sampling.train.checkpoints import find_checkpoints
from optimal_sampling.train.launch import launch_command, printable

COMMAND = [sys.executable, "-m", "optimal_sampling", "sft"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"prompt": f"<|user|>{row['problem']}<|end|><|assistant|>", "completion": row["solution"]}
        for row in synthetic_rows(1, 64)
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def arguments(data, folder, *more):
    given = ["--dataset_name", data, "--output_dir", folder, "--learning_rate", "1e-3"]
    return [str(each) for each in (*given, "--check_prompts", 0, *more)]


def history(folder, name="loss"):
    path = find_checkpoints(folder).last / "trainer_state.json"
    logs = json.loads(path.read_text())["log_history"]
    return [entry[name] for entry in logs if name in entry]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on(data, tmp_path, number):
    """Guards: Ctrl-C that loses the updates since the last checkpoint, and advice that does not
    work."""
    given = arguments(data, tmp_path / "a model", "--num_train_epochs", 6, "--save_steps", 1000)
    process = subprocess.Popen(
        [*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "updates, loss" not in (line := process.stderr.readline()):
        assert line, "ended before the first update"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    last = find_checkpoints(tmp_path / "a model").last
    assert f"interrupted; {last} is safe. To go on:" in said
    advice = shlex.split(said.splitlines()[-1])
    assert advice == [*COMMAND, *given]
    again = subprocess.run(advice, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on from {last}" in again.stderr
    assert len(history(tmp_path / "a model")) == 48


FULL_DISK = """
    import resource, signal, sys
    from optimal_sampling.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
    sys.exit(main(["sft", *sys.argv[1:]]))
"""


def test_a_full_disk(data, tmp_path):
    """Guards: a traceback for a checkpoint that does not fit, and training that goes on from it.

    The weights fit into the limit, the optimizer's state does not.
    """
    given = arguments(data, tmp_path / "model", "--max_steps", 2, "--save_steps", 1)
    code = [sys.executable, "-c", textwrap.dedent(FULL_DISK)]
    full = subprocess.run([*code, *given], capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "Free some space and run the same command again" in full.stderr
    assert find_checkpoints(tmp_path / "model").last is None
    again = subprocess.run([*COMMAND, *given], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-1 is skipped" in again.stderr
    assert len(history(tmp_path / "model")) == 2


def test_the_command_for_several_processes_is_the_typed_one():
    """Guards: a printed command that trains another model, or in one process."""
    given = ["--dataset_name", "some data", "--num_processes", "2"]
    options = SftOptions(dataset_name="some data", num_processes=2)
    typed = "torchrun --standalone --nproc-per-node=2 -m optimal_sampling sft"
    assert printable(launch_command(options, given)) == f"{typed} {shlex.join(given)}"
    assert launch_command(SftOptions(dataset_name="some data", num_processes=1), given) == []


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [[], ["--fsdp", "full_shard"]], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(data, tmp_path, sharding):
    """Guards: replicas that see the same examples, a loss per process instead of per token, and
    sharding that Accelerate leaves out on a CPU."""
    steps = ["--max_steps", "6", "--save_steps", "3", "--per_device_train_batch_size"]
    one = [*COMMAND, *arguments(data, tmp_path / "one", *steps, 8)]
    subprocess.run(one, check=True, capture_output=True)
    two = arguments(data, tmp_path / "two", *steps, 4, *sharding, "--num_processes", 2)
    done = subprocess.run([*COMMAND, *two], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on CPU" in done.stderr
    assert history(tmp_path / "two") == pytest.approx(history(tmp_path / "one"), rel=1e-4)
    norms = [history(tmp_path / name, "grad_norm") for name in ("one", "two")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    whole, parts = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((whole[name] - parts[name]).abs().max() < 1e-5 for name in whole)
    is_sharded = (tmp_path / "two" / "checkpoint-6" / "pytorch_model_fsdp.bin").exists()
    assert is_sharded == bool(sharding)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [[], ["--fsdp", "full_shard"]], ids=["ddp", "fsdp"])
def test_two_processes_are_killed_and_go_on(data, tmp_path, sharding):
    """Guards: a checkpoint of several processes that cannot be loaded again; and the command that
    was printed."""
    more = ["--num_train_epochs", 10, "--save_steps", 5, *sharding, "--num_processes", 2]
    subprocess.run(
        [*COMMAND, *arguments(data, tmp_path / "whole", *more)], check=True, capture_output=True
    )
    given = arguments(data, tmp_path / "killed", *more)
    process = subprocess.Popen(
        [*COMMAND, *given], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    printed = process.stderr.readline().removeprefix("starting: ")
    while find_checkpoints(tmp_path / "killed").last is None:
        assert process.poll() is None
        time.sleep(0.05)
    torchrun = psutil.Process(process.pid)
    for each in (torchrun, *torchrun.children(recursive=True)):
        each.kill()
    process.communicate()
    command = shlex.split(printed)
    assert command[0] == "torchrun"
    again = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all((whole[name] == killed[name]).all() for name in whole)


@pytest.mark.slow
def test_two_interrupted_processes_save_once(data, tmp_path):
    """Guards: processes that stop after different updates, which never meet again; and a signal
    that torchrun passes on, taken for a second one."""
    given = arguments(data, tmp_path / "two", "--num_train_epochs", 40, "--save_steps", 1000)
    given += ["--num_processes", "2"]
    process = subprocess.Popen(
        [*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "updates, loss" not in (line := process.stderr.readline()):
        assert line, "ended before the first update"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=200)
    assert process.returncode != 0
    last = find_checkpoints(tmp_path / "two").last
    assert f"interrupted; {last} is safe. To go on:\n  torchrun --standalone" in said
    assert said.count("interrupted;") == 1
