"""The engine behind the proxy: every text once, with the tokens that it has without faults."""

import contextlib
import subprocess
import sys
import threading
from subprocess import PIPE

import pytest

from optimal_sampling.config import MixtureConfig, ServersOptions
from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.engine import LoopThread, ServersEngine, start_models
from optimal_sampling.engines.servers.replicas import ReplicatedModel
from optimal_sampling.errors import EngineError
from optimal_sampling.types import Request
from tests.engines.servers.proxy import Proxy
from tests.engines.servers.serving import SIZE

STOP = frozenset({0})


SERVERS = f"""
import sys
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
ports = [int(port) for port in sys.argv[1:]] or [0, 0]
student, teacher = (
    FakeServer(FakeModel(table), port)
    for table, port in zip(random_tables({SIZE}), ports, strict=True)
)
with student, teacher:
    print(student.url, teacher.url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def fake_pair():
    """Addresses of student's and teacher's server, by role; in a process of their own."""
    with started() as (_, urls):
        yield urls


@contextlib.contextmanager
def started(*ports):
    """(process, addresses) of two servers."""
    command = [sys.executable, "-c", SERVERS, *map(str, ports)]
    process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
    with process:
        try:
            urls = process.stdout.readline().split()
            yield process, dict(zip(("student", "teacher"), urls, strict=True))
        finally:
            process.kill()


@contextlib.contextmanager
def engine_at(urls, batch_size=64, top_k=5, **given):
    """The engine over models behind addresses, by role."""
    access = {"vocab_size": SIZE, "deadline": 2.0, "retry_seconds": 30.0, **given}
    models = {role: ReplicatedModel(Access((url,), **access)) for role, url in urls.items()}
    thread = LoopThread()
    thread.run(start_models(models))
    options = ServersOptions(batch_size=batch_size, server_top_k=top_k)
    with ServersEngine(models, MixtureConfig(), options, thread, SIZE, STOP) as engine:
        yield engine.view()


def requests(count, tokens=4):
    ids = [(1 + number % 11, number // 11 % SIZE, number // 132 % SIZE) for number in range(count)]
    return [
        Request(f"prompt {number}", 0, 0, prompt, prompt[::-1], tokens)
        for number, prompt in enumerate(ids)
    ]


def tokens_of(completions):
    return {each.request.id: (each.token_ids, each.finish_reason) for each in completions}


@contextlib.contextmanager
def proxies(urls, **options):
    """Proxies in front of both servers, by role."""
    with contextlib.ExitStack() as stack:
        yield {
            role: stack.enter_context(Proxy(url, seed=len(role), **options))
            for role, url in urls.items()
        }


def failures(figures):
    """Attempts that failed because of a fault."""
    names = [name for name in figures if name.startswith("errors_") or name == "idle_cuts"]
    return sum(figures[name] for name in names)


@pytest.mark.parametrize(
    ("count", "at_once"), [(100, 16), pytest.param(2000, 64, marks=pytest.mark.slow)]
)
def test_texts_through_faults(count, at_once):
    """Guards: a text that is lost, comes twice, or has other tokens, at 10% of faults."""
    asked = requests(count)
    with fake_pair() as urls, proxies(urls) as broken:
        behind = {role: proxy.url for role, proxy in broken.items()}
        with engine_at(behind, at_once) as engine:
            expected = tokens_of(engine.generate(asked))
            for proxy in broken.values():
                proxy.rate = 0.1
            done = list(engine.generate(asked))
            figures = {role: model.figures() for role, model in engine.models.items()}
    assert not [each.error for each in done if each.error]
    assert len(done) == len(asked)
    assert tokens_of(done) == expected
    made = {role: proxy.made for role, proxy in broken.items()}
    print(count, "texts;", figures, made)
    for role, each in figures.items():
        assert (
            failures(each) >= made[role].total() > each["requests"] / 40
        )  # a half was asked before


def test_a_text_that_fails_for_good_says_why():
    """Guards: a run that ends with its first bad text, and a failure without a cause."""

    class Poisoned(Proxy):
        def fault_of(self, body):
            return "server_error" if b"[7," in body else None

    asked = requests(40)
    with fake_pair() as urls, Poisoned(urls["student"]) as proxy:
        with engine_at(urls) as engine:
            expected = tokens_of(engine.generate(asked))
        with engine_at({**urls, "student": proxy.url}) as engine:
            done = list(engine.generate(asked))
    poisoned = {each.id for each in asked if each.student_prompt_ids[0] == 7}
    failed = {each.request.id: each.error for each in done if each.error}
    assert failed.keys() == poisoned
    assert all(proxy.url in each and "server_error" in each for each in failed.values())
    good = [each for each in done if not each.error]
    assert tokens_of(good) == {name: expected[name] for name in expected.keys() - poisoned}


def test_servers_that_are_killed_and_started_again():
    """Guards: texts that are lost with their server, or go on with other tokens."""
    asked = requests(120, tokens=8)
    with contextlib.ExitStack() as stack:
        process, urls = stack.enter_context(started())
        ports = [url.rpartition(":")[2] for url in urls.values()]
        with engine_at(urls, batch_size=16) as engine:
            expected = tokens_of(engine.generate(asked))
            done = []
            for completion in engine.generate(asked):
                done.append(completion)
                if len(done) == 20:
                    process.kill()
                    process.wait()
                    starting = threading.Timer(0.5, lambda: stack.enter_context(started(*ports)))
                    starting.start()
            starting.join()
            figures = [model.figures() for model in engine.models.values()]
    assert tokens_of(done) == expected
    assert len(done) == len(asked)
    assert sum(each.get("errors_refused", 0) for each in figures) > 0


def test_a_server_that_is_gone_fails_no_text():
    """Guards: a failed text for every one that was in flight when its server went for good."""
    done = []

    def work(engine, process):
        for completion in engine.generate(requests(400, tokens=8)):
            done.append(completion)
            if len(done) == 20:
                process.kill()
                process.wait()

    with (
        started() as (process, urls),
        engine_at(urls, 16, retry_seconds=1.5) as engine,
        pytest.raises(EngineError, match=r"server .*No server of this model answers"),
    ):
        work(engine, process)
    assert 20 <= len(done) < 60
    assert not [each.error for each in done if each.error]
