"""Markers of reasoning are found in chat templates, and stay in the text of a completion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS, thinking_blocks

from .conftest import (
    ALWAYS_OPEN,
    CHATML,
    CORPUS,
    END,
    KINDS,
    SWITCHED,
    TEXT_END,
    make_tokenizer,
    trained,
    vocabulary_of,
)

REPLY = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.reasoning_content %}OPEN{{ m.reasoning_content }}CLOSE{% endif -%}"
    "{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
HARMONY = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"


def shown(opening: str, closing: str) -> str:
    """A chat template that shows `reasoning_content` between two markers."""
    return REPLY.replace("OPEN", opening).replace("CLOSE", closing)


def switched(tail: str) -> str:
    """A chat template that ends its prompts with `tail` where thinking is off."""
    return SWITCHED.replace("<think>\n\n</think>\n\n", tail)


@pytest.mark.parametrize(
    ("template", "block"),
    [
        (shown("<think>\n", "\n</think>\n\n"), ("<think>", "</think>")),
        (shown("<|mull|>", "<|said|>"), ("<|mull|>", "<|said|>")),
        (shown(*HARMONY), HARMONY),
        (shown("<seed:think>", "</seed:think>"), ("<seed:think>", "</seed:think>")),
        (switched("<ponder>\n\n</ponder>\n"), ("<ponder>", "</ponder>")),
        (
            switched("<|START_MUSING|><|END_MUSING|>"),
            ("<|START_MUSING|>", "<|END_MUSING|>"),
        ),
        (ALWAYS_OPEN, ("<think>", "</think>")),
        (CHATML.replace("assistant\n", "assistant\n◁muse▷"), ("◁muse▷", "◁/muse▷")),
    ],
)
def test_markers_are_found_in_the_template(template: str, block: tuple[str, str]) -> None:
    """Guards: a model whose markers are in no list, whose reasoning runs into its answer."""
    assert thinking_blocks(make_tokenizer(chat_template=template)) == (block,)


@pytest.mark.parametrize(
    "template",
    [
        None,
        CHATML,
        "{{ raise_exception('no') }}",
        "{{ messages[0].content }}",
        "x",
        "",
        "{% if add_generation_prompt %}<answer>{% endif %}" + CHATML,
        shown("<r>", "y" * 81),
    ],
)
def test_template_without_thinking_has_no_markers(template: str | None) -> None:
    """Guards: tags of a prompt, or the text of a turn, taken for a block of reasoning."""
    assert thinking_blocks(make_tokenizer(chat_template=template)) == ()


@pytest.mark.parametrize(
    ("template", "block"),
    [(CHATML, block) for block in KNOWN_BLOCKS]
    + [(shown("<|mull|>", "<|said|>"), ("<|mull|>", "<|said|>")), (shown(*HARMONY), HARMONY)],
)
def test_markers_between_reasoning_and_answer_stay_in_the_text(
    template: str, block: tuple[str, str]
) -> None:
    """Guards: harmony channels, Cohere's, Seed's and Kimi's markers dropped as special tokens, so
    that nobody can tell the answer from the reasoning.
    """
    harmony = ["<|start|>", "<|end|>", "<|channel|>", "<|message|>"]
    opening, closing = block
    whole = [] if "<|message|>" in opening else [*block]
    names = dict.fromkeys([TEXT_END, "<|im_start|>", END, *harmony, *whole])
    tokenizer = make_tokenizer(
        [AddedToken(name, special=True) for name in names], chat_template=template
    )
    vocabulary = vocabulary_of(tokenizer)
    text = f"{opening}2+2 is 5? No.{closing}4"
    ids = tokenizer(f"{text}<|im_start|>!{END}").input_ids
    assert vocabulary.decode(ids) == f"{text}!"
    assert vocabulary.decode_raw(ids) == f"{text}<|im_start|>!"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_the_whole_text(kind: str) -> None:
    """Guards: the space that sentencepiece's decoders drop from the start of a completion, which
    joins its first word to the prompt.
    """
    tokenizer = trained(kind)
    vocabulary = vocabulary_of(tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted(set(range(len(tokenizer))) - special)
    ordinary = st.lists(st.sampled_from(ids), max_size=12)

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    @given(prompt=st.sampled_from(CORPUS), completion=ordinary)
    def check(prompt: str, completion: list[int]) -> None:
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        whole = decoded([*prompt_ids, *completion])
        assert decoded(prompt_ids) + vocabulary.decode(completion) == whole

    check()
    assert vocabulary.decode([]) == ""
