"""What the shipped pair was trained on: solutions in four styles, with mistakes, and its tokenizer.

The tokenizer is byte-level: one token per byte and a few markers. Any text survives encoding and
decoding; each digit is a token.
"""

import random
from collections.abc import Collection
from typing import Literal, get_args

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from optimal_sampling.toy_pair.problems import (
    LARGEST,
    Compute,
    Problem,
    Step,
    exact,
    make_problem,
    results,
    tail,
    worked,
)

Style = Literal["A", "B", "C", "D"]
STYLES: tuple[Style, ...] = get_args(Style)
TRAINING_SEED = 4_000_000_007  # reserved: what the shipped pair was trained on
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


def solve(problem: Problem, style: Style = "A", compute: Compute = exact) -> str:
    """The worked solution. Styles differ from the end of the first operation on.

    A terse, B with partial results, C one line per step, D a chain of shrinking expressions.
    """
    steps = results(problem, compute)
    if style == "A":
        return worked(steps)
    box = rf"\boxed{{{steps[-1][3]}}}"
    if style == "B":
        lines = [_with_partial_results(step) for step in steps]
        return f"{'; '.join(lines)}. {box}"
    if style == "C":
        lines = [f"{left}{op}{right}=({result})\n" for left, op, right, result in steps]
        return "".join([*lines, box])
    chain = [f"{result}{tail(problem, index + 1)}" for index, (*_, result) in enumerate(steps)]
    return f"{'='.join([problem.expression, *chain])}. {box}"


def hinted(text: str, hint: str) -> str:
    """A user turn that also shows an answer or a solution."""
    return f"{text}\nHint: {hint}"


def wrong(result: int, rng: random.Random) -> int:
    """A plausible wrong result: off by one, two, ten, twenty or a hundred."""
    offsets = [sign * size for sign in (1, -1) for size in (1, 2, 10, 20, 100)]
    near = [result + offset for offset in offsets if 0 <= result + offset <= LARGEST]
    return rng.choice(near or [LARGEST])  # after several mistakes no offset may be in range


def wrong_at(problem: Problem, steps: Collection[int], rng: random.Random) -> Compute:
    """A `compute` with a fixed wrong result at some steps; later steps start from it."""
    mistaken = {step: wrong(results(problem)[step][3], rng) for step in sorted(steps)}

    def compute(left: int, operator: str, right: int, index: int) -> int:
        return mistaken[index] if index in mistaken else max(exact(left, operator, right), 0)

    return compute


def build_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes (ids 0..255, by value), then the markers.

    The chat template ignores `enable_thinking`: the models never think.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(tokenizer)


def build_number_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on solutions: numbers of up to three digits are mostly one token.

    Of the models here, only the student with this tokenizer has it.
    """
    rng = random.Random(TRAINING_SEED)
    texts = [make_problem(TRAINING_SEED, rng.randrange(10**6)) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}|[^\d]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(vocab_size=1400, initial_alphabet=_byte_characters(), show_progress=False)
    tokenizer.train_from_iterator(
        (f"{problem.text} {solve(problem, style)}" for problem in texts for style in STYLES),
        trainer,
    )
    return _finished(tokenizer)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With the decoder, the markers and the chat template."""
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


def _with_partial_results(step: Step) -> str:
    """`47*3=40*3+7*3=120+21=141` or `141+85=141+80+5=221+5=226`."""
    left, op, right, result = step
    if op == "*":
        tens, ones = left - left % 10, left % 10
        parts = f"{tens}*{right}+{ones}*{right}={tens * right}+{ones * right}"
    else:
        tens, ones = right - right % 10, right % 10
        parts = f"{left}{op}{tens}{op}{ones}={exact(left, op, tens)}{op}{ones}"
    return f"{left}{op}{right}={parts}={result}"
