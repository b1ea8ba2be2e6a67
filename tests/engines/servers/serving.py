"""What the tests of served models share: a fake server, a started client, the proxy's client."""

import asyncio
import contextlib

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer, random_tables
from optimal_sampling.engines.servers.replicas import ReplicatedModel

SIZE = 12


def fake(**options):
    """A server of a random table."""
    return FakeServer(FakeModel(random_tables(SIZE)[0], **options))


@contextlib.asynccontextmanager
async def served(*urls, **options):
    """A started model behind servers; deadlines are short."""
    given = {"vocab_size": SIZE, "deadline": 2.0, "retry_seconds": 20.0, **options}
    model = ReplicatedModel(Access(urls, **given))
    try:
        await model.start()
        yield model
    finally:
        await model.aclose()


def run(main, *args):
    """The result of a coroutine function."""
    return asyncio.run(main(*args))
