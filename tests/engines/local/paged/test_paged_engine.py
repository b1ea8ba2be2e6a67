"""The engine over pages: the common suite, and the same texts as over slots."""

import dataclasses
from collections import Counter
from dataclasses import replace

import pytest
import torch

from optimal_sampling.engines.local.paged.cuda_graphs import Graphs
from optimal_sampling.engines.local.paged.page_cache import PageCache
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.types import Request
from tests.engines.conformance import EngineConformance, Harness, by_key, requests_of
from tests.engines.local.conftest import CONTEXT, engine_of, stock_logits, tiny_model, vocabulary
from tests.engines.local.paged.conftest import FakeRecorder
from tests.engines.local.test_engine import PROMPTS


def paged_engine(*models, recorded=True, ahead=False, **options):
    engine = engine_of(*models, **options)
    for runner in engine.pair.runners.values():
        assert isinstance(runner, PageRunner)
        runner.new_recorder = FakeRecorder if recorded else None
        runner.runs_ahead = ahead
    return engine


def paged_harness(student, teacher, **options):
    stock = {"student": stock_logits(student), "teacher": stock_logits(teacher)}
    base = paged_engine(student, teacher, **options)
    return Harness(
        open=lambda mixture, batch_size: base.view(
            mixture, options=replace(base.options, batch_size=batch_size)
        ),
        logits=lambda role, ids: stock[role](ids),
        prompts=PROMPTS,
        context_length=CONTEXT,
    )


@pytest.mark.usefixtures("flash_on_cpu")
class TestPagedEngine(EngineConformance):
    @pytest.fixture
    def harness(self, flash_on_cpu):
        return paged_harness(tiny_model(1, layers=1), tiny_model(2, layers=3))


@pytest.mark.usefixtures("flash_on_cpu")
class TestPagedSharedWeights(EngineConformance):
    @pytest.fixture
    def harness(self, flash_on_cpu):
        model = tiny_model(2, layers=3)
        return paged_harness(model, model)

    def test_draws_follow_q(self, harness):
        """As in the suite; the two prompts are what makes q differ from the teacher."""
        super().test_draws_follow_q(harness)


@pytest.mark.usefixtures("flash_on_cpu")
class TestRunningAhead(EngineConformance):
    @pytest.fixture
    def harness(self, flash_on_cpu):
        models = tiny_model(1, layers=1), tiny_model(2, layers=3)
        return paged_harness(*models, ahead=True, draft_tokens=0)


def texts(completions):
    return {key: (c.token_ids, c.finish_reason) for key, c in by_key(completions).items()}


@pytest.fixture(scope="module")
def models():
    return tiny_model(1, layers=1), tiny_model(2, layers=3)


@pytest.mark.parametrize("attention", ["varlen", "flash_attn"])
@pytest.mark.parametrize("draft_tokens", [0, 3, "auto"])
def test_pages_give_the_texts_of_slots(models, attention, draft_tokens, flash_on_cpu):
    """Guards: positions or lengths off by one in pages; padding that reaches a row's text."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 24, new=60)
    expected = texts(engine_of(*models, attention="sdpa").generate(requests))
    for recorded in (False, True):
        engine = paged_engine(
            *models, attention=attention, draft_tokens=draft_tokens, recorded=recorded, batch_size=7
        )
        assert texts(engine.generate(requests)) == expected


def test_chunks_windows_and_preemption(flash_on_cpu):
    """Guards: an extent that moves while it grows; a preempted row with another row's pages."""
    changes = {"kind": "Mistral", "sliding_window": 20, "max_position_embeddings": 3000}
    models = [tiny_model(s, layers=2, **changes) for s in (1, 2)]
    vocab = dataclasses.replace(vocabulary(context=3000), stop_ids=frozenset())
    lengths = [3, 200, 250, 255, 256, 257, 500, 700]
    requests = [
        Request(str(n), 0, 0, tuple([2, 3, 5] * n)[:n], (1, 4) * (n // 2) + (3,), 30)
        for n in lengths
    ]
    expected = texts(engine_of(*models, vocab=vocab, attention="sdpa").generate(requests))
    per_token = sum(runner.bytes_per_token for runner in engine_of(*models).pair.runners.values())
    for pages in (4, 7, 40):
        memory = (pages + 1.5) * PAGE * per_token / 2**30
        engine = paged_engine(
            *models, vocab=vocab, prefill_chunk=100, kv_memory_gib=memory, batch_size=8
        )
        assert texts(engine.generate(requests)) == expected
        assert [m.pages for m in engine.loop.memory.managers] == [pages, pages]
        assert (engine.loop.scheduler.preemptions > 0) == (pages < 40)


def test_a_text_beyond_all_pages_fails_alone(models, flash_on_cpu):
    per_token = sum(runner.bytes_per_token for runner in engine_of(*models).pair.runners.values())
    engine = paged_engine(
        *[tiny_model(s, layers=2, max_position_embeddings=3000) for s in (1, 2)],
        vocab=vocabulary(context=3000),
        kv_memory_gib=4 * PAGE * per_token / 2**30,
    )
    small, large = (
        Request("s", 0, 0, (1, 2), (3,), 4),
        Request("l", 0, 0, (2,) * 900, (3,) * 900, 10),
    )
    done = by_key(engine.generate([large, small]))
    assert "KV cache" in done["l", 0].error
    assert done["s", 0].error == ""


def test_recorded_shapes_are_few_and_used_again(models, flash_on_cpu):
    """Guards: a recording per batch size, or per run."""
    engine = paged_engine(*models, draft_tokens=3, batch_size=16)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 40, new=40)
    before = FakeRecorder.recorded
    first = texts(engine.generate(requests))
    made = FakeRecorder.recorded - before
    assert 0 < made <= 14, "rows of 1, 2, 4, 8, 12, 16 and width 1 or 5 (or 4 at a text's end)"
    assert texts(engine.generate(requests)) == first
    assert FakeRecorder.recorded - before <= made + 6, (
        "shapes that came too seldom in the first run"
    )


def test_the_full_batch_is_recorded_before_the_first_round(models, flash_on_cpu):
    """Guards: shapes recorded at start-up that no round has, and a cache they spoil."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 16, new=12)
    for drafts, widths in ((0, 1 + 1), (3, 1 + 4), ("auto", 1 + 6)):
        engine = paged_engine(*models, draft_tokens=drafts, batch_size=16)
        before = FakeRecorder.recorded
        engine._new_loop().close()
        made = FakeRecorder.recorded - before
        assert made == 2 * widths, "keys up to 512, as the context is shorter, and one of chunks"
        runners = engine.pair.runners.values()
        shapes = {shape for r in runners for g in r.graphs.values() for shape in g._recorded}
        assert {shape.segments - shape.chunks for shape in shapes} == {16}
        expected = texts(engine_of(*models, attention="sdpa").generate(requests))
        assert texts(engine.generate(requests)) == expected


def test_a_model_that_cannot_be_recorded_runs_all_the_same(models, flash_on_cpu):
    """Guards: a crash in the third round of a model that waits for the host."""

    class Refusing:
        def __call__(self, forward):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine = paged_engine(*models)
    for runner in engine.pair.runners.values():
        runner.new_recorder = Refusing
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 8, new=20)
    expected = texts(engine_of(*models, attention="sdpa").generate(requests))
    assert texts(engine.generate(requests)) == expected
    assert "operation not permitted" in engine.notes()["cuda_graphs"]


def test_an_idle_rows_work_is_never_read(models, flash_on_cpu):
    """Guards: NaN from scratch memory that reaches a text."""
    engine = paged_engine(*models, batch_size=5)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 5, new=20)
    expected = texts(engine.generate(requests))
    for runner in engine.pair.runners.values():
        for memory in runner.released[0].memories():
            with torch.inference_mode():
                memory[:PAGE] = torch.nan
    assert texts(engine.generate(requests)) == expected


def test_a_cache_of_another_size_gives_its_memory_back(models, flash_on_cpu):
    """Guards: a run in another mode that is out of memory, as something refers to the last one."""
    engine = paged_engine(*models)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 4, new=5)
    texts(engine.generate(requests))
    before = [runner.released[0] for runner in engine.pair.runners.values()]
    engine.options = replace(engine.options, kv_memory_gib=0.002)
    texts(engine.generate(requests))
    assert [cache.memories() for cache in before] == [[], []]
    now = [runner.released[0] for runner in engine.pair.runners.values()]
    assert all(cache.memories() for cache in now)


def test_a_layer_whose_values_do_not_fit_has_no_keys_either():
    """Guards: KeyError in the run after one that was out of memory."""

    class TooLarge(torch.Tensor):
        def new_zeros(self, *shape):
            raise torch.OutOfMemoryError("CUDA out of memory")

    cache = PageCache(PageManager((0,), 1, 2), [])
    token = torch.ones(1, 1, 8)
    with pytest.raises(torch.OutOfMemoryError):
        cache.write(0, torch.tensor([0]), token, token.as_subclass(TooLarge))
    cache.write(0, torch.tensor([0]), token, token)
    assert len(cache.memories()) == 2


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_the_end_of_a_batch_runs_in_the_graphs_of_the_whole(models, draft_tokens, monkeypatch):
    """Guards: passes kernel by kernel for every number of rows that a batch shrinks to."""
    requests = [Request(str(i), 0, 0, (1, 2), (4, 5), 4 * (i + 1)) for i in range(8)]
    options = {"batch_size": 8, "draft_tokens": draft_tokens}
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    expected = texts(
        paged_engine(*models, recorded=False, vocab=vocab, **options).generate(requests)
    )
    unrecorded = []
    run = Graphs.__call__

    def counted(self, batch):
        if batch.shape not in self._recorded and not batch.shape.chunks:
            unrecorded.append((self, batch.shape))
        return run(self, batch)

    monkeypatch.setattr(Graphs, "__call__", counted)
    assert texts(paged_engine(*models, vocab=vocab, **options).generate(requests)) == expected
    assert all(count == 1 for count in Counter(unrecorded).values()), "recorded at once"
