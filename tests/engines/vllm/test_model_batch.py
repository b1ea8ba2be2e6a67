"""Tokens of a step for one model, against a token-by-token reference."""

import random

import pytest
import torch

from optimal_sampling.engines.vllm.model_batch import ModelBatch, Span


def naive_tokens(spans, planned):
    """(request, place, id, position) of every token that the model runs."""
    place = 0
    for request, span in enumerate(spans):
        shorter = 0 if span.own_ids is None else span.prompt_length - len(span.own_ids)
        for position in range(span.computed, span.computed + span.scheduled):
            own = position - shorter
            if own >= 0:
                in_prompt = span.own_ids is not None and own < len(span.own_ids)
                token = int(span.own_ids[own]) if in_prompt else planned[place]
                yield request, place, token, own
            place += 1


@pytest.mark.parametrize("seed", range(60))
def test_every_token_is_where_the_reference_has_it(seed):
    """Guards: tokens or positions off by one where chunks of a shorter prompt begin or end."""
    rng = random.Random(seed)
    spans = []
    for _ in range(rng.randrange(5)):
        prompt_length = rng.randint(1, 8)
        own = torch.randint(100, 200, (rng.randint(1, prompt_length),))
        own_ids = rng.choice([None, own])
        spans.append(Span(rng.randint(1, 9), rng.randrange(12), prompt_length, own_ids))
    planned = [rng.randrange(100) for span in spans for _ in range(span.scheduled)]
    batch = ModelBatch.from_spans(spans, torch.tensor(planned, dtype=torch.int32))
    tokens = list(naive_tokens(spans, planned))
    requests = sorted({token[0] for token in tokens})
    columns = [
        [requests[owner] for owner in batch.owners.tolist()],
        batch.places.tolist(),
        batch.input_ids.tolist(),
        batch.positions.tolist(),
    ]
    assert list(zip(*columns, strict=True)) == tokens
    assert batch.requests == requests
    assert batch.query_lengths == [sum(token[0] == each for token in tokens) for each in requests]
    first = [min(t[3] for t in tokens if t[0] == each) for each in requests]
    own_prompts = [
        spans[each].prompt_length if spans[each].own_ids is None else len(spans[each].own_ids)
        for each in requests
    ]
    assert batch.is_prefilling == [
        place < length for place, length in zip(first, own_prompts, strict=True)
    ]
    assert batch.lengths == [max(t[3] for t in tokens if t[0] == each) + 1 for each in requests]
