"""The stand-ins for a GPU, and what a round costs the host."""

import sys

import pytest

from optimal_sampling.bench import host
from optimal_sampling.bench.subcommands import HostOptions
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import Request

OPTIONS = HostOptions(batches=(2,), prompt_tokens=5, new_tokens=20, repeats=1)


def drawn(batch, draft_tokens, options=OPTIONS):
    """An engine of stand-ins and the texts that it draws."""
    engine = host.HostEngine.of(batch, draft_tokens, options)
    prompt = (1,) * options.prompt_tokens
    requests = [Request(str(i), i, 0, prompt, prompt, options.new_tokens) for i in range(batch)]
    return engine, list(engine.generate(requests))


def test_the_stand_ins_take_drafts_as_often_as_asked():
    """Guards: a benchmark of drafts in which none is accepted, or rounds of another width."""
    for acceptance, rounds in ((1.0, 4), (0.0, 20)):
        options = HostOptions(prompt_tokens=5, new_tokens=20, acceptance=acceptance)
        engine, done = drawn(3, 4, options)
        assert {len(text.token_ids) for text in done} == {20}
        assert engine.draft_counts.rounds == rounds
        assert len(done[0].trace) == 20


def test_a_wait_is_from_the_copy_to_the_next_replay():
    """Guards: rounds that read prompts or run eagerly, counted as if the GPU waited in them."""
    engine, _ = drawn(4, 0, HostOptions(prompt_tokens=1000, new_tokens=20))
    # two rounds read prompts, 2,048 tokens at a time; in the last, two rows are left, for which a
    # larger recorded shape stands in
    assert engine.draft_counts.rounds == 21
    assert len(engine.clock.waits) == 21 - 2
    assert all(wait > 0 for wait in engine.clock.waits)
    with pytest.raises(EngineError, match="new-tokens"):
        host.measure(1, 0, HostOptions(prompt_tokens=5, new_tokens=1, repeats=1))


def python_calls(batch, draft_tokens, new_tokens):
    """(Calls of Python functions, rounds) of drawing texts of this length."""
    options = HostOptions(prompt_tokens=5, new_tokens=new_tokens)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    drawn(batch, draft_tokens, options)
    sys.setprofile(count)
    try:
        engine, _ = drawn(batch, draft_tokens, options)
    finally:
        sys.setprofile(None)
    return calls, engine.draft_counts.rounds


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_calls_per_round_hardly_grow_with_the_batch(draft_tokens):
    """Guards: a Python function per row or token of a round: there were 48 and, with drafts, 96."""

    def per_round(batch):
        """Of the rounds by which longer texts have more: without admissions and ends."""
        short, long = (python_calls(batch, draft_tokens, tokens) for tokens in (40, 80))
        return (long[0] - short[0]) / (long[1] - short[1])

    assert (per_round(40) - per_round(8)) / 32 < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "batches"),
        ({"batches": ()}, "batches"),
        ({"draft_tokens": (-1,)}, "draft_tokens"),
        ({"acceptance": 1.5}, "acceptance"),
    ],
)
def test_impossible_options_are_refused(options, message):
    """Guards: a traceback, or an empty table, for a mistyped option."""
    with pytest.raises(ConfigError, match=message):
        HostOptions(**options)
