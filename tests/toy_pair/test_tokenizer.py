import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_training_data import build_tokenizer
from transformers import AutoTokenizer

from optimal_sampling import toy_pair

BUILT = build_tokenizer()
SHIPPED = AutoTokenizer.from_pretrained(toy_pair.path("toy-teacher"))
MARKERS = [
    "<|endoftext|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    r"\boxed{",
]
any_text = st.lists(st.text() | st.sampled_from(MARKERS)).map("".join)


@given(any_text)
def test_any_text_goes_through_unchanged(text: str):
    assert SHIPPED.decode(SHIPPED.encode(text)) == text


@given(any_text)
def test_the_shipped_tokenizer_is_the_one_that_is_built(text: str):
    assert SHIPPED.encode(text) == BUILT.encode(text)


@given(st.binary(max_size=40).map(lambda b: b.decode("utf-8", "ignore")))
def test_a_byte_is_its_own_id(text: str):
    if not any(marker in text for marker in MARKERS):
        assert SHIPPED.encode(text) == list(text.encode())


def test_digits_are_apart_and_markers_whole():
    assert SHIPPED.encode("2026") == [50, 48, 50, 54]
    for marker in MARKERS:
        assert len(SHIPPED.encode(marker)) == 1, marker
    assert len({SHIPPED.encode(marker)[0] for marker in MARKERS}) == len(MARKERS)


def test_both_models_have_the_same_ids():
    student = AutoTokenizer.from_pretrained(toy_pair.path("toy-student"))
    assert student.get_vocab() == SHIPPED.get_vocab() == BUILT.get_vocab()
    assert len(SHIPPED) == 264


def test_thoughts_and_boxes_stay_where_roles_are_skipped():
    """Guards the grading: a decoder that drops the box drops every answer."""
    ids = SHIPPED.encode(r"<|assistant|><think>x</think>\boxed{3}<|end|><|endoftext|>")
    assert SHIPPED.decode(ids, skip_special_tokens=True) == r"<think>x</think>\boxed{3}"


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_chat_template(options):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "47*3=?"}]
    prompt = SHIPPED.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options
    )
    assert prompt == "<|system|>Be brief.<|end|><|user|>47*3=?<|end|><|assistant|>"
    messages.append({"role": "assistant", "content": "141"})
    whole = SHIPPED.apply_chat_template(messages, tokenize=False, **options)
    assert whole == prompt + "141<|end|>"
