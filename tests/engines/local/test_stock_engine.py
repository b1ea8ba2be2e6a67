"""The engine with models that run with their own cache."""

import re
import time

import pytest
import torch

from optimal_sampling.engines.local.shrinking import POSITIONS, VOCAB, small_model
from optimal_sampling.engines.local.stock_runner import StockRunner
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.types import Request
from tests.engines.conformance import EngineConformance
from tests.engines.local import families
from tests.engines.local.conftest import engine_of, tiny_model, vocabulary
from tests.engines.local.test_engine import harness_of

pytestmark = pytest.mark.filterwarnings("ignore")


def recurrent(seed):
    return tiny_model(
        seed, kind="Mamba2", scale=0.2, num_heads=8, head_dim=8, n_groups=1, state_size=8
    )


class TestRecurrent(EngineConformance):
    """A recurrent student and a hybrid teacher, through the whole suite."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        return harness_of(recurrent(1), tiny_model(2, kind="Bloom", n_head=4, n_layer=2))


def test_one_model_may_be_native():
    """Guards: pairs of which only one has a cache of its own."""
    engine = engine_of(recurrent(1), tiny_model(2))
    assert isinstance(engine.pair.runners["student"], StockRunner)
    assert not isinstance(engine.pair.runners["teacher"], StockRunner)
    assert "in 0 of its 2 layers" in engine.notes()["attention"]


@pytest.mark.parametrize("invariant", [False, True])
def test_rows_of_one_length_share_forward_passes(invariant):
    """Guards: a batch that the check at load finds right, and that no engine ever makes."""
    vocab = vocabulary(stop_ids=frozenset())
    engine = engine_of(recurrent(1), tiny_model(2), vocab=vocab, batch_invariant=invariant)
    student = engine.pair.runners["student"]
    calls = []
    student.model.register_forward_hook(lambda *args: calls.append(1))
    rows = [Request(f"r{i}", 0, i, (3, 4, 5 + i), (3,), 6) for i in range(4)]
    assert all(len(done.token_ids) == 6 for done in engine.generate(rows))
    assert len(calls) == (24 if invariant else 6)
    how = "the same bits in any batch" if invariant else "all rows in one batch"
    assert how in engine.notes()["attention"]


def test_prompts_of_all_lengths_share_forward_passes():
    """Guards: rows that run one by one because their prompts differ in length."""
    vocab = vocabulary(stop_ids=frozenset())
    engine = engine_of(recurrent(1), tiny_model(2), vocab=vocab, batch_invariant=False)
    student = engine.pair.runners["student"]
    calls = []
    student.model.register_forward_hook(lambda *args: calls.append(1))
    rows = [Request(f"r{i}", 0, i, (3,) * (i + 1), (4,) * (9 - i), 3 + i) for i in range(4)]
    together = {done.request.id: done.token_ids for done in engine.generate(rows)}
    assert {name: len(ids) for name, ids in together.items()} == {
        row.id: row.max_new_tokens for row in rows
    }
    assert len(calls) == 6
    for row in rows:
        [alone] = engine.generate([row])
        assert alone.token_ids == together[row.id]


def test_weights_that_filler_reaches_run_by_length():
    """Guards: a check on a small copy alone, where it is the weights or the kernels of the model
    itself that let filler through."""
    model = recurrent(1)

    def unmasked(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    model.register_forward_pre_hook(unmasked, with_kwargs=True)
    engine = engine_of(model, tiny_model(2), batch_invariant=False)
    assert engine.pair.runners["student"].batching == "by_length"
    assert "rows of one length together" in engine.notes()["attention"]


@pytest.mark.parametrize("long_role", ["student", "teacher"])
def test_a_row_moves_before_one_of_its_models_has_cached_a_token(long_role):
    """Guards: a KeyError that ends the whole call, where a prompt has one token and the other
    model's prompt is still being read."""
    vocab = vocabulary(12, 3000, frozenset())
    models = [recurrent(1), tiny_model(2, max_position_embeddings=3000)]
    engine = engine_of(*models, vocab=vocab, prefill_chunk=64)
    short, long = ((1,), (4,) * 200), ((1,), (4,) * 400)
    rows = [
        Request("a", 0, 0, (1,), (4,) * 5, 1),
        Request("b", 0, 0, *(long if long_role == "teacher" else long[::-1]), 2),
        Request("c", 0, 0, *(short if long_role == "teacher" else short[::-1]), 2),
    ]
    done = {each.request.id: each for each in engine.generate(rows)}
    assert {name: len(each.token_ids) for name, each in done.items()} == {"a": 1, "b": 2, "c": 2}
    alone = {r.id: next(iter(engine.generate([r]))).token_ids for r in rows}
    assert {name: each.token_ids for name, each in done.items()} == alone


def test_the_note_says_what_single_rows_cost():
    """Guards: a slow run that nothing announces, and a factor that nobody measured."""
    model = recurrent(1)
    model.register_forward_pre_hook(lambda *args: time.sleep(0.02))
    engine = engine_of(model, tiny_model(2))
    words = (
        r"the student model runs with the model's own cache: lockstep, .* about (\S+) times slower"
    )
    found = re.match(words, engine.notes()["attention"])
    assert 5 < float(found[1]) <= 9


def test_a_cache_that_cannot_drop_rows_runs_one_at_a_time():
    """Guards: a batch that fails when its first row ends."""
    model = small_model(*families.config_of("rwkv"), torch.float32)
    vocab = vocabulary(VOCAB, context=POSITIONS)
    engine = engine_of(model, model, vocab=vocab, batch_invariant=False)
    assert engine.pair.runners["teacher"].batching == "single"
    assert "rows in a batch have other logits" in engine.notes()["attention"]


def test_drafts_are_refused_where_they_cannot_be_taken_back():
    """Guards: an option that is ignored without a word."""
    engine = engine_of(recurrent(1), tiny_model(2), draft_tokens=4)
    with pytest.raises(ConfigError, match="runs with its own cache"):
        list(engine.generate([]))


def test_a_model_that_neither_way_is_right_is_refused():
    """Guards: a fallback that is wrong too."""
    vocab = vocabulary(VOCAB, context=POSITIONS)
    wrong = small_model(*families.config_of("doge (windows)"), torch.float32)
    with pytest.raises(ModelError, match="it cannot run with its own cache"):
        engine_of(wrong, wrong, vocab=vocab)
