"""What servers and networks do wrong, through the proxy: nothing is lost, repeated or changed."""

import asyncio
import time

import numpy as np
import pytest

from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.engines.servers.replicas import AFFINITY
from optimal_sampling.errors import ConfigError, EngineError, ServerError
from tests.engines.servers.proxy import FAULTS, Proxy
from tests.engines.servers.serving import SIZE, fake, run, served

COUNTED = {
    "reset": None,  # of an idle connection, before the first byte
    "idle_cut": None,
    "stall": "timeout",
    "slow": "timeout",
    "missing_field": "invalid",
    "nan": "invalid",
    "wrong_length": "invalid",
    "duplicated_id": "invalid",
}
"""Kinds under which the client counts the proxy's faults, where the names differ."""


def same(one, two):
    return np.array_equal(one.ids, two.ids) and np.array_equal(one.log_p, two.log_p)


class Once(Proxy):
    """Breaks the first request of every body that has `max_tokens` 1."""

    broken = True

    def fault_of(self, body):
        number, self.seen[body] = self.seen[body], self.seen[body] + 1
        return self.faults[0] if self.broken and not number else None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_met_by_another_attempt(fault):
    """Guards: a fault that fails a request, is counted as another one, or changes the answer."""

    async def main():
        with fake() as server, Once(server.url, [fault]) as proxy:
            proxy.broken = False
            async with served(server.url) as plain, served(proxy.url) as model:
                await model.next_tokens([1], 5)  # so that a connection is idle
                before = model.statistics.retries, model.statistics.failed
                proxy.broken = True
                expected = await plain.next_tokens([3, 4], 5)
                assert same(await model.next_tokens([3, 4], 5), expected)
                assert proxy.made == {fault: 1}
                kind = COUNTED.get(fault, fault)
                cut, retries = model.statistics.idle_cuts, model.statistics.retries - before[0]
                assert (cut, retries) == ((1, 0) if kind is None else (0, 1))
                assert kind is None or model.statistics.errors[kind] == 1
                assert model.statistics.failed == before[1]

    run(main)


def test_retry_after_is_waited_for():
    """Guards: a server that asks for a second and is asked again at once."""

    async def main():
        with fake() as server, Once(server.url, ["rate_limited"], retry_after="1") as proxy:
            proxy.broken = False
            async with served(proxy.url) as model:
                proxy.broken = True
                started = time.monotonic()
                await model.next_tokens([3, 4], 5)
                assert time.monotonic() - started >= 1

    run(main)


@pytest.mark.parametrize("fault", ["server_error", "nan"])
def test_a_fault_that_stays_is_an_error_with_its_cause(fault):
    """Guards: a request that is tried for ever, or fails without saying why and where."""

    async def main():
        with fake() as server, Proxy(server.url, [fault]) as proxy:
            async with served(proxy.url) as model:
                proxy.rate = 1.0
                with pytest.raises(ServerError, match=proxy.url) as error:
                    await model.next_tokens([3, 4], 5)
                assert error.value.kind == COUNTED.get(fault, fault)
                assert model.figures()["failed"] > 0
                proxy.rate = 0.0
                assert (await model.next_tokens([3, 4], 5)).listed == 5  # the rest goes on

    run(main)


def test_a_server_that_stays_away_ends_the_run_after_the_budget():
    """Guards: a run that hangs, or that has every text fail after minutes of waiting."""

    async def main():
        with fake() as server:
            async with served(server.url, retry_seconds=1.5) as model:
                server.close()
                started = time.monotonic()
                with pytest.raises(EngineError, match=r"refused.*No server of this model answers"):
                    await model.next_tokens([3, 4], 5)
                assert 0.8 < time.monotonic() - started < 4

    run(main)


def test_a_request_that_hangs_fails_alone():
    """Guards: a run that ends because of one text for which its server takes too long."""

    async def main():
        with fake() as server, Proxy(server.url, ["stall"], rate=0.0) as proxy:
            async with served(proxy.url, retry_seconds=0.5, deadline=0.3) as model:
                proxy.rate = 1.0
                with pytest.raises(ServerError, match="no whole reply within") as error:
                    await model.next_tokens([3, 4], 5)
                assert error.value.kind == "timeout"

    run(main)


def test_a_wait_beyond_the_budget_is_not_begun():
    """Guards: an hour of waiting because a server asked for it, and all texts failed in that hour;
    a text that fails, where another server answers."""

    async def main():
        with fake() as server, Proxy(server.url, ["rate_limited"], retry_after="3600") as proxy:
            async with served(proxy.url) as model:
                proxy.rate = 1.0
                with pytest.raises(EngineError, match=r"rate_limited.*wait 3600 s.*No server"):
                    await model.next_tokens([3, 4], 5)
                proxy.fault_of = lambda body: "rate_limited" if b"[3,4]" in body else None
                with pytest.raises(ServerError, match="rate_limited"):
                    await model.next_tokens([3, 4], 5)
            async with served(proxy.url, server.url) as model:
                AFFINITY.set(0)
                assert (await model.next_tokens([3, 4], 5)).listed == 5

    run(main)


def test_many_requests_through_many_faults():
    """Guards: a request that is lost, answered twice, or answered with another one's list."""

    async def main():
        with fake() as server, Proxy(server.url, rate=0.0) as proxy:
            async with served(server.url) as plain, served(proxy.url) as model:
                proxy.rate = 0.1
                model.statistics.clear()
                proxy.seen.clear()
                proxy.passed.clear()
                prompts = [[number // SIZE**2, number // SIZE, number] for number in range(200)]
                prompts = [[token % SIZE for token in prompt] for prompt in prompts]
                room = asyncio.Semaphore(64)

                async def ask(prompt):
                    async with room:
                        return await model.next_tokens(prompt, 5)

                answers = await asyncio.gather(*map(ask, prompts))
                for prompt, answer in zip(prompts, answers, strict=True):
                    assert same(answer, await plain.next_tokens(prompt, 5))
                found = model.statistics
                assert (found.requests, found.failed) == (len(prompts), 0)
                assert len(proxy.made) >= 8
                slow = proxy.made["stall"] + proxy.made["slow"]
                assert found.errors["timeout"] >= slow  # more of them on a busy machine
                failed = found.idle_cuts + found.errors.total() - found.errors["timeout"]
                assert failed == proxy.made.total() - slow

    run(main)


def test_a_restarted_server_is_used_again():
    """Guards: requests that fail because their server is started again in the middle of a run."""

    async def main():
        with fake() as first:
            async with served(first.url) as model:
                expected = await model.next_tokens([3], 5)
                first.close()
                pending = [asyncio.create_task(model.next_tokens([3], 5)) for _ in range(16)]
                await asyncio.sleep(0.5)
                with FakeServer(first.model, port=first.port):
                    answers = await asyncio.gather(*pending)
                assert all(same(answer, expected) for answer in answers)
                assert model.statistics.failed == 0

    run(main)


def test_an_address_where_nothing_listens_is_said_at_the_start():
    """Guards: a mistyped port for which a run waits as for a server that is started again."""

    async def main():
        with fake() as gone:
            url = gone.url
        with pytest.raises(EngineError, match=r"refused.*is the address right\?$"):
            await served(url, start_seconds=0.2, retry_seconds=3600.0).__aenter__()

    run(main)


def test_another_server_takes_over_at_once():
    """Guards: a wait for a server that is gone, while another one could answer."""

    async def main():
        with fake() as one, fake() as two:
            async with served(one.url, two.url) as model:
                expected = await model.next_tokens([3], 5)
                one.close()
                started = time.monotonic()
                for _ in range(20):
                    assert same(await model.next_tokens([3], 5), expected)
                assert time.monotonic() - started < 1

    run(main)


def test_servers_of_different_weights_are_refused():
    """Guards: texts drawn from two models in turn."""

    async def main():
        one, two = (FakeServer(FakeModel(table)) for table in random_tables(SIZE))
        with one, two, pytest.raises(ConfigError, match=two.url):
            await served(one.url, two.url).__aenter__()

    run(main)


def test_a_cancelled_request_frees_its_place():
    """Guards: places that cancelled requests keep, until no request can start."""

    async def main():
        with fake() as server, Proxy(server.url, ["stall"]) as proxy:
            async with served(proxy.url, most_in_flight=2) as model:
                proxy.rate = 1.0
                tasks = [asyncio.create_task(model.next_tokens([3], 5)) for _ in range(6)]
                await asyncio.sleep(0.2)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                proxy.rate = 0.0
                assert (await model.next_tokens([3], 5)).listed == 5

    run(main)
