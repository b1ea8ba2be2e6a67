"""The command `servers`: what it prints, what it starts, and that it leaves no process behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from optimal_sampling.cli import main
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.engines.servers.launch import ServersCommand, server_processes
from optimal_sampling.engines.servers.server_process import ServerProcess, check_port, free_port
from optimal_sampling.errors import ConfigError, EngineError
from tests.engines.servers.serving import SIZE, fake, run, served

SERVER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
from tests.engines.servers.serving import fake
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
with FakeServer(FakeModel(random_tables(12)[0]), int(sys.argv[1])):
    time.sleep(600)
"""
"""A server with a child, as vLLM's has."""


def quiet(name, waited):
    pass


def test_it_prints_two_commands_and_how_to_use_them(capsys):
    """Guards: commands that do not run as printed, and servers that others can reach."""
    assert main(["servers", "--max-logprobs", "-1", "--vllm", "max-num-seqs=8"]) == 0
    printed = capsys.readouterr().out
    for role, port in (("student", 9000), ("teacher", 9001)):
        (command,) = [part for part in printed.split("\n\n") if f"the {role}'s server" in part]
        words = command.replace("\\\n", " ").split()
        assert words[words.index("--model") + 1].endswith(f"toy_pair/{role}")
        for option in (
            f"--port {port}",
            "--host 127.0.0.1",
            "--max-logprobs -1",
            "--max-num-seqs 8",
        ):
            assert option in " ".join(words)
    assert "--student-url http://127.0.0.1:9000" in printed


def test_options_that_cannot_work_are_refused(monkeypatch, capsys):
    """Guards: two servers at one port, and a server without a key that others can reach."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="port 9000"):
        ServersCommand(teacher_port=9000)
    with pytest.raises(ConfigError, match="max_logprobs"):
        ServersCommand(max_logprobs=0)
    assert main(["servers", "--host", "0.0.0.0"]) == 2
    assert main(["servers", "--host", "0.0.0.0", "--fake"]) == 2
    assert "VLLM_API_KEY" in capsys.readouterr().err
    assert main(["servers", "--student", "toy-studnet"]) == 2
    assert "did you mean 'toy-student'" in capsys.readouterr().err


@pytest.mark.parametrize(("teacher", "student"), [(14, 4), (1, 1), (100, 1)])
def test_memory_is_shared_by_size(teacher, student, tmp_path, monkeypatch):
    """Guards: two servers on one GPU that both take 90% of it."""
    from optimal_sampling.engines.servers import launch

    folders = {"student": tmp_path / "s", "teacher": tmp_path / "t"}
    for role, size in (("student", student), ("teacher", teacher)):
        folders[role].mkdir()
        (folders[role] / "model.safetensors").write_bytes(b"\0" * size * 1000)
    shares = launch._memory_shares({role: str(folder) for role, folder in folders.items()})
    values = {role: float(share) for role, share in shares.items()}
    assert sum(values.values()) <= 0.86
    assert 0.15 <= values["student"] <= values["teacher"]


def started(tmp_path, *command):
    port = free_port()
    words = [sys.executable, "-c", *command, str(port)]
    return ServerProcess("student", words, f"http://127.0.0.1:{port}", tmp_path / "log")


def wait_until_ended(pid):
    """A process that was sent a signal that ends it needs a moment for it."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != "zombie":
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_started_server_ends_with_its_children(tmp_path):
    """Guards: an engine that keeps the GPU after its server was ended."""

    async def ask(url):
        async with served(url) as model:
            assert (await model.next_tokens([1], 3)).listed == 3

    with started(tmp_path, SERVER) as process:
        process.start().wait(60, quiet)
        pid = process.process.pid
        child = int(process.log.read_text().split()[0])
        run(ask, process.url)
    assert not psutil.pid_exists(pid)
    wait_until_ended(child)


def test_a_server_ends_when_its_starter_is_killed(tmp_path):
    """Guards: a server that goes on after `kill -9` of the command that started it."""
    port = free_port()
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from optimal_sampling.engines.servers.server_process import ServerProcess\n"
        "words = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"process = ServerProcess('student', words, 'http://127.0.0.1:{port}', Path(sys.argv[1]))\n"
        "print(process.start().process.pid, flush=True)\ntime.sleep(600)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    with starter:
        pid = int(starter.stdout.readline())
        starter.kill()
    wait_until_ended(pid)


INTERRUPTED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from optimal_sampling.engines.servers.server_process import ServerProcess
from optimal_sampling.interrupts import signals_interrupt

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # before anybody knows of the process

subprocess.Popen = Popen
words = [sys.executable, "-c", "import time; time.sleep(600)"]
try:
    with signals_interrupt(str), ServerProcess("student", words, "", Path(sys.argv[1])) as process:
        process.start()
        time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(600)
"""


def test_a_signal_while_a_server_is_started_leaves_none(tmp_path):
    """Guards: a server that nobody ends, because the signal came before its number was known; and
    one that has signals blocked, as they are while it is started."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        try:
            pid = int(starter.stdout.readline())
            begin = time.monotonic()
            assert starter.stdout.readline() == "interrupted\n"
            assert time.monotonic() - begin < 10  # less than what SIGTERM is given to be obeyed
            assert not psutil.pid_exists(pid)
        finally:
            starter.kill()


def test_a_server_that_ends_says_why(tmp_path):
    """Guards: half an hour of waiting for a server that has long ended."""
    process = started(tmp_path, "raise SystemExit('no memory is left')")
    with process, pytest.raises(EngineError, match="no memory is left"):
        process.start().wait(60, quiet)


def test_a_host_may_be_a_number_of_ipv6(capsys):
    """Guards: `http://::1:9000`, which is no address, and a fake server that cannot start."""
    assert main(["servers", "--host", "::1"]) == 0
    assert "--student-url http://[::1]:9000" in capsys.readouterr().out.replace("'", "")
    try:
        server = FakeServer(FakeModel(random_tables(SIZE)[0]), host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")

    async def ask():
        async with served(server.url) as model:
            assert (await model.next_tokens([3], 4)).listed == 4

    with server:
        run(ask)
        with pytest.raises(ConfigError, match="--student-port"):
            check_port("::1", server.port, "--student-port")


def test_a_port_in_use_is_named():
    """Guards: two servers at one address, one of which nobody reaches."""
    with fake() as server, pytest.raises(ConfigError, match="--student-port"):
        check_port("127.0.0.1", server.port, "--student-port")


def test_fake_servers_run_until_interrupted(tmp_path):
    """Guards: Ctrl-C that prints a traceback, or leaves a server."""
    ports = [free_port(), free_port()]
    words = ["servers", "--fake", "--student-port", str(ports[0]), "--teacher-port", str(ports[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "optimal_sampling", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        assert "both fake servers answer" in process.stdout.readline()

        async def ask():
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            async with served(urls[0], vocab_size=264) as student:
                assert student.facts.stop_ids == {257}
                assert student.facts.name == "toy-student"

        run(ask)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "no server is left" in printed
        assert "Traceback" not in printed


def test_commands_name_the_models_as_given():
    """Guards: a server whose model has the path of a folder as its name."""
    for process in server_processes(ServersCommand()):
        words = [*process.command]
        assert words[words.index("--served-model-name") + 1] == f"toy-{process.name}"
