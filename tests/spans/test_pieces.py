"""Texts of tokens: with a byte-level tokenizer, with one that drops spaces, with made-up ones."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from optimal_sampling.errors import ModelError
from optimal_sampling.spans import reader_of, run_reader
from optimal_sampling.spans.pieces import Piece, TokenReader, characters


@pytest.fixture(scope="module")
def reader():
    return reader_of("toy-student")


def ids_of(data: bytes) -> list[int]:
    """The shipped tokenizer's ids below 256 are bytes."""
    return list(data)


def texts(pieces):
    return [piece.text for piece in pieces]


def test_tokens_of_one_character_are_one_piece(reader):
    """Guards: an emoji shown as four replacement characters, and diagnostics moved by three."""
    pieces = reader.split(ids_of("a🙂é!".encode()))
    assert pieces == [Piece("a", 0), Piece("🙂", 1, 4), Piece("é", 5, 2), Piece("!", 7)]


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"ab\xe4\xbd", b"\xe4\xbd \xa0x", b"\x80" * 30, b"\xf0\x9f" * 9 + "é".encode(), b""],
)
def test_bytes_that_are_no_text_lose_no_token(reader, data):
    """Guards: a completion that ends within a character, or never makes one, and a reader that
    waits for it for ever."""
    pieces = reader.split(ids_of(data))
    places = [place for piece in pieces for place in range(piece.start, piece.start + piece.count)]
    assert places == list(range(len(data)))
    assert all(piece.text for piece in pieces)


def test_a_space_at_the_start_stays():
    """Guards: the first word of a text glued to its prompt, with decoders that drop a space."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    reader = TokenReader(lambda ids: tokenizer.decode(ids, skip_special_tokens=False), (0,))
    assert texts(reader.split([1, 0])) == [" b", " a"]
    assert reader.text(1) == " b"


def test_tokens_without_text_are_joined_with_a_neighbour():
    """Guards: a token that nobody can point at, and a piece that has no tokens."""
    words = ["", "x", "", "", "y"]
    reader = TokenReader(lambda ids: "".join(words[i] for i in ids))
    assert reader.split([0, 1, 2, 3, 4]) == [Piece("x", 0, 4), Piece("y", 4)]


def test_a_part_of_a_character_has_a_name_of_its_own(reader):
    """Guards: two different tokens that look the same in a list of the likeliest."""
    assert reader.text(0xF0) != reader.text(0x9F)
    assert reader.text(ord("a")) == "a"


def test_characters_have_their_bytes():
    """Guards: diagnostics of bytes beside the wrong character; a lone surrogate ending the page."""
    assert characters("aé🙂\ud800") == [
        Piece("a", 0),
        Piece("é", 1, 2),
        Piece("🙂", 3, 4),
        Piece("\ud800", 7, 3),
    ]


@pytest.mark.parametrize("name", ["owner/never-downloaded", "not a name", "/nowhere", "a" * 5000])
def test_a_model_that_is_not_here(name):
    """Guards: a download, or a traceback, for a model whose folder has been moved."""
    with pytest.raises(ModelError):
        reader_of(name)


def test_a_damaged_tokenizer(tmp_path):
    """Guards: an error of the Rust library in place of the file's name."""
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        reader_of(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json"):
        reader_of(str(tmp_path))


def test_the_teachers_tokenizer_stands_in():
    """Guards: uncoloured text where the student was trained away and the teacher is still here."""
    found, problem = run_reader({"student": "/gone", "teacher": "toy-teacher"})
    assert found is not None
    assert not problem
    found, problem = run_reader({"student": "/gone", "teacher": "/gone too"})
    assert found is None
    assert "/gone" in problem
    assert run_reader({})[1]
