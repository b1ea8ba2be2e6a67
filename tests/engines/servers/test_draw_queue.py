"""Draws of many tasks in one call."""

import asyncio

import numpy as np
import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.draw_queue import DrawQueue
from optimal_sampling.engines.servers.mixing import ListMixer, Place
from optimal_sampling.engines.servers.table_model import token_list


class CountingMixer(ListMixer):
    """Counts the places of every call."""

    def __init__(self, fails=False):
        super().__init__(MixtureConfig(), "mixture", 50)
        self.calls, self.fails = [], fails

    def draw(self, places):
        """Fails where it is told to."""
        self.calls.append(len(places))
        if self.fails:
            raise ArithmeticError("no q")
        return super().draw(places)


def places_of(count, seed):
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(2 * count):
        logits = 2 * rng.standard_normal(50)
        lists.append(token_list(logits - np.logaddexp.reduce(logits), 8))
    pairs = zip(lists[::2], lists[1::2], strict=True)
    return [Place(pair, seed, position) for position, pair in enumerate(pairs)]


def test_tasks_that_wait_at_once_share_a_call_and_get_their_own_tokens():
    """Guards: a call per text, and tokens of another text."""
    mixer = CountingMixer()
    asked = [places_of(1 + seed % 3, seed) for seed in range(6)]

    async def main():
        queue = DrawQueue(mixer)
        first = await asyncio.gather(*map(queue.draw, asked))
        return first, await queue.draw(asked[0])

    drawn, later = asyncio.run(main())
    assert mixer.calls == [12, 1]
    alone = [ListMixer(MixtureConfig(), "mixture", 50).draw(places) for places in asked]
    assert repr(drawn) == repr(alone)
    assert repr(later) == repr(alone[0])


def test_a_task_that_is_given_up_disturbs_no_other():
    """Guards: a result for a cancelled task, which ends the event loop's callback."""
    mixer = CountingMixer()

    async def main():
        queue = DrawQueue(mixer)
        tasks = [asyncio.create_task(queue.draw(places_of(2, seed))) for seed in range(3)]
        await asyncio.sleep(0)  # all wait
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert isinstance(second, asyncio.CancelledError)
    assert (len(first), len(third), sum(mixer.calls)) == (2, 2, 4)


def test_a_failure_reaches_every_task_that_waits():
    """Guards: a task that waits for ever."""

    async def main():
        queue = DrawQueue(CountingMixer(fails=True))
        waiting = asyncio.gather(*(queue.draw(places_of(1, seed)) for seed in range(3)))
        with pytest.raises(ArithmeticError, match="no q"):
            await asyncio.wait_for(waiting, 5)

    asyncio.run(main())
