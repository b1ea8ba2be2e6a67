"""Replies of vLLM, read strictly: `GOOD_VLLM` was recorded from a server."""

import copy

import numpy as np
import pytest

from optimal_sampling.engines.servers.replies import BadReply, decoded, token_list
from optimal_sampling.engines.servers.vllm_api import VllmDialect

VLLM = VllmDialect("toy-student", frozenset({"toy-student"}), 264, 272)
LIST = {"token_id:41": -0.25, "token_id:51": -2.25, "token_id:49": -2.75}
GOOD_VLLM = {
    "id": "cmpl-1",
    "object": "text_completion",
    "model": "toy-student",
    "choices": [
        {
            "index": 0,
            "text": "!",
            "logprobs": {
                "text_offset": [0],
                "token_logprobs": [-0.25],
                "tokens": ["token_id:41"],
                "top_logprobs": [LIST],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": [41],
            "prompt_logprobs": None,
            "prompt_token_ids": [49],
        }
    ],
    "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
}


def changed(reply, *path, value):
    reply = copy.deepcopy(reply)
    place = reply
    for name in path[:-1]:
        place = place[name]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return reply


TOP = ("choices", 0, "logprobs", "top_logprobs")
BAD_VLLM = {
    "no object": [],
    "no choices": changed(GOOD_VLLM, "choices", value=None),
    "too many choices": changed(GOOD_VLLM, "choices", value=GOOD_VLLM["choices"] * 2),
    "another model": changed(GOOD_VLLM, "model", value="toy-teacher"),
    "no log-probabilities": changed(GOOD_VLLM, "choices", 0, "logprobs", value=None),
    "two positions": changed(GOOD_VLLM, *TOP, value=[LIST, LIST]),
    "texts in place of ids": changed(GOOD_VLLM, *TOP, 0, value={"!": -0.2, "a": -2, "b": -3}),
    "a short list": changed(GOOD_VLLM, *TOP, 0, value={"token_id:1": -0.5}),
    "a text as number": changed(GOOD_VLLM, *TOP, 0, "token_id:41", value="-0.25"),
    "a huge id": changed(GOOD_VLLM, *TOP, 0, f"token_id:{10**30}", value=-9.0),
    "NaN": changed(GOOD_VLLM, *TOP, 0, "token_id:41", value=float("nan")),
    "a probability above 1": changed(GOOD_VLLM, *TOP, 0, "token_id:41", value=0.5),
    "an id spelt twice": changed(GOOD_VLLM, *TOP, 0, value=LIST | {"token_id:041": -9.0}),
    "no mass": changed(GOOD_VLLM, *TOP, 0, value=dict.fromkeys(LIST, -9999.0)),
    "less mass than the others can have": changed(
        GOOD_VLLM, *TOP, 0, value={"token_id:1": -2, "token_id:2": -2.5, "token_id:3": -9}
    ),
    "logits": changed(
        GOOD_VLLM, *TOP, 0, value={"token_id:1": -0.1, "token_id:2": -0.2, "token_id:3": -9}
    ),
}


def test_a_list_of_vllm_is_read():
    """Guards: ids or log-probabilities that are taken from the wrong place of a reply."""
    call = VLLM.next_tokens([49], 2)
    assert call.body["prompt"] == [49]
    found = call.read(GOOD_VLLM)
    assert found.ids.tolist() == [41, 51, 49]
    assert found.log_p.tolist() == [-0.25, -2.25, -2.75]
    assert (found.listed, found.is_full) == (2, False)


@pytest.mark.parametrize("name", BAD_VLLM)
def test_a_bad_reply_of_vllm_is_refused(name):
    """Guards: a reply that is not what was asked for, and is drawn from all the same."""
    with pytest.raises(BadReply):
        VLLM.next_tokens([49], 3).read(BAD_VLLM[name])


def test_a_draft_with_more_tokens_than_asked_for_is_refused():
    """Guards: tokens of another request, or lists that belong to other positions."""
    call = VLLM.draft([49], 2, 3, 0.0, 0)
    assert [each.token for each in call.read(GOOD_VLLM)] == [41]
    for tokens in ([], [41, 51], [41, 51, 49]):
        with pytest.raises(BadReply):
            call.read(changed(GOOD_VLLM, "choices", 0, "token_ids", value=tokens))


def test_chosen_ids_have_to_be_there():
    """Guards: a server that ignores `logprob_token_ids`, whose list is taken for an answer."""
    assert VLLM.chosen([49], [51, 41]).read(GOOD_VLLM) == {41: -0.25, 51: -2.25}
    with pytest.raises(BadReply, match="asked for the ids"):
        VLLM.chosen([49], [51, 7]).read(GOOD_VLLM)


@pytest.mark.parametrize(
    "content",
    [
        b'{"choices": [',
        b"[" * 9999,
        b"<html>",
        b"",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 2}',
    ],
)
def test_json_that_is_broken_is_refused(content):
    """Guards: half a reply, NaN, and a name that occurs twice, of which json keeps the last."""
    with pytest.raises(BadReply):
        decoded(content)


def test_padding_is_dropped_and_the_rest_normalised():
    """Guards: mass of padding ids in a full list, and -9999 taken for a probability."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=8)
    log_p = logits - np.log(np.exp(logits).sum())
    row = dict(enumerate(log_p.tolist())) | {3: -9999.0}
    found = token_list(row, 0, 6, rows=8)
    kept = np.where(np.arange(6) == 3, -np.inf, logits[:6])
    exact = kept - np.log(np.exp(kept).sum())
    assert found.is_full
    assert found.listed == 6
    assert sorted(found.ids.tolist()) == [*range(6)]
    np.testing.assert_allclose(found.log_p, exact[found.ids], rtol=0, atol=1e-12)
    with pytest.raises(BadReply, match="asked for all 6"):
        token_list({each: value for each, value in row.items() if each != 2}, 0, 6, rows=8)


def test_padding_in_a_list_is_not_among_the_listed():
    """Guards: a bound by the k-th probability where one of the k was dropped."""
    row = {5: -0.5, 9: -1.5, 2: -2.5, 1: -3.5}
    found = token_list(row, 3, 6)
    assert (found.ids.tolist(), found.listed) == ([5, 2, 1], 2)
