"""Markers of reasoning are found in chat templates, and stay in the text of a completion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from optimal_sampling.vocabulary.thinking import KNOWN_BLOCKS, thinking_blocks

from .conftest import ALWAYS_OPEN, CHATML, END, SWITCHED, TEXT_END, make_tokenizer, vocabulary_of

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
    "template", [None, CHATML, "{{ raise_exception('no') }}", "{{ messages[0].content }}", "x", ""]
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


CORPUS = [
    "The quick brown fox jumps over the lazy dog. 1 + 1 = 2",
    "  two  spaces\nand a line\n\nnaïve café 你好 Привет",
    "print('hello'); x = f(y)\t# tab",
]


def byte_level(space_first: bool) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)


def unigram(scheme: str) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return tokenizer, trainer


def llama() -> Any:
    """As Llama 2 and Mistral: sentencepiece's BPE with bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, BpeTrainer(vocab_size=420, special_tokens=known, show_progress=False)


def word_pieces() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer, WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )


KINDS = {
    "byte-level": byte_level(space_first=False),
    "byte-level with a space first": byte_level(space_first=True),
    "unigram, always": unigram("always"),
    "unigram, first": unigram("first"),
    "unigram, never": unigram("never"),
    "llama": llama(),
    "word pieces": word_pieces(),
}


def trained(kind: str) -> Any:
    """A small tokenizer of a kind, trained on CORPUS."""
    tokenizer, trainer = KINDS[kind]
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    added = [each for each in state["added_tokens"] if not each["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": added}))
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


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
