"""Bytes of tokens: of small tokenizers made here, and of real ones over real texts."""

import json
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from optimal_sampling.errors import TokenizerMismatchError
from optimal_sampling.vocabulary import Vocabulary
from optimal_sampling.vocabulary.token_bytes import continued_ids, token_bytes
from tests.vocabulary.conftest import END, make_tokenizer, tokens, trained
from tests.vocabulary.real_tokenizers import FOLDER, NAMES, SHARED, real_tokenizer

TEXTS = [
    "",
    "Hello",
    " leading",
    "  two leading\n\n",
    "a\r\nb\r\n\r\n",
    "a  b   c     d\t\te",
    "1 12 123 1234 12345 123456 1234567",
    "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "<|im_end|> and </s> <|endoftext|> <unk> <0x0A>",
    "it's don't they'LL",
]


def table_of(tokenizer, **kept):
    return token_bytes(tokenizer, {tokenizer.eos_token_id}, **kept)


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_text_that_goes_on_write_that_text(kind, text):
    """Guards: the space that SentencePiece puts before a text, byte pieces written as text, a
    control token made of text that spells it.
    """
    tokenizer = trained(kind)
    table = table_of(tokenizer)
    ids = continued_ids(tokenizer, table, text)
    assert ids is not None
    assert table.join(ids) == text.encode()
    assert tokenizer.eos_token_id not in ids


def test_which_ids_write_nothing():
    """Guards: a control token, or a row of logits without a token, that could be drawn as text;
    an added word that could not.
    """
    markers = ("<|x|>", AddedToken("<think>", special=True), AddedToken("word", special=False), END)
    tokenizer = make_tokenizer(markers)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<|x|>", "<think>", "word")}
    table = table_of(tokenizer)
    assert table.of_id[tokenizer.eos_token_id] is None
    assert [table.of_id[ids[text]] for text in ids] == [None, None, b"word"]
    assert table_of(tokenizer, kept={"<think>"}).of_id[ids["<think>"]] == b"<think>"
    assert table.end_ids == {tokenizer.eos_token_id}
    assert sorted(table.of_id[:256]) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("kind", ["word pieces", "unigram, always"])
def test_tokenizers_without_bytes_are_refused(kind):
    """Guards: text that is not what the model wrote: lower case, unknown characters left out."""
    with pytest.raises(TokenizerMismatchError, match="another tokenizer"):
        table_of(trained(kind))


def test_a_normaliser_that_changes_a_text_is_noticed():
    """Guards: ids of another text taken for those of this one."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    table = table_of(tokenizer)
    text = unicodedata.normalize("NFD", "caf\u00e9")
    assert continued_ids(tokenizer, table, text) is None
    assert continued_ids(tokenizer, table, unicodedata.normalize("NFC", text)) is not None


@pytest.mark.skipif(not FOLDER.exists(), reason="no ../shared/data/tokenizers beside the checkout")
@pytest.mark.parametrize("name", NAMES)
def test_real_tokenizers_over_real_texts(name):
    """Guards: what small tokenizers do not have: merges over spaces, 751 pieces without bytes."""
    tokenizer = real_tokenizer(name)
    table = table_of(tokenizer)
    texts = TEXTS + (SHARED / "multilingual.txt").read_text().splitlines()
    for file in ("gsm8k_train.jsonl", "math500.jsonl"):
        lines = (SHARED / file).read_text().splitlines()[:100]
        texts += [json.loads(line)["solution"] for line in lines]
    for text in texts:
        ids = continued_ids(tokenizer, table, text)
        assert ids is not None, text
        assert table.join(ids) == text.encode()
    assert all(bytes([byte]) in set(table.of_id) for byte in range(256))


def test_a_pair_with_two_tokenizers_has_the_students_ids_and_both_tables():
    """Guards: the teacher's ids in completions, a teacher's end among the student's, ids beyond the
    rows of logits.
    """
    student, teacher = make_tokenizer(), make_tokenizer(merges=[("a", "b")], extra_words=["ab"])
    rows = len(student) - 1
    pair = Vocabulary.of_bytes(
        tokens(student, "student", rows=rows), tokens(teacher, "teacher"), "they differ: id 5"
    )
    assert pair.granularity == "byte"
    assert (pair.size, pair.stop_ids) == (rows, {student.eos_token_id})
    assert pair.bytes_by_role["teacher"].of_id[256] == b"ab"
    assert pair.bytes_by_role["teacher"].end_ids == {teacher.eos_token_id}
    assert pair.logit_rows == len(teacher)
    assert pair.notes[0].startswith("they differ; they are mixed byte by byte")


def test_ids_that_a_prompt_may_have():
    """Guards: the teacher's prompt checked against the size of the student's vocabulary, where its
    config names none.
    """
    student, teacher = make_tokenizer(), make_tokenizer(merges=[("a", "b")], extra_words=["ab"])
    pair = Vocabulary.of_bytes(tokens(student, "student"), tokens(teacher, "teacher"))
    assert [pair.rows_of(role) for role in ("student", "teacher")] == [len(student), len(teacher)]
    padded = Vocabulary.of_bytes(tokens(student, "student"), tokens(teacher, "teacher", rows=999))
    assert padded.rows_of("teacher") == 999


def test_a_model_without_an_end_is_refused():
    """Guards: texts that never end."""
    with pytest.raises(TokenizerMismatchError, match=r"names a token that ends its texts"):
        Vocabulary.of_bytes(tokens(), tokens(end_ids=frozenset()))
