"""A third kind of memory beside slots and pages: Transformers' own cache, one row at a time."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache

from optimal_sampling.engines.local.memory import BlockManager
from optimal_sampling.engines.local.runner import Cache, ForwardPass, ModelRunner
from tests.engines.conformance import Harness, by_key, requests_of
from tests.engines.local.conftest import CONTEXT, VOCAB, engine_of, tiny_model, vocabulary
from tests.engines.local.test_engine import PROMPTS


class OwnManager(BlockManager):
    """Bytes of caches that grow token by token."""

    def __init__(self, contexts, bytes_per_token):
        super().__init__(contexts, bytes_per_token)
        self._held = 0

    @property
    def held(self):
        return self._held

    def bytes_needed(self, lengths, width):
        return sum(self.row_lengths(lengths, width)) * self.bytes_per_token

    def has_room(self, lengths, width):
        return False

    def reserve(self, lengths, width):
        self._held = self.bytes_needed(lengths, width)


class OwnCache(Cache):
    def __init__(self, manager):
        self.manager = manager
        self.rows = {}

    def make_room(self, lengths, width):
        self.manager.reserve(lengths, width)

    def move(self, source, target, count):
        self.rows[target] = self.rows.pop(source)

    def clear(self, row):
        self.rows.pop(row, None)

    def release(self):
        self.rows.clear()


class OwnRunner(ModelRunner[OwnCache]):
    """A model with its stock attention."""

    def open_cache(self, contexts, tokens, sequences):
        return OwnCache(OwnManager(contexts, self.bytes_per_token))

    @torch.inference_mode()
    def forward(self, cache, tokens, start, idle=(), chunks=()):
        for chunk in chunks:
            self._feed(cache, chunk.row, chunk.start, chunk.ids)
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row in set(range(len(tokens))) - set(idle):
            logits[row] = self._feed(cache, row, int(start[row]), tokens[row].tolist())
        return ForwardPass(logits)

    def _feed(self, cache, row, start, ids):
        if start == 0:
            cache.rows[row] = DynamicCache(config=self.model.config)
        held = cache.rows[row]
        if held.get_seq_length() > start:
            held.crop(start - held.get_seq_length())
        out = self.model(torch.tensor([ids]), past_key_values=held, use_cache=True)
        return out.logits[0, :, : self.vocab_size]


@pytest.mark.parametrize("own", [("teacher",), ("student", "teacher")])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_a_third_kind_of_memory_needs_no_change_elsewhere(own, draft_tokens):
    """Guards: code outside of a kind's runner, cache and manager that asks which kind it is."""
    models = {"student": tiny_model(1, layers=1), "teacher": tiny_model(2, layers=3)}
    stock = copy.deepcopy(models)
    endless = vocabulary(stop_ids=frozenset())
    engine = engine_of(
        *models.values(), vocab=endless, batch_size=5, draft_tokens=draft_tokens, prefill_chunk=9
    )
    runners = dict(engine.pair.runners)
    for role in own:
        size = runners[role].bytes_per_token
        stock[role].set_attn_implementation("eager")
        runners[role] = OwnRunner(stock[role], VOCAB, size)
    other = copy.copy(engine)
    other.pair = dataclasses.replace(engine.pair, runners=runners)
    per_token = sum(runner.bytes_per_token for runner in runners.values())
    other.options = dataclasses.replace(engine.options, kv_memory_gib=180 * per_token / 2**30)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 8, new=40)
    expected = {k: c.token_ids for k, c in by_key(engine.generate(requests)).items()}
    found = {k: c.token_ids for k, c in by_key(other.generate(requests)).items()}
    assert found == expected
    assert other.loop.scheduler.preemptions > 0
