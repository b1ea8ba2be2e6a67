"""Architectures of published models, and acceptance that is emulated at its rate."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimal_sampling.bench.architectures import ARCHITECTURES, RandomPair, architecture_named
from optimal_sampling.bench.baselines import transformers_generate
from optimal_sampling.bench.instruments import AcceptedDrafts
from optimal_sampling.bench.workload import Variant, memory_bandwidth, weight_bytes
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.layers import replace_linears
from optimal_sampling.errors import ConfigError, EngineError

PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
}
"""As the published weights have them."""


@pytest.fixture(scope="module")
def pair():
    models = ModelConfig(dtype="float32", device="cpu")
    made = RandomPair(models, "tiny", "tiny", prompt_tokens=5)
    made.equal_tokens = 40
    return made


def texts(engine, requests):
    return {c.request: c for c in engine.generate(requests)}


@pytest.mark.parametrize("uneven", ["nothing", "prompts", "all"])
def test_uneven_lengths_are_from_an_eighth_to_all(uneven):
    """Guards: a table of uneven lengths that has equal ones, and tokens of the Transformers loop
    that no request asked for."""
    models = ModelConfig(dtype="float32", device="cpu")
    pair = RandomPair(models, "tiny", "tiny", prompt_tokens=16)
    pair.uneven = uneven
    workload = pair.workload(12, 8)
    prompts = [len(request.teacher_prompt_ids) for request in workload.requests]
    asked = [request.max_new_tokens for request in workload.requests]
    assert (len(set(prompts)) > 3) == (uneven != "nothing")
    assert 2 <= min(prompts) <= max(prompts) <= 16
    assert (len(set(asked)) > 3) == (uneven == "all")
    assert 1 <= min(asked) <= max(asked) <= 8
    assert transformers_generate(pair, workload, 4, mix=True) == sum(asked)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"tiny", "tiny-hybrid"}))
def test_a_shape_has_the_parameters_of_its_model(name):
    """Guards: a benchmark of another model than the one that it names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_an_unknown_shape_is_told_the_known_ones():
    """Guards: a traceback for a typing mistake."""
    with pytest.raises(ConfigError, match=r"Qwen2\.5-3B.*Llama-3\.2-1B"):
        architecture_named("Qwen2.5-4B")


def test_shapes_of_two_vocabularies_are_refused():
    """Guards: a pair that cannot exist."""
    with pytest.raises(ConfigError, match="vocabularies"):
        RandomPair(ModelConfig(), "Llama-3.2-3B", "Qwen3-0.6B")


def test_a_vocabulary_is_cut_to_what_both_have():
    """Guards: ids that one of the two models has no row for."""
    assert RandomPair(ModelConfig(), "Qwen2.5-7B", "Qwen2.5-1.5B").vocabulary.size == 151_936


def test_weights_are_random_finite_and_not_the_global_state(pair):
    """Guards: NaN logits; two roles with the same weights; a benchmark that reseeds its caller."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = RandomPair(pair.models, "tiny", "tiny", prompt_tokens=5)
    work = again.workload(2, 2)
    captured = frozenset({"student_logits", "teacher_logits"})
    engine = again.engine(work, 2, Variant(draft_tokens=0, capture=captured))
    assert torch.equal(torch.rand(3), expected)
    for done in engine.generate(work.requests):
        student, teacher = done.captured["student_logits"], done.captured["teacher_logits"]
        assert student.isfinite().all()
        assert teacher.isfinite().all()
        assert not torch.equal(student, teacher)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
def test_drafts_are_accepted_at_the_rate(pair, rate):
    """Guards: a label that does not say what was emulated."""
    work = pair.workload(32)
    engine = pair.engine(work, 32, Variant(draft_tokens=1, acceptance=rate))
    done = texts(engine, work.requests)
    assert all(len(c.token_ids) == 40 and max(c.token_ids) < 512 for c in done.values())
    assert engine.recorder.drafts()["accepted"] == pytest.approx(rate, abs=0.06)


def test_acceptance_is_a_function_of_request_and_position():
    """Guards: a rate that depends on the draft length or on what shares the batch."""
    positions = torch.tensor([[0], [20]]) + torch.arange(12)
    long = AcceptedDrafts(0.5, torch.device("cpu")).at([7, 9], positions)
    rule = AcceptedDrafts(0.5, torch.device("cpu"))
    rule.at([1, 2**63 + 5], positions)
    one = rule.at([9], torch.tensor([[23, 24, 25, 26]]))
    assert (one[0] == long[1, 3:7]).all()
    assert (long[0] != long[1]).any()


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_the_share_of_accepted_drafts_is_the_rate(rate):
    """Guards: a table of another rate, or one that repeats after few positions."""
    keys = list(range(40))
    positions = torch.arange(1000).expand(40, -1)
    accepted = AcceptedDrafts(rate, torch.device("cpu")).at(keys, positions)
    error = (rate * (1 - rate) / accepted.numel()) ** 0.5
    assert abs(accepted.double().mean() - rate) <= 4 * error
    if 0 < rate < 1:
        assert (accepted[:, :500] != accepted[:, 500:]).any()


def test_lockstep_is_not_touched(pair):
    """Guards: emulation that changes what is drawn where nothing is drafted."""
    work = pair.workload(4)
    plain = texts(pair.engine(work, 4, Variant(draft_tokens=0, acceptance=0.0)), work.requests)
    other = texts(pair.engine(work, 4, Variant(draft_tokens=0, acceptance=1.0)), work.requests)
    assert {r: c.token_ids for r, c in plain.items()} == {r: c.token_ids for r, c in other.items()}


def test_the_twin_has_one_model(pair):
    """Guards: self-distillation that loads, and runs, two models."""
    work = pair.workload(1)
    loaded = pair.engine(work, 1)
    twin = pair.twin().engine(work, 1)
    assert twin.pair.shared
    assert (
        twin.pair.runners["student"]
        is twin.pair.runners["teacher"]
        is loaded.pair.runners["teacher"]
    )


def test_same_weights_are_made_once():
    """Guards: --same-weights that makes two models."""
    bench = RandomPair(ModelConfig(device="cpu"), "tiny", "tiny", same_weights=True)
    work = bench.workload(1, 2)
    engine = bench.engine(work, 1)
    assert len(list(engine.generate(work.requests))) == 1
    assert engine.pair.shared
    assert len(engine.recorder.loop.models) == 1


def test_the_recorder_sees_every_round(pair):
    """Guards: peaks that are read only when a text ends; decoding that counts prompts."""
    work = pair.workload(6)
    recorder = pair.engine(work, 3, Variant(draft_tokens=0)).record(work.requests)
    tokens = recorder.whole.tokens
    assert tokens == 240 == sum(recorder.lengths.values())
    assert recorder.most_rows == 3
    assert recorder.rounds == 80
    assert recorder.kv_bytes > 0
    # two rounds read prompts, nothing follows the last round
    assert recorder.decoding.tokens == tokens - 2 * 3 - 3
    assert recorder.decoding_rows == recorder.decoding.tokens


def test_the_recorder_ends_a_run(pair):
    """Guards: a budget of time that is not kept."""
    work = pair.workload(2)
    engine = pair.engine(work, 2)
    engine.stop = lambda rounds: True
    recorder = engine.record(work.requests)
    assert (recorder.rounds, recorder.whole.tokens, recorder.lengths) == (0, 0, {})
    # the models can be used again
    assert len(pair.engine(work, 2).record(work.requests).lengths) == 2


def test_a_text_that_fails_ends_a_measurement(pair):
    """Guards: a figure that is high because texts failed."""
    work = pair.workload(1)
    request = replace(work.requests[0], teacher_prompt_ids=(0,) * 5000)
    with pytest.raises(EngineError):
        pair.engine(work, 1).record([request])


def test_the_roofline_counts_what_is_read():
    """Guards: an embedding counted that is only looked up; a tied output layer forgotten."""
    shape = ARCHITECTURES["tiny"]
    # queries, keys and values, output, MLP
    layers = 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
    norms = 2 * (2 * 64 + 2 * 16) + 64
    model = shape.model(ModelConfig(dtype="float32", device="cpu"), seed=0)
    assert weight_bytes(model) == 4 * (layers + norms + 512 * 64)
    replace_linears(model)
    assert weight_bytes(model) == 4 * (layers + norms + 512 * 64)
    untied = shape.config()
    untied.tie_word_embeddings = False
    assert weight_bytes(AutoModelForCausalLM.from_config(untied)) == 4 * (layers + norms + 512 * 64)


def test_the_bound_is_bytes_over_bandwidth(pair):
    """Guards: weights of shared models counted twice, caches of one model only."""
    weights = weight_bytes(pair.loaded().pair.runners["teacher"].model)
    caches = 4 * 10 * 2 * (2 * 2 * 2 * 16 * 4)
    pair.bandwidth = 1e9
    assert pair.roofline(4, 10) == pytest.approx(4e9 / (2 * weights + caches))
    assert pair.twin().roofline(4, 10) == pytest.approx(4e9 / (weights + caches))
    assert memory_bandwidth(torch.device("cpu"), mebibytes=4) > 1e6
