"""Real tokenizers from `../shared/data/tokenizers` as Transformers' fast ones."""

import base64
import functools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimal_sampling.vocabulary.token_bytes import byte_of_letter

SHARED = Path(__file__).parents[2] / "../shared/data"
FOLDER = SHARED / "tokenizers"
NAMES = ("gpt2", "whisper", "mistral")
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def real_tokenizer(name):
    """`gpt2` and `whisper`: byte-level BPE. `mistral`: SentencePiece with byte pieces."""
    return {
        "gpt2": lambda: _byte_level(FOLDER / "gpt2.tiktoken"),
        "whisper": lambda: _byte_level(FOLDER / "whisper_multilingual.tiktoken"),
        "mistral": lambda: _sentencepiece(FOLDER / "mistral_v3_sentencepiece.model"),
    }[name]()


def _byte_level(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = {byte: letter for letter, byte in byte_of_letter().items()}

    def spelled(token):
        return "".join(letters[byte] for byte in token)

    merges = [
        (ranks[token], ranks[token[:k]], token[:k], token[k:])
        for token in ranks
        for k in range(1, len(token))
        if token[:k] in ranks and token[k:] in ranks
    ]
    pairs = [(spelled(left), spelled(right)) for _, _, left, right in sorted(merges)]
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def _sentencepiece(path):
    from transformers.convert_slow_tokenizer import generate_merges
    from transformers.utils import sentencepiece_model_pb2_new as protocol

    proto = protocol.ModelProto()
    proto.ParseFromString(path.read_bytes())
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    model = models.BPE(
        vocab=vocab,
        merges=generate_merges(vocab, scores),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
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
    control = [piece.piece for piece in proto.pieces if piece.type in (2, 3)]
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
