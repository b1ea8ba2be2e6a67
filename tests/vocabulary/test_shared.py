"""The ids two models share: padded rows, markers that one of them lacks, end tokens, decoding."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers.normalizers import NFC

from optimal_sampling import toy_pair
from optimal_sampling.errors import MissingDependencyError, ModelError, TokenizerMismatchError
from optimal_sampling.vocabulary import Vocabulary, resolve_model

from .conftest import END, TEXT_END, make_tokenizer, tokens, vocabulary_of

MARKERS = (TEXT_END, "<|im_start|>", END)


def test_padded_rows_of_logits_are_not_a_difference() -> None:
    """Guards: Qwen2.5's 151,936 against 152,064 rows over the same ids refused, or 152,064 taken as
    the size.
    """
    vocabulary = Vocabulary.share(tokens(rows=320), tokens(rows=272))
    assert vocabulary.size == 256 + 5
    assert not vocabulary.notes


def test_added_tokens_that_one_model_lacks_are_cut_and_named() -> None:
    """Guards: Qwen2.5 with Qwen3, which has four markers more, refused or silently drawn from."""
    vocabulary = Vocabulary.share(
        tokens(make_tokenizer(MARKERS), "small"),
        tokens(make_tokenizer((*MARKERS, "<think>", "</think>")), "large"),
    )
    assert vocabulary.size == 256 + 3
    assert vocabulary.notes == (
        "only 'large' knows these added tokens, so they are never drawn: "
        "259 '<think>', 260 '</think>'",
    )


def test_different_added_tokens_at_the_same_ids_are_cut_on_both_sides() -> None:
    """Guards: two fine-tuned models whose own markers share an id, drawn with one meaning and read
    with the other.
    """
    vocabulary = Vocabulary.share(
        tokens(make_tokenizer((*MARKERS, "<a>")), "one"),
        tokens(make_tokenizer((*MARKERS, "<b>")), "two"),
    )
    assert vocabulary.size == 256 + 3
    assert len(vocabulary.notes) == 2


def test_a_longer_vocabulary_of_ordinary_tokens_is_refused() -> None:
    """Guards: a teacher whose words beyond the student's vocabulary would be cut as if they were
    padding.
    """
    longer = make_tokenizer((), extra_words=("ab", "cd"), eos="z")
    with pytest.raises(TokenizerMismatchError, match="id 256: student 'nothing', teacher 'ab'"):
        Vocabulary.share(tokens(make_tokenizer((), eos="z")), tokens(longer))


def test_a_mismatch_names_tokens_of_both_sides() -> None:
    """Guards: 'vocabularies differ', from which nobody learns which models to take."""
    with pytest.raises(TokenizerMismatchError) as caught:
        Vocabulary.share(
            tokens(make_tokenizer((TEXT_END, "<x>", END)), "s"),
            tokens(make_tokenizer((TEXT_END, "<y>", END)), "t"),
        )
    message = str(caught.value)
    assert "id 257: student '<x>', teacher '<y>'" in message
    assert "1 token ids" in message
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_an_end_token_that_is_cut_is_refused() -> None:
    """Guards: the teacher's <|im_end|> cut as a marker the student lacks, so that no completion
    ever ends.
    """
    student = make_tokenizer((TEXT_END,), eos=TEXT_END)
    with pytest.raises(
        TokenizerMismatchError, match=r"teacher 't' ends its texts with '<\|im_end\|>'"
    ):
        Vocabulary.share(
            tokens(student, "s"), tokens(make_tokenizer((TEXT_END, END), eos=END), "t")
        )


def test_second_end_token_that_is_cut_is_noted() -> None:
    """Guards: a minor end token beyond the shared ids given to an engine, or lost in silence."""
    teacher = tokens(make_tokenizer((*MARKERS, "<|eom|>")), end_ids=frozenset({258, 259}))
    vocabulary = Vocabulary.share(tokens(make_tokenizer(MARKERS)), teacher)
    assert vocabulary.stop_ids == {258}
    assert any("left out: ids 259" in note for note in vocabulary.notes)


def test_end_id_outside_its_own_vocabulary_is_told() -> None:
    """Guards: the other model blamed for an end id that no token has."""
    models = [tokens(name="m", end_ids=frozenset({258, 99999}))] * 2
    notes = " ".join(Vocabulary.share(*models).notes)
    assert "that lie outside its own vocabulary are left out: ids 99999" in notes
    assert "other model" not in notes
    alone = tokens(name="m", end_ids=frozenset({99999}))
    with pytest.raises(TokenizerMismatchError, match="id 99999, which lies outside its own"):
        Vocabulary.share(alone, alone)


def test_tokenizer_of_another_model_is_told_by_its_size() -> None:
    """Guards: ids beyond the rows of the model reaching its embedding."""
    with pytest.raises(TokenizerMismatchError, match="only 100 rows of logits"):
        Vocabulary.share(tokens(rows=100), tokens(rows=100))


def test_added_tokens_without_rows_are_cut() -> None:
    """Guards: a padding token added to the tokenizer but not to the model, as many Llama 2 folders
    have it.
    """
    vocabulary = Vocabulary.share(*[tokens(make_tokenizer((*MARKERS, "<pad>")), rows=259)] * 2)
    assert vocabulary.size == 259


@pytest.mark.parametrize("difference", ["merges", "normaliser"])
def test_equal_ids_with_another_way_of_splitting_are_noted(difference: str) -> None:
    """Guards: such a pair refused (its ids are the same) or one model's prompt read by the other's
    tokenizer.
    """
    plain = make_tokenizer(extra_words=("th",))
    other = make_tokenizer(
        extra_words=("th",), merges=[("t", "h")] if difference == "merges" else []
    )
    if difference == "normaliser":
        other.backend_tokenizer.normalizer = NFC()
    assert "split text differently" in vocabulary_of(plain, other).notes[0]


def test_stop_ids_are_the_union_over_every_source(model_folder) -> None:
    """Guards: a Base student's <|endoftext|> or a chat teacher's <|im_end|> lost, so that lengths
    explode.
    """
    student = model_folder(
        "base", {"eos_token_id": 256}, {"eos_token_id": 3}, make_tokenizer(eos=TEXT_END)
    )
    teacher = model_folder(
        "chat",
        {"eos_token_id": [258, 4], "max_position_embeddings": 99},
        {"eos_token_id": [258, 5]},
    )
    vocabulary = Vocabulary.load(student, teacher)
    assert vocabulary.stop_ids == {256, 3, 258, 4, 5}
    assert vocabulary.teacher_context == 99


def test_nested_text_config_is_read(model_folder) -> None:
    """Guards: end tokens and context of multimodal models, which keep them one level deeper."""
    text = {
        "eos_token_id": [7],
        "max_position_embeddings": 77,
        "vocab_size": 300,
        "model_type": "gemma3_text",
    }
    folder = model_folder(
        "nested", {"model_type": "gemma3", "text_config": text, "eos_token_id": 258}
    )
    vocabulary = Vocabulary.load(folder, folder)
    assert {7, 258} <= vocabulary.stop_ids
    assert (vocabulary.student_context, vocabulary.student_rows) == (77, 300)


def test_decode_drops_end_and_special_tokens_but_keeps_thinking() -> None:
    """Guards: `</think>` lost, without which an answer cannot be told from its reasoning."""
    tokenizer = make_tokenizer(
        (
            TEXT_END,
            "<|im_start|>",
            END,
            AddedToken("<think>", special=True),
            AddedToken("</think>", special=True),
        )
    )
    vocabulary = vocabulary_of(tokenizer)
    ids = tokenizer("<think>why , how</think> <|im_start|>so<|im_end|>").input_ids
    assert vocabulary.decode(ids) == "<think>why , how</think> so"


def test_decode_drops_an_ordinary_token_that_ends_the_text() -> None:
    """Guards: an end token that is not called special as the last word of every record."""
    vocabulary = Vocabulary.share(*[tokens(end_ids=frozenset({258, ord(";")}))] * 2)
    assert vocabulary.decode([ord("a"), ord(";"), ord("b"), ord(";")]) == "a;b"


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], ""),
        ([255, 254, 65], "\ufffd\ufffdA"),
        ([0xE4, 0xBD], "\ufffd"),
        ([258], ""),
        ([258, 258], ""),
    ],
)
def test_decode_takes_any_ids(ids: list[int], text: str) -> None:
    """Guards: half a character at the end of a completion that was cut by its length."""
    assert vocabulary_of().decode(ids) == text


def test_pad_id_lies_within_the_shared_ids() -> None:
    """Guards: a padding id beyond the rows that both models have."""
    student, teacher = make_tokenizer(MARKERS), make_tokenizer((*MARKERS, "<pad>"))
    teacher.pad_token = "<pad>"
    vocabulary = vocabulary_of(student, teacher)
    assert vocabulary.pad_id == 258


def test_vocabulary_can_be_pickled() -> None:
    """Guards: workers of a job on several GPUs, which get the vocabulary from their parent."""
    vocabulary = vocabulary_of()
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_toy_names_are_folders_and_hub_ids_stay() -> None:
    """Guards: the built-in names asked for at the hub."""
    assert resolve_model("toy-teacher") == str(toy_pair.path("toy-teacher"))
    assert resolve_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./no-model", "~/no-model", "a/b/c", "no model"]
)
def test_missing_folder_says_where_it_was_looked_for(name: str) -> None:
    """Guards: a mistyped folder taken for a hub id, and half a minute of retries."""
    folder = Path(name).expanduser().absolute()
    with pytest.raises(
        ModelError, match=re.escape(f"no model at {name!r}: looked for the folder {folder}")
    ):
        resolve_model(name)


def test_an_empty_name_is_named() -> None:
    """Guards: the working folder taken for a model."""
    with pytest.raises(ModelError, match="the name of a model is empty"):
        resolve_model(" ")


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    """Guards: a folder of checkpoints given in place of one checkpoint."""
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(str(tmp_path / "file"))


def test_broken_files_of_a_model_are_model_errors(model_folder) -> None:
    """Guards: a traceback out of Transformers where one line about the model is wanted."""
    folder = Path(model_folder("broken", {}))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        Vocabulary.load(str(folder), str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the config"):
        Vocabulary.load(str(folder), str(folder))


def test_code_of_a_model_does_not_run_unasked(model_folder) -> None:
    """Guards: a hub model that brings its own Python loaded without the user's word, or a question
    on a terminal.
    """
    folder = Path(model_folder("coded", {}))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        Vocabulary.load(str(folder), str(folder))


def test_hub_that_cannot_be_reached_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a mistyped hub id or a machine without a network ending in a traceback."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr("optimal_sampling.vocabulary.tokens.hub_problem", lambda: "")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(
        ModelError,
        match=r"couldn't connect to the hub and more lines\. There is no folder .* either",
    ):
        Vocabulary.load("some/model", "some/model")


def test_mistral_tokenizer_loads_without_a_word(
    model_folder, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards: warnings about Mistral's word pattern, and a change of class where mistral_common is
    installed.
    """
    words = [
        f"w{n}" for n in range(100_001)
    ]  # Transformers looks for the pattern in vocabularies of this size only
    folder = model_folder(
        "mistral",
        {"model_type": "mistral", "vocab_size": 110_000},
        None,
        make_tokenizer(extra_words=words),
    )
    vocabulary = Vocabulary.load(folder, folder)
    assert vocabulary.size == 256 + len(words) + 5
    assert not caplog.records


def test_missing_sentencepiece_is_named(model_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the error about tiktoken that Transformers raises where sentencepiece is missing."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    folder = model_folder("spm", {})
    with pytest.raises(MissingDependencyError, match="pip install sentencepiece"):
        Vocabulary.load(folder, folder)
