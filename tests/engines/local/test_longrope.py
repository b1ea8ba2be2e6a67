"""LongRoPE models in the engine: every row as if it ran alone, across the switch of factors."""

import copy

import pytest
import torch

from optimal_sampling.engines.local.model_check import stock_logits
from optimal_sampling.engines.local.shrinking import POSITIONS, VOCAB, small_model
from optimal_sampling.engines.local.slots.slot_runner import SlotRunner
from optimal_sampling.types import Request
from tests.engines.local import families
from tests.engines.local.conftest import engine_of, vocabulary

SWITCH = 24
LENGTHS = (3, 21, 23, 24, 25, 38)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models():
    """A student that has LongRoPE too, and its teacher."""
    student = small_model(*families.config_of("phi3 (LongRoPE)"), torch.float32)
    teacher = small_model(*families.config_of("phimoe (LongRoPE)"), torch.float32)
    return student, teacher


def requests():
    ids = [list(range(5 + length, 5 + 2 * length)) for length in LENGTHS]
    return [Request(f"r{i}", 0, i, tuple(text), (7, *text), 16) for i, text in enumerate(ids)]


def completions(models, capture=frozenset(), **options):
    vocab = vocabulary(VOCAB, context=POSITIONS, stop_ids=frozenset())
    engine = engine_of(*map(copy.deepcopy, models), vocab=vocab, **options)
    assert all(isinstance(r, SlotRunner) for r in engine.pair.runners.values())
    done = engine.view(capture=capture).generate(requests())
    return sorted(done, key=lambda c: c.request.id)


def test_every_token_has_the_logits_of_its_row_alone(models):
    """Guards: a short row with the factors of its batch's longest row; keys of mixed factors."""
    capture = frozenset({"student_logits", "teacher_logits"})
    for done in completions(models, capture, prefill_chunk=5):
        assert done.finish_reason == "length"
        for role, model, prompt in (
            ("student", models[0], done.request.student_prompt_ids),
            ("teacher", models[1], done.request.teacher_prompt_ids),
        ):
            stock = copy.deepcopy(model)
            with torch.inference_mode():
                expected = stock_logits(stock, [*prompt, *done.token_ids[:-1]], len(prompt))
            found = done.captured[f"{role}_logits"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_drafts_and_batches_change_no_text(models):
    """Guards: a round that straddles the switch, and texts that differ with `--batch-size`."""
    expected = [c.token_ids for c in completions(models, batch_size=1, draft_tokens=0)]
    for options in (
        {"batch_size": 32, "draft_tokens": 0},
        {"batch_size": 32, "draft_tokens": 4},
        {"batch_size": 1, "draft_tokens": 4},
        {"batch_size": 32, "draft_tokens": "auto", "prefill_chunk": 3},
    ):
        assert [c.token_ids for c in completions(models, **options)] == expected


def test_texts_are_those_of_stock_generate(models):
    """Guards: a switch one token early or late."""
    teacher = models[1]
    for done in completions(models, frozenset({"teacher_logits"}), draft_tokens=4):
        prompt = done.request.teacher_prompt_ids
        stock = copy.deepcopy(teacher)
        generated = stock.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        greedy = generated.sequences[0, len(prompt) :].tolist()
        same = [a == b for a, b in zip(greedy, done.token_ids, strict=True)]
        shared = same.index(False) + 1 if False in same else len(same)
        logits = torch.cat(generated.logits)[:shared]
        found = done.captured["teacher_logits"][:shared]
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)
