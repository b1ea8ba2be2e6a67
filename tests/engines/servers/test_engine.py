"""The engine over tables: the suite that every engine passes, drafts, bounds, long lists, faults."""

from dataclasses import replace

import pytest

from optimal_sampling.config import MixtureConfig, ServersOptions
from optimal_sampling.engines.servers.engine import LoopThread, ServersEngine
from optimal_sampling.engines.servers.table_model import TableModel
from optimal_sampling.engines.toy import ToyEngine
from optimal_sampling.types import Request
from tests.engines.conformance import EngineConformance, Harness

PROMPTS = [([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])]


def tables_of(vocab=6, seed=0):
    tables = ToyEngine.random(MixtureConfig(), vocab, seed=seed).tables
    return {role: table.double().numpy() for role, table in tables.items()}


def engine_over(models, mixture=None, stop_ids=frozenset({0}), vocab=6, **options):
    given = ServersOptions(**{"server_top_k": -1, "draft_tokens": 0, **options})
    engine = ServersEngine(models, MixtureConfig(), given, LoopThread(), vocab, stop_ids)
    return engine.view(mixture)


def table_models(vocab=6, **claims):
    claims = {"context_length": 64, "stop_ids": frozenset({0}), **claims}
    return {role: TableModel(table, **claims) for role, table in tables_of(vocab).items()}


def requests(count=12, new=12, samples=1):
    return [
        Request(f"prompt {i}", j, 0, *map(tuple, PROMPTS[i % len(PROMPTS)]), new)
        for i in range(count)
        for j in range(samples)
    ]


def tokens_of(engine, asked):
    return {c.request.key: c.token_ids for c in engine.generate(asked)}


class Suite(EngineConformance):
    draft_tokens = 0

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        tables = tables_of()
        engine = engine_over(table_models(), draft_tokens=cls.draft_tokens)
        yield Harness(
            open=lambda mixture, batch_size: engine.view(
                mixture, options=replace(engine.options, batch_size=batch_size)
            ),
            logits=lambda role, ids: tables[role][ids[-1]],
            prompts=PROMPTS,
            context_length=64,
        )
        engine.close()


class TestLockstep(Suite):
    """One token per round."""


class TestDrafts(Suite):
    """Several tokens per round."""

    draft_tokens = 4


del Suite
