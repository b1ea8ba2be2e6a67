"""The process of a worker."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimal_sampling.engines.fleet.worker_main import _broken
from optimal_sampling.errors import ConfigError, EngineError, ServedModelError

WATCH = """
import os, time
from types import SimpleNamespace
from optimal_sampling.engines.fleet.worker_main import _watch

class End:
    def send(self, event):
        time.sleep(2.5)
        os._exit(7)

_watch(End(), SimpleNamespace(progress=1), os.getppid(), beat=0.1, stuck=1.5)
"""


def test_a_driver_that_reads_nothing_ends_no_worker():
    """Guards: a whole fleet that ends because its driver was paused (Ctrl-Z) for 20 minutes."""
    done = subprocess.run([sys.executable, "-c", WATCH], capture_output=True, timeout=60)
    assert done.returncode == 7, done.stderr.decode()


ORPHAN = """
from types import SimpleNamespace
from optimal_sampling.engines.fleet.worker_main import _watch

_watch(None, SimpleNamespace(progress=None), parent=-1, beat=0.1)
"""


def test_a_worker_whose_parent_has_gone_ends():
    """Guards: a worker that lives on because another process holds the driver's socket open."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"")


def caught_by(process):
    """The signals that a process has handlers for, as a mask."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s+(\w+)", text)[1], 16)


@pytest.mark.skipif(sys.platform != "linux", reason="handlers are read from /proc")
def test_a_segmentation_fault_is_in_the_log():
    """Guards: a worker that dies in the code of a library, and nobody knows where."""
    command = [sys.executable, "-m", "optimal_sampling.engines.fleet.worker_main"]
    ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
    ends = [end.fileno() for end in theirs]
    with contextlib.ExitStack() as stack:
        for end in (*ours, *theirs):
            stack.enter_context(end)
        child = subprocess.Popen([*command, *map(str, ends)], pass_fds=ends, stderr=subprocess.PIPE)
        while not caught_by(child) >> (signal.SIGSEGV - 1) & 1:
            time.sleep(0.01)
        child.send_signal(signal.SIGSEGV)
        _, log = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGSEGV
    assert b"Segmentation fault" in log
    assert b"worker_main.py" in log


STUCK = """
import os, signal, socket, sys
from optimal_sampling.engines.fleet.worker_main import _end_with
lifeline = socket.socket(fileno=int(sys.argv[1]))
_end_with(lifeline)
print("ready", flush=True)
if sys.argv[2] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
9 ** 10**9  # keeps the interpreter to itself
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux alone")
@pytest.mark.parametrize("how", ["stopped", "computing"])
def test_a_worker_that_runs_no_thread_ends_with_its_driver(how):
    """Guards: an orphan, for ever or for 20 minutes, on the GPU that the next call needs."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        command = [sys.executable, "-c", STUCK, str(fd), how]
        child = subprocess.Popen(
            command, pass_fds=[fd], stdout=subprocess.PIPE, start_new_session=True
        )
        assert child.stdout.readline() == b"ready\n"
    try:
        assert child.wait(20) == -signal.SIGKILL
    finally:
        child.kill()
        child.communicate()


def test_a_request_is_not_taken_for_the_users_error():
    """Guards: all workers given up, one after another, because of one request."""
    error = ConfigError("why")
    assert _broken(error, is_serving=False).kind == "ConfigError"
    served = _broken(error, is_serving=True)
    assert (served.kind, served.cause) == ("", "it raised ConfigError: why")


@pytest.mark.parametrize("is_serving", [False, True])
def test_a_worker_whose_served_model_was_replaced_is_not_started_again(is_serving):
    """Guards: a new worker that takes another model for the one that the run began with."""
    broken = _broken(ServedModelError("the teacher's server: wrong_model"), is_serving=is_serving)
    assert broken.kind == "ServedModelError"
    assert not _broken(EngineError("out of memory"), is_serving=is_serving).kind
