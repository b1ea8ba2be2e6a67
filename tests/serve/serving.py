"""A server of the shipped pair in its own process, once for all tests; the official client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from optimal_sampling.distribution.naive import naive_step
from optimal_sampling.vocabulary import Vocabulary, resolve_model
from tests.engines.vllm.tiny import reference

KEY = "a-key-that-no-log-may-hold"
OPTIONS = (
    "--alpha-min 0 --batch-size 48 --prefill-chunk 512 --kv-memory-gib 0.1 --vllm block_size=32"
)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """(address, file with the server's output)."""
    with started(tmp_path_factory.mktemp("server")) as (_, address, log):
        yield address, log


@contextlib.contextmanager
def started(folder, options=OPTIONS):
    """(process, address, file with the output) of `optimal-sampling serve` of the shipped pair."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    environment = {**os.environ, "OPTIMAL_SAMPLING_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "INFO"}
    command = [sys.executable, "-m", "optimal_sampling", "serve", "--port", str(port)]
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, *options.split()], env=environment, stdout=out, stderr=out
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, address, log)
        yield process, address, log
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(process, address, log):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/health", timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="session")
def client(server):
    import openai

    with openai.OpenAI(
        base_url=f"{server[0]}/v1", api_key=KEY, timeout=300, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="session")
def vocabulary():
    return Vocabulary.load("toy-student", "toy-teacher", False)


def expected(vocabulary, teacher_ids, student_ids, mixture, place):
    """log q* of the next token by the naive mathematics."""
    size = vocabulary.size
    contexts = (("toy-student", student_ids), ("toy-teacher", teacher_ids))
    rows = [reference(resolve_model(name))(ids)[:size].tolist() for name, ids in contexts]
    return np.array(naive_step(*rows, [0.0] * size, place, mixture).log_drawn)
