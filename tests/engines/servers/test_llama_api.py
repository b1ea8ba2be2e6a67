"""llama.cpp's dialect without a server: its replies, as recorded from one, read strictly."""

import asyncio
import copy
import json
import math

import httpx
import numpy as np
import pytest

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.connection import AttemptFailed, Connection
from optimal_sampling.engines.servers.dialect import AFFINITY
from optimal_sampling.engines.servers.llama_api import LlamaDialect
from optimal_sampling.engines.servers.model import ServedFacts
from optimal_sampling.engines.servers.pool import ClientPool
from optimal_sampling.engines.servers.probe import change_since, probe
from optimal_sampling.engines.servers.replicas import ReplicatedModel
from optimal_sampling.engines.servers.replies import BadReply
from optimal_sampling.engines.servers.scoring import ScoringTime, ScoringTimes
from optimal_sampling.engines.servers.statistics import ServerStatistics
from optimal_sampling.errors import ConfigError

LLAMA = LlamaDialect("toy", frozenset({"toy"}), 264, 264, whole=97)
ENTRIES = [
    {"id": 51, "token": "3", "bytes": [51], "logprob": -0.5014737844467163},
    {"id": 61, "token": "=", "bytes": [61], "logprob": -1.4535014629364014},
]
GOOD = {
    "index": 0,
    "model": "toy",
    "tokens": [51],
    "stop_type": "limit",
    "completion_probabilities": [{**ENTRIES[0], "top_logprobs": ENTRIES}],
}
NEXT = {"id": 169, "token": "é", "bytes": [195, 169], "logprob": -18.5, "top_logprobs": ENTRIES}
WITHIN_CHARACTER = {
    **GOOD,
    "tokens": [51, 195, 169],
    "completion_probabilities": [*GOOD["completion_probabilities"], NEXT],
}
"""The server gives no list of 195, the first half of a character."""
CARD = {
    "id": "toy",
    "aliases": ["toy"],
    "object": "model",
    "owned_by": "llamacpp",
    "meta": {"vocab_type": 2, "n_vocab": 264, "n_ctx_train": 4096, "n_embd": 96},
}
"""Of an older version, without the context of a slot."""
PROPS = {"default_generation_settings": {"params": {}, "n_ctx": 512}, "total_slots": 4}


def changed(*path, value):
    reply = copy.deepcopy(GOOD)
    place = reply
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return reply


LISTS = ("completion_probabilities", 0, "top_logprobs")
BAD = {
    "no lists": {name: each for name, each in GOOD.items() if name != LISTS[0]},
    "two positions": changed(LISTS[0], value=GOOD[LISTS[0]] * 2),
    "an id twice": changed(*LISTS, value=[ENTRIES[0], ENTRIES[0]]),
    "a short list": changed(*LISTS, value=ENTRIES[:1]),
    "no list": changed(*LISTS, value=[]),
    "NaN": changed(*LISTS, 0, "logprob", value=float("nan")),
    "null": changed(*LISTS, 0, "logprob", value=None),
    "another model": changed("model", value="another"),
    "no object": [],
}


def test_replies_are_read():
    """Guards: ids or log-probabilities that are taken from the wrong place of a reply."""
    found = LLAMA.next_tokens([49], 2).read(GOOD)
    assert found.ids.tolist() == [51, 61]
    assert found.log_p.tolist() == [each["logprob"] for each in ENTRIES]
    drafted = LLAMA.draft([49], 3, 2, 0.0, 0).read(GOOD)
    assert [each.token for each in drafted] == [51]
    replies = [{**GOOD, "index": place} for place in range(3)]
    lists = LLAMA.score([49], [51, 61], 2, "one_slot").read(replies)
    assert [each.listed for each in lists] == [2, 2, 2]
    with pytest.raises(BadReply, match="order"):
        LLAMA.score([49], [51, 61], 2, "one_slot").read(replies[::-1])
    assert not LLAMA.ends_text([49], 51).read(GOOD)
    assert LLAMA.ends_text([49], 51).read({**GOOD, "stop_type": "eos"})


def test_a_list_says_how_far_its_sum_may_be_off():
    """Guards: a bound that takes 1 minus the sum of a list as exact, where the server has added up
    all tokens in float32, one by one: what is below 6e-8 of the sum is lost.
    """
    large = LlamaDialect("toy", vocab_size=151_936, rows=151_936)
    found = large.next_tokens([49], 2).read(GOOD)
    probabilities = np.full(151_936, 2e-8, np.float32)
    probabilities[0] = 1
    lost = probabilities.astype(np.float64).sum() / np.cumsum(probabilities)[-1] - 1
    assert 1e-3 < lost < found.sum_error < 0.01
    assert LLAMA.next_tokens([49], 2).read(GOOD).sum_error < 2e-5


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reply_is_refused(name):
    """Guards: a reply that is not what was asked for, and is drawn from all the same."""
    with pytest.raises(BadReply):
        LLAMA.next_tokens([49], 2).read(BAD[name])


def test_a_probability_of_zero():
    """Guards: the lowest float32, which is written for -inf, taken for a log-probability."""
    row = [{"id": token, "logprob": 0.0 if token == 7 else -3.4028235e38} for token in range(264)]
    found = LLAMA.next_tokens([49], 264).read(changed(*LISTS, value=row))
    assert found.is_full
    assert found.log_p.tolist() == [0.0] + [-float("inf")] * 263


def test_a_list_is_asked_for_at_a_whole_character():
    """Guards: a token within a character as the likeliest one, whose list the server leaves out, so
    that a text fails; and samplers or biases of the server's command line in a draft.
    """
    listing = [LLAMA.next_tokens([49], 2).body, LLAMA.score([49], [51], 2, "one_slot").body]
    assert [body["logit_bias"] for body in listing] == [[[97, 1e5]]] * 2
    assert "post_sampling_probs" not in listing[0]  # so the bias is none of the list
    draft = LLAMA.draft([49], 3, 2, 0.0, 0).body
    assert (draft["logit_bias"], draft["samplers"]) == ([], ["temperature"])
    json.dumps(draft)


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        (WITHIN_CHARACTER, [51]),
        ({**BAD["no lists"], "tokens": [195, 195]}, []),
        ({**WITHIN_CHARACTER, "tokens": [195, 51, 169]}, []),
        ({**GOOD, "tokens": [51, 61], LISTS[0]: [*GOOD[LISTS[0]], {**NEXT, "id": 61}]}, [51, 61]),
        ({**GOOD, "tokens": [51, 61], LISTS[0]: [*GOOD[LISTS[0]], {"id": 61, LISTS[2]: []}]}, [51]),
    ],
)
def test_a_draft_ends_before_a_token_without_a_list(reply, tokens):
    """Guards: lists that are taken for those of the tokens before, where the server leaves one out
    (within a character) or empty (drafted by a model of its own).
    """
    drafted = LLAMA.draft([49], 3, 2, 0.0, 0).read(reply)
    assert [each.token for each in drafted] == tokens


@pytest.mark.parametrize(
    "reply",
    [
        {**GOOD, "tokens": []},
        {**GOOD, "tokens": [51] * 4},
        {**WITHIN_CHARACTER, "tokens": [51]},
        {**GOOD, "tokens": None},
        [GOOD],
    ],
)
def test_a_bad_draft_is_refused(reply):
    """Guards: more tokens than were asked for, or lists that belong to none."""
    with pytest.raises(BadReply):
        LLAMA.draft([49], 3, 2, 0.0, 0).read(reply)


def test_the_likeliest_token_stands_for_a_draft_without_lists():
    """Guards: a round without a token, which never ends."""

    model = scripted(BAD["no lists"], GOOD)
    drafted = asyncio.run(model.draft([49], 3, 2, 0.0, 0))
    assert [(each.token, each.choices.listed) for each in drafted] == [(51, 2)]


def scripted(*replies):
    """A started model with these replies to its next requests."""

    class Scripted(ReplicatedModel):
        async def _retried(self, call, among=(), seconds=None):
            return call.read(next(remaining))

    remaining = iter(replies)
    model = Scripted(Access(("http://a",)))
    model._dialect = LLAMA
    model._times = ScoringTimes({"one_slot": ScoringTime(0.0, 0.0, 0.001)}, 135)
    model.facts = ServedFacts("toy", "llama.cpp", 512, 264, 264, can_choose_ids=True)
    return model


def test_chosen_ids_by_their_probabilities_beside_the_likeliest():
    """Guards: the probabilities that biases made taken for the model's, an id that was not asked
    for, and a text that fails where the token drawn ends within a character.
    """
    log_p = {51: ENTRIES[0]["logprob"], 7: -12.5, 97: -9.0, 9: -40.0}
    raised = {token: value + (100 if token == 97 else 50) for token, value in log_p.items()}
    total = np.logaddexp.reduce([*raised.values()])
    probs = [
        {"id": token, "prob": float(np.exp(value - total))}
        for token, value in [*raised.items(), (60, -200.0)]
    ]
    reply = {**GOOD, "tokens": [97], LISTS[0]: [{"id": 97, "prob": 1.0, "top_probs": probs}]}
    found = asyncio.run(scripted(GOOD, reply).next_tokens([49], 2, [7, 9, 97, 51]))
    assert found.ids.tolist() == [51, 61, 7, 9, 97]
    expected = [*(each["logprob"] for each in ENTRIES), *(log_p[token] for token in (7, 9, 97))]
    np.testing.assert_allclose(found.log_p, expected, rtol=0, atol=1e-9)
    assert found.listed == 2
    lacking = asyncio.run(scripted(GOOD, BAD["no lists"]).next_tokens([49], 2, [7]))
    assert lacking.ids.tolist() == [51, 61]
    body = LLAMA.chosen([49], [51, 7]).body
    assert (body["temperature"], body["n_probs"], body["post_sampling_probs"]) == (1.0, 3, True)


def test_a_text_keeps_its_slot():
    """Guards: prefixes of a draft in all slots, each of which has to catch up with the text, and
    loses what it has of another one.
    """
    slots = LlamaDialect("toy", slots=4)
    token = AFFINITY.set(7)
    try:
        assert slots.score([49] * 9, [51, 61], 2, "one_slot").body["id_slot"] == 3
        assert slots.chosen([49] * 9, [51, 61]).body["id_slot"] == 3
        assert "id_slot" not in slots.next_tokens([49], 2).body
    finally:
        AFFINITY.reset(token)


def test_a_full_cache_means_fewer_requests():
    """Guards: texts that fail after eight attempts, where slots share a cache that is full."""
    access = Access(("http://a",))
    connection = Connection("http://a", ClientPool(), access, ServerStatistics())
    text = {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}
    with pytest.raises(AttemptFailed, match="Context size") as failed:
        connection._read(LLAMA.next_tokens([49], 2), httpx.Response(500, json={"error": text}))
    assert (failed.value.kind, failed.value.is_down) == ("rate_limited", False)
    assert failed.value.may_take_long


ACCESS = Access(("http://a",), vocab_size=264)


def asker(card, props):
    """A server that says so of itself, with all tokens equally likely."""

    async def ask(call):
        body = call.body or {}
        if call.path in ("/v1/models", "/props"):
            return call.read({"data": [card]} if call.path == "/v1/models" else props)
        if call.path == "/tokenize":
            return call.read({"tokens": [*body["content"].encode()]})
        row = [
            {"id": token, "logprob": -math.log(264), "prob": 1 / 264}
            for token in range(body["n_probs"])
        ]
        reply = {**GOOD, LISTS[0]: [{"id": 51, LISTS[2]: row, "top_probs": row}]}
        prompt = body["prompt"]
        if isinstance(prompt[0], list):
            return call.read([{**reply, "index": place} for place in range(len(prompt))])
        return call.read(reply)

    return ask


def facts_of(card, props):
    """What the start finds."""
    return asyncio.run(probe(asker(card, props), ACCESS, "http://a"))


def test_the_context_is_that_of_a_slot():
    """Guards: the context that the model was trained with, where a slot has a part of it."""
    found = facts_of(CARD, PROPS)
    assert (found.facts.kind, found.facts.context_length) == ("llama.cpp", 512)
    assert (found.facts.max_top_k, found.facts.vocab_size) == (264, 264)
    assert (found.dialect.slots, found.dialect.whole) == (4, 97)
    assert found.facts.can_choose_ids
    assert found.times.ways.keys() == {"one_slot"}


def test_a_server_with_another_context_is_another_one():
    """Guards: a server that is taken for another one, as /v1/models lacks its context, and one that
    was started again with a shorter context, which is not noticed.
    """
    found = facts_of(CARD, PROPS)
    shorter = {**PROPS, "default_generation_settings": {"n_ctx": 256}}
    changes = [
        asyncio.run(change_since(found, asker(CARD, props), ACCESS)) for props in (PROPS, shorter)
    ]
    assert changes == ["", "its context length is 256, and was 512"]


def test_a_server_that_does_not_say_what_it_has():
    """Guards: a traceback at a server without a model, or one that still loads it."""
    router = {"role": "router", "default_generation_settings": {"params": None, "n_ctx": 0}}
    with pytest.raises(ConfigError, match="--model"):
        facts_of({**CARD, "meta": None}, router)
    with pytest.raises(ConfigError, match="how many tokens"):
        facts_of({**CARD, "meta": None}, PROPS)
    with pytest.raises(BadReply, match="0 slots"):
        facts_of(CARD, {**PROPS, "total_slots": 0})
