"""Servers that refuse all requests in the middle of a run, or come back with another model."""

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest

from optimal_sampling.engines.servers.access import ApiKey
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.errors import EngineError, ServerError
from tests.engines.servers.proxy import Proxy
from tests.engines.servers.serving import SIZE, run, served

KEY = "sk-secret-key"
STUDENT, TEACHER = random_tables(SIZE)
MODEL = FakeModel(STUDENT, api_key=KEY, max_logprobs=10)


def keyed(*servers, **options):
    given = {"key": ApiKey(KEY), "retry_seconds": 1.0, **options}
    return served(*(each.url for each in servers), **given)


def set_model(server, model):
    """The server has another model, or key, from now on; connections stay."""
    server._http.model = model


async def until_failure(model, token):
    """The replies to requests one after another, until one fails for good."""
    replies = []
    while True:
        try:
            replies.append(await model.next_tokens([token], 5))
        except (EngineError, ServerError) as error:
            return token, replies, error


def check_replies(token, replies):
    """Every reply is of MODEL."""
    for each in replies:
        np.testing.assert_allclose(each.log_p, MODEL.log_p[token][each.ids], atol=1e-9)


@contextlib.asynccontextmanager
async def in_flight(model, count=16):
    """Requests without end, many at once; afterwards all have failed for all alike."""
    tasks = [asyncio.create_task(until_failure(model, token % SIZE)) for token in range(count)]
    await asyncio.sleep(0.1)
    yield
    for token, replies, error in await asyncio.gather(*tasks):
        check_replies(token, replies)
        assert isinstance(error, EngineError), error
        assert "the same call then goes on" in str(error)
        assert KEY not in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key": "another"}, r"^server (\S+): unauthorized: status 401.*give its API key, one"),
        ({"name": "other"}, r"^server (\S+): wrong_model: .*its name is other, and was fake"),
    ],
)
def test_a_server_that_refuses_all_requests_ends_the_run(changes, message):
    """Guards: every text that is left recorded as failed, because a key was revoked or a server
    has another model; and one that stays refused when that is put right."""

    async def main():
        with FakeServer(MODEL) as server:
            async with keyed(server) as model:
                async with in_flight(model):
                    set_model(server, replace(MODEL, **changes))
                with pytest.raises(EngineError, match=message):
                    await model.next_tokens([3], 5)
                set_model(server, MODEL)
                await asyncio.sleep(0.6)
                check_replies(3, [await model.next_tokens([3], 5)])
                assert model.left_out() == []

    run(main)


@pytest.mark.parametrize(
    ("changes", "is_idle", "message"),
    [
        ({"logits": TEACHER}, False, "is not what it was when the run began: the log-probability"),
        ({"logits": STUDENT + 0.2 * TEACHER}, True, r"log-probability of token .*, then and now"),
        ({"context_length": 99}, True, "its context length is 99, and was 4096"),
        ({"max_logprobs": 3}, False, "greater than max allowed: 3"),
    ],
)
def test_a_server_that_comes_back_as_another_ends_the_run(changes, is_idle, message):
    """Guards: texts drawn from two models in turn, where the second has the name of the first."""

    async def main():
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(FakeServer(MODEL))
            async with keyed(first) as model:
                busy = contextlib.nullcontext() if is_idle else in_flight(model)
                async with busy:
                    first.close()
                    other = FakeServer(replace(MODEL, **changes), port=first.port)
                    stack.enter_context(other)
                with pytest.raises(EngineError, match=message):
                    await model.next_tokens([3], 5)

    run(main)


def test_a_server_that_comes_back_is_compared_once():
    """Guards: requests that are doubled because a server was started again."""

    async def main():
        with FakeServer(MODEL) as first:
            async with keyed(first, retry_seconds=20.0) as model:
                expected = await model.next_tokens([3], 5)
                first.close()
                pending = [asyncio.create_task(model.next_tokens([3], 5)) for _ in range(32)]
                await asyncio.sleep(0.3)
                before = model.statistics.requests
                with FakeServer(MODEL, port=first.port):
                    replies = await asyncio.gather(*pending)
                    found = model.statistics
                    assert found.requests - before == len(pending)
                    compared = found.comparisons
                    assert 1 <= compared <= 3
                    for each in replies:
                        np.testing.assert_array_equal(each.log_p, expected.log_p)
                    await model.next_tokens([3], 5)
                    assert found.comparisons == compared

    run(main)


@pytest.mark.parametrize("fault", ["server_error", "rate_limited", "nan"])
def test_errors_of_a_server_are_no_reason_to_compare(fault):
    """Guards: requests that are doubled because a server has much to do."""

    async def main():
        with FakeServer(MODEL) as server, Proxy(server.url, [fault]) as proxy:
            async with keyed(proxy) as model:
                once = iter([fault] * 5)
                proxy.fault_of = lambda body: next(once, None)
                await asyncio.gather(*(model.next_tokens([3], 5) for _ in range(8)))
                assert model.statistics.retries >= 5
                assert model.statistics.comparisons == 0

    run(main)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"api_key": "another"}, "unauthorized"), ({"logits": TEACHER}, "wrong_model")],
)
def test_one_of_several_servers_is_left_out(changes, kind):
    """Guards: a run that ends, or a text that fails, where the other server can serve it; and a
    server that is left out without a word."""

    async def main():
        with FakeServer(MODEL) as one, FakeServer(MODEL) as two:
            async with keyed(one, two) as model:
                one.close()
                with FakeServer(replace(MODEL, **changes), port=one.port) as other:
                    tokens = [token % SIZE for token in range(40)]
                    requests = [model.next_tokens([token], 5) for token in tokens]
                    for token, each in zip(tokens, await asyncio.gather(*requests), strict=True):
                        check_replies(token, [each])
                    assert model.statistics.failed == 0
                    assert model.figures()["left_out"] == 1
                    [told] = model.left_out()
                    assert told.startswith(f"{other.url}: {kind}: ")
                    before = model.statistics.errors[kind]
                    await asyncio.gather(*(model.next_tokens([token], 5) for token in tokens))
                    assert model.statistics.errors[kind] == before  # it is not asked again
                    two.close()
                    with pytest.raises(EngineError, match="refused"):
                        await model.next_tokens([3], 5)

    run(main)


def test_one_request_that_is_refused_fails_alone():
    """Guards: a run that ends because of one text that a server or its gateway does not serve."""

    class Gateway(Proxy):
        def fault_of(self, body):
            return "forbidden" if b"[7]" in body else None

    async def main():
        with FakeServer(MODEL) as server, Gateway(server.url) as proxy:
            async with keyed(proxy) as model:
                with pytest.raises(ServerError, match="unauthorized: status 403") as error:
                    await model.next_tokens([7], 5)
                assert error.value.kind == "unauthorized"
                check_replies(3, [await model.next_tokens([3], 5)])

    run(main)
