"""Small tokenizers made on the spot: byte-level, one token per byte and per word given, markers as
asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from optimal_sampling.vocabulary import ModelTokens, Vocabulary

END = "<|im_end|>"
TEXT_END = "<|endoftext|>"
CHATML = (
    "{%- for m in messages -%}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)
SWITCHED = CHATML + (
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
    "<think>\n\n</think>\n\n{% endif -%}"
)
ALWAYS_OPEN = CHATML + "{%- if add_generation_prompt -%}<think>\n{% endif -%}"


def byte_alphabet() -> list[str]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(stand_ins) for byte in range(256)]


def make_tokenizer(
    markers: Sequence[str | AddedToken] = (TEXT_END, "<|im_start|>", END, "<think>", "</think>"),
    *,
    merges: Sequence[tuple[str, str]] = (),
    extra_words: Sequence[str] = (),
    eos: str = END,
    bos: str | None = None,
    chat_template: str | None = CHATML,
    adds: str = "",
) -> PreTrainedTokenizerFast:
    """256 bytes, `extra_words`, then added `markers` (special unless they speak of thinking)."""
    words = [*byte_alphabet(), *extra_words]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=list(merges))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for marker in markers:
        text = str(marker.content) if isinstance(marker, AddedToken) else marker
        special = marker.special if isinstance(marker, AddedToken) else "think" not in text
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=special)])
    if adds:
        names = adds.replace("$A", "").split()
        ids = [(name, tokenizer.token_to_id(name)) for name in names]
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    fast.chat_template = chat_template
    return fast


def tokens(tokenizer: Any = None, name: str = "model", **fields: Any) -> ModelTokens:
    tokenizer = tokenizer or make_tokenizer()
    fields.setdefault("end_ids", frozenset({tokenizer.eos_token_id}))
    return ModelTokens(name=name, tokenizer=tokenizer, **fields)


def vocabulary_of(student: Any = None, teacher: Any = None) -> Vocabulary:
    student = student or make_tokenizer()
    return Vocabulary.share(tokens(student, "student"), tokens(teacher or student, "teacher"))


CORPUS = [
    "The quick brown fox jumps over the lazy dog. 1 + 1 = 2",
    "  two  spaces\nand a line\n\nnaïve café 你好 Привет",
    "print('hello'); x = f(y)\t# tab <|im_end|>",
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


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., str]:
    """Writes a model's folder without weights: tokenizer, config and, where given, a generation
    config.
    """

    def write(
        name: str,
        config: dict[str, Any],
        generation: dict[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> str:
        folder = tmp_path / name
        (tokenizer or make_tokenizer()).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return str(folder)

    return write
