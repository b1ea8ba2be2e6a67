"""Servers that end: by a signal while a client reads a stream, and by the death of their engine."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from tests.serve.serving import KEY, started

SLOW = 10**6
"""Tokens asked for: far more than any test waits for."""


@pytest.fixture
def streaming(tmp_path):
    """(process of a server, its log); a client reads a stream that it has begun."""
    import openai

    with started(tmp_path) as (process, address, log):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, timeout=100, max_retries=0)
        stream = client.completions.create(
            model="toy-teacher",
            prompt="1+1=?",
            max_tokens=400,
            stream=True,
            n=40,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        reader = threading.Thread(target=_read, args=[stream], daemon=True)
        reader.start()
        yield process, log
        reader.join(60)
        assert not reader.is_alive()


def _read(stream):
    try:
        for _ in stream:
            time.sleep(0.05)  # a client that takes its time
    except Exception:
        pass  # the connection ends with the server


def test_a_signal_ends_a_server_whose_client_still_reads(streaming):
    """Guards: a server that waits for its clients, for minutes."""
    process, log = streaming
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    assert time.monotonic() - begin < 5
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_server_whose_engine_died_does_not_exit_with_0(streaming):
    """Guards: a supervisor that takes the death of the engine for the end of the work."""
    process, log = streaming
    [engine] = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())
    ]
    os.kill(engine.pid, signal.SIGKILL)
    assert process.wait(60) == 1
    assert "vLLM's engine ended" in log.read_text()


def _engine_processes(pid):
    children = psutil.Process(pid).children(recursive=True)
    return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


def test_a_signal_ends_a_server_that_is_starting(tmp_path):
    """Guards: a process that waits minutes for an engine which the signal has ended."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "optimal_sampling", "serve", "--port", "8899"]
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        deadline = time.monotonic() + 300
        while not (children := _engine_processes(process.pid)):
            assert time.monotonic() < deadline
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert "interrupted while vLLM was starting" in log.read_text()


def test_a_server_without_memory_for_a_text_says_so():
    """Guards: the reason of a process of vLLM in its log alone, pages above the last line."""
    command = [sys.executable, "-m", "optimal_sampling", "serve", "--kv-memory-gib", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    own = "optimal-sampling: error: "
    [said] = [line for line in done.stderr.splitlines() if line.startswith(own)]
    assert said.startswith(f"{own}too little memory for the KV cache")
    assert "kv_memory_gib" in said
    assert "max_model_len" in said
