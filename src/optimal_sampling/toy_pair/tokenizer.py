"""The byte-level tokenizer of the shipped pair: one token per byte and a few markers.

Any text survives encoding and decoding; each digit is a token. Needs `tokenizers` and
`transformers`, not torch.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
END = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
ORDINARY = ("<think>", "</think>", r"\boxed{")  # kept when special tokens are skipped

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes (ids 0..255, by value), then the markers.

    The chat template ignores `enable_thinking`: the models never think.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in (PAD, END, *ROLES)]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte value."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = (chr(256 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(stand_ins) for byte in range(256)]
