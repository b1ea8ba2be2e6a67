"""A model behind fake servers beside its table: lists, drafts, scores, facts, keys."""

import asyncio
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from optimal_sampling.engines.servers.access import Access, ApiKey, base_url
from optimal_sampling.engines.servers.limit import AdaptiveLimit
from optimal_sampling.engines.servers.probe import PROBE_TEXTS, check_tokenizers
from optimal_sampling.engines.servers.replicas import AFFINITY
from optimal_sampling.engines.servers.statistics import Latencies, ServerStatistics, figures_text
from optimal_sampling.errors import ConfigError, ServerError, TokenizerMismatchError
from tests.engines.servers.serving import SIZE, fake, run, served


class Redirecting(BaseHTTPRequestHandler):
    """A server that leads elsewhere."""

    def do_GET(self):
        self.send_response(307)
        self.send_header("Location", "https://other/v1/models")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def exact(model, last, size=SIZE):
    row = model.logits[last][:size]
    return row - np.log(np.exp(row).sum())


def test_answers_are_those_of_the_table():
    """Guards: a list, a draft or a score of another position than was asked for."""

    async def main():
        with fake() as server:
            async with served(server.url) as model:
                table = server.model
                await check_lists(model, table)
                drafted = await model.draft([3], 6, 4, 0.0, 0)
                last = 3
                for each in drafted:
                    assert each.token == exact(table, last).argmax() == each.choices.ids[0]
                    last = each.token
                lists = await model.score([3], [4, 5], 4)
                for last, found in zip([3, 4, 5], lists, strict=True):
                    np.testing.assert_allclose(
                        found.log_p, exact(table, last)[found.ids], atol=1e-12
                    )

    async def check_lists(model, table):
        found = await model.next_tokens([1, 3], 4, [0, 11])
        assert found.listed == 4
        assert {0, 11} <= {*found.ids.tolist()}
        np.testing.assert_allclose(found.log_p, exact(table, 3)[found.ids], rtol=0, atol=1e-12)
        assert found.ids[:4].tolist() == np.argsort(-exact(table, 3))[:4].tolist()

    run(main)


@pytest.mark.parametrize("way", ["prompts", "prompt_logprobs", "echo"])
def test_all_ways_of_scoring_are_one(way):
    """Guards: a way whose lists belong to the position before or after."""

    async def main():
        with fake() as server:
            async with served(server.url) as model:
                lists = await model.score([2, 3], [4, 5], 4, way)
                for found, last in zip(lists, [3, 4, 5], strict=True):
                    expected = await model.next_tokens([last], 4)
                    assert found.ids[:4].tolist() == expected.ids.tolist()
                    assert found.log_p[:4].tolist() == expected.log_p.tolist()

    run(main)


def test_facts_are_found():
    """Guards: a limit of the server that is guessed, and an end token that is not known."""

    async def main():
        with fake(max_logprobs=7, context_length=99) as few, fake(max_logprobs=-1) as all_of_them:
            async with served(few.url) as model:
                assert model.facts.max_top_k == 7
                assert model.facts.vocab_size is None
                assert model.facts.context_length == 99
                assert (model.facts.can_choose_ids, model.facts.can_draft) == (True, True)
            async with served(all_of_them.url, vocab_size=10) as model:
                assert (model.facts.max_top_k, model.facts.vocab_size) == (SIZE, SIZE)
                found = await model.next_tokens([3], SIZE)
                assert found.is_full
                np.testing.assert_allclose(
                    found.log_p, exact(all_of_them.model, 3, 10)[found.ids], rtol=0, atol=1e-9
                )

    run(main)


class Tokenizer:
    """One id per word of its list; for end tokens of other names too."""

    def __init__(self, *words):
        self.words = words

    def __call__(self, text, add_special_tokens=False):
        if text in self.words:
            return {"input_ids": [self.words.index(text)]}
        return {"input_ids": [byte % SIZE for byte in text.encode()]}

    def decode(self, ids):
        return str(ids)


def test_stop_ids_are_found_where_the_server_ends():
    """Guards: texts that run on after the model's end, where no tokenizer is at hand."""
    tokenizer = Tokenizer("x", "</s>", "<|im_end|>", "<|endoftext|>")

    async def main():
        with fake(tokenizer=tokenizer, stop_ids=frozenset({2, 3})) as server:
            async with served(server.url) as model:
                assert model.facts.stop_ids == {2, 3}  # 1 is no end of this model

    run(main)


def test_two_tokenizers_are_told_apart():
    """Guards: q* over ids that mean different texts to the two models."""

    async def main():
        with fake() as one, fake(tokenizer=Tokenizer("What")) as same:
            async with served(one.url) as student, served(same.url) as teacher:
                await check_tokenizers({"student": student, "teacher": teacher})
                same.model.tokenizer.words = (PROBE_TEXTS[0],)
                with pytest.raises(TokenizerMismatchError, match="quick brown fox"):
                    await check_tokenizers({"student": student, "teacher": teacher})

    run(main)


def test_a_key_is_sent_and_never_shown(caplog, tmp_path):
    """Guards: a key in a log, a representation or an error, also where the server repeats it."""
    secret = "a-key-that-nobody-may-see"
    file = tmp_path / "key"
    file.write_text(f"{secret}\n")
    key = ApiKey.from_file(file)
    shown = []

    async def main():
        with fake(api_key=secret) as server:
            async with served(server.url, key=key) as model:
                assert (await model.next_tokens([3], 4)).listed == 4
            with pytest.raises(ServerError, match="unauthorized") as error:
                await served(server.url, key=ApiKey(secret + "x")).__aenter__()
            shown.append(repr(error.value))
        with fake(name=f"the key is {secret}") as server:  # a server that repeats it
            with pytest.raises(ConfigError) as error:
                await served(server.url, key=key, model="other").__aenter__()
            shown.append(str(error.value))

    with caplog.at_level(logging.DEBUG):
        run(main)
    shown += [repr(key), repr(Access(("http://a",), key=key)), caplog.text]
    assert caplog.records
    assert not [text for text in shown if secret in text]
    assert "[API key]" in shown[1]


@pytest.mark.parametrize("key", ["token", "1", "a", "choices"])
def test_a_key_may_be_a_word_of_replies(key):
    """Guards: replies in which a key such as `token` is replaced, so that none can be read."""

    async def main():
        with fake(api_key=key) as server:
            async with served(server.url, key=ApiKey(key)) as model:
                found = await model.next_tokens([3], 4)
                np.testing.assert_allclose(found.log_p, exact(server.model, 3)[found.ids])

    run(main)


def test_a_key_is_hidden_however_it_is_written():
    """Guards: a key that JSON has escaped, or half of one at the cut of a long message."""
    key = ApiKey('sk-ve"ry/secret')
    for text in ('a sk-ve"ry/secret b', r"a sk-ve\"ry/secret b", r"a sk-ve\"ry\/secret b"):
        assert key.hidden_in(text) == "a [API key] b"
    assert key.hidden_in('Bearer sk-ve"ry...') == "Bearer [API key]..."
    assert ApiKey("max").hidden_in("max: the maximum") == "[API key]: the maximum"


def test_a_redirect_is_named_and_not_followed():
    """Guards: a key that is sent to the address that a server names, or an error without it."""

    async def main():
        with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            with pytest.raises(ServerError, match="leads to https://other/v1/models") as error:
                await served(url, key=ApiKey("sk-secret")).__aenter__()
            server.shutdown()
        assert error.value.kind == "redirected"

    run(main)


@pytest.mark.parametrize(
    ("given", "message"), [({}, "variable KEY holds no"), ({"KEY": "two words"}, "more than one")]
)
def test_a_key_that_is_none_is_refused(given, message):
    """Guards: requests without a key, where the variable was misspelt."""
    with pytest.raises(ConfigError, match=message):
        ApiKey.from_environment("KEY", given)


def test_a_key_in_place_of_a_name_is_not_shown():
    """Guards: a key on the terminal, which was pasted where the variable's name belongs."""
    for key in ("sk-proj-1234", "hf_abcDEF123"):
        with pytest.raises(ConfigError, match="name of an environment variable") as error:
            ApiKey.from_environment(key, {})
        assert key not in str(error.value)
    assert ApiKey.from_environment("my_key", {"my_key": "x"}).reveal() == "x"


def test_a_proxy_of_the_environment(monkeypatch):
    """Guards: a proxy between a machine and itself; a traceback where one cannot be used."""
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed

    async def main():
        with fake() as server:
            async with served(server.url) as model:
                assert (await model.next_tokens([3], 4)).listed == 4
        with pytest.raises(ConfigError, match=r"proxy of the environment.*NO_PROXY=a\.invalid"):
            await served("http://a.invalid").__aenter__()

    for proxy in ("socks5://127.0.0.1:1", "gopher://127.0.0.1:1"):
        monkeypatch.setenv("ALL_PROXY", proxy)
        run(main)


def test_certificates_that_are_not_there_are_named(monkeypatch):
    """Guards: "No such file or directory", without the variable that says so."""

    async def main():
        with fake() as server, pytest.raises(ConfigError, match="SSL_CERT_FILE"):
            await served(server.url).__aenter__()

    monkeypatch.setenv("SSL_CERT_FILE", "/not/there.pem")
    run(main)


def test_addresses():
    """Guards: /v1/v1/completions, and passwords that every log of requests shows."""
    assert base_url("http://localhost:9000/v1/") == "http://localhost:9000"
    assert base_url("https://host/prefix") == "https://host/prefix"
    strange = ("http://a b", "http://a\t:80", "http://a\u200b", "http://a#b", "http://a?b=c")
    for bad in ("localhost:9000", "ftp://host", "http://", "http://host:port", *strange):
        with pytest.raises(ConfigError, match="no address"):
            base_url(bad)
    with pytest.raises(ConfigError, match="password") as error:
        base_url("http://user:hidden@host")
    assert "hidden" not in str(error.value)
    with pytest.raises(ConfigError, match="twice"):
        Access(("http://a", "http://a/v1"))


def test_a_limit_follows_the_server():
    """Guards: a server that is asked for more than it can take, for ever; or for one at a time."""
    limit = AdaptiveLimit(start=4, most=16)
    limit.in_flight = 4
    for _ in range(20):
        limit.in_flight = int(limit.value)
        limit.answered()
    assert limit.value == 16
    for _ in range(5):
        limit.overloaded(started=0.0)  # one burst, of requests that were sent together
    assert limit.value == 8
    before = limit.value
    limit.in_flight = 8
    limit.answered()
    assert before < limit.value < before + 0.2
    limit.in_flight = 1
    limit.answered()  # the places are not used, so this tells nothing
    assert limit.value < before + 0.2


def test_a_limit_lets_no_more_in():
    """Guards: more requests in flight than places, and a place lost with a cancelled request."""

    async def main():
        limit = AdaptiveLimit(start=2, most=2)
        most = 0

        async def ask():
            nonlocal most
            async with limit:
                most = max(most, limit.in_flight)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(ask()) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (most, limit.in_flight) == (2, 0)

    run(main)


def test_texts_stay_with_their_server():
    """Guards: a text whose requests go to all servers in turn, so that none has its prefix."""

    async def main():
        with fake() as one, fake() as two:
            async with served(one.url, two.url) as model:
                connections = model.replicas
                for number in range(4):
                    AFFINITY.set(number)
                    chosen = {model.next_replica(connections, []).url for _ in range(5)}
                    assert chosen == {connections[number % 2].url}
                AFFINITY.set(0)
                connections[0].connection.limit.in_flight = 32  # full
                assert model.next_replica(connections, []) is connections[1]
                connections[0].connection.limit.in_flight = 0

    run(main)


def test_percentiles():
    """Guards: percentiles that are off by more than the classes are wide."""
    latencies = Latencies()
    for number in range(1, 1001):
        latencies.add(number / 1000)
    for percent in (50, 90, 99):
        assert latencies.percentile(percent) == pytest.approx(percent / 100, rel=0.03)


def test_figures_in_a_line():
    """Guards: counts that a line of the summary rounds or writes as 1.2e+05."""
    statistics = ServerStatistics(requests=123_456, retries=3)
    statistics.errors["timeout"] = 3
    statistics.latencies.add(0.0345)
    text = figures_text(statistics.figures())
    assert text.startswith("requests 123,456, retries 3, errors timeout 3, latency p50 3")
    assert text.endswith(" ms")


def test_importing_needs_no_httpx():
    """Guards: an ImportError with a traceback where the extra is not installed."""
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "import asyncio\n"
        "from optimal_sampling.engines.servers.access import Access\n"
        "from optimal_sampling.engines.servers.replicas import ReplicatedModel\n"
        "asyncio.run(ReplicatedModel(Access(('http://a',))).start())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingDependencyError" in done.stderr.splitlines()[-1]
    assert "pip install '.[servers]'" in done.stderr


def test_a_request_that_is_given_up_leaves_its_connection_to_nobody():
    """Guards: a client whose only connection counts as in use, so that the next request waits until
    its deadline.
    """

    async def main():
        with fake() as server:
            async with served(server.url) as model:
                for step in range(60):
                    task = asyncio.create_task(model.next_tokens([step % 5], 3))
                    await asyncio.sleep(step * 1e-4)
                    task.cancel()
                    await model.next_tokens([1], 3)
                return model.statistics

    statistics = run(main)
    assert statistics.errors == {}
    assert statistics.retries == 0
