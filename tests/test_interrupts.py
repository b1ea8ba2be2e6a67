"""Ctrl-C and SIGTERM of the command, from its first import on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimal_sampling.engines.servers.server_process import free_port
from optimal_sampling.interrupts import _is_command

IGNORED = """
import os, signal, sys, time, weakref
from optimal_sampling import cli

class Thing:
    pass

def work(arguments):
    thing = Thing()
    {signal}
    time.sleep(60)
    return 0

cli.COMMANDS["wait"] = ("", work)
sys.exit(cli.main(["wait"]))
"""
BY_CALLBACK = """
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing"""
BY_AN_IMPORT = """
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("numpy._core.multiarray failed to import")"""

CATCHES_ALL = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    pass
"""
TAKES_LONG = """
import os, signal, time
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""
IN_AN_IMPORT = """
    import module_that_catches_all"""
IN_A_LONG_IMPORT = """
    import module_that_takes_long"""
IN_A_STRING = """
    exec("os.kill(os.getpid(), signal.SIGTERM)")"""


def ended(process):
    """What a process has said, after it has ended with the exit code of an interrupt."""
    with process:
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    return said


def without_ignored_signals():
    """In the background of a shell these tests ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_handler(process, number):
    """Wait until the process has a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status")
    while True:
        caught = next(line for line in status.read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) >> (number - 1) & 1:
            return
        time.sleep(0.001)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
def test_a_signal_while_modules_are_imported(number, delay):
    """Guards: a traceback of the module that was being imported, or a signal that is lost."""
    ports = ["--student-port", str(free_port()), "--teacher-port", str(free_port())]
    words = [sys.executable, "-m", "optimal_sampling", "servers", "--fake", *ports]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=without_ignored_signals
    )
    wait_for_handler(process, signal.SIGTERM)
    time.sleep(delay)
    process.send_signal(number)
    said = ended(process)
    assert "optimal-sampling: interrupted; " in said
    if not delay:
        assert said.strip() == "optimal-sampling: interrupted; nothing had been started"


@pytest.mark.parametrize(
    "where", [BY_CALLBACK, BY_AN_IMPORT, IN_AN_IMPORT, IN_A_LONG_IMPORT, IN_A_STRING]
)
def test_a_signal_ends_the_command_wherever_it_comes(where, tmp_path):
    """Guards: a command that goes on after SIGTERM, because the KeyboardInterrupt was raised in a
    callback of a weak reference, as every import has, in an extension module, or where an import
    catches all errors; an abort of an extension module; and the exit code -2, because it was raised
    in code that was a string."""
    (tmp_path / "module_that_catches_all.py").write_text(CATCHES_ALL)
    (tmp_path / "module_that_takes_long.py").write_text(TAKES_LONG)
    (tmp_path / "command.py").write_text(IGNORED.format(signal=where.strip()))
    words = [sys.executable, "-m", "command"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    said = ended(process)
    assert "interrupted; nothing had been started" in said or where == IN_A_LONG_IMPORT
    assert "optimal-sampling: interrupted; " in said


@pytest.mark.parametrize(
    ("argument", "words", "expected"),
    [
        ("/bin/optimal-sampling", ["python", "/bin/optimal-sampling", "demo"], True),
        ("/bin/optimal-sampling", ["python", "-P", "/bin/optimal-sampling"], True),
        ("-m", ["python", "-X", "dev", "-m", "optimal_sampling", "demo"], True),
        ("-m", ["python", "-m", "optimal_sampling.engines.fleet.worker_main", "7"], False),
        ("/bin/optimal-sampling", ["python", "-c", "from multiprocessing.spawn ..."], False),
        ("own.py", ["python", "own.py", "optimal-sampling"], False),
        ("", ["python"], False),
    ],
)
def test_only_the_command_has_handlers_from_the_start(argument, words, expected):
    """Guards: a notebook, a script or a worker that Ctrl-C ends without its own last words."""
    assert _is_command(argument, words) == expected
