"""Diagnostics beside the pieces they belong to, colours, and both ways to show them."""

from __future__ import annotations

import math
import re
from html import unescape

import pytest
from rich.console import Console
from tests.report.conftest import Draw, write_run

from optimal_sampling.records import load
from optimal_sampling.spans import (
    TokenReader,
    reader_of,
    rich_text,
    scale_text,
    spanned_text,
    spans_html,
    visible,
)
from optimal_sampling.spans.coloured import METRICS, colour_of

HOSTILE = "<script>alert(1)</script></style>&\"'"


@pytest.fixture(scope="module")
def reader():
    return reader_of("toy-student")


@pytest.fixture
def record(tmp_path):
    def make(*arguments, **draw):
        [found] = load(write_run(tmp_path / "run", [Draw(*arguments, **draw)]))
        return found

    return make


def test_numbers_are_those_of_the_piece(record, reader):
    """Guards: columns that are one token off after an emoji, or one that counts the end token."""
    found = record("a🙂b")
    text = spanned_text(found, reader)
    alpha = found["token_alpha"]
    assert len(alpha) == 7  # a, four bytes, b, the end
    assert text.columns["alpha"] == [alpha[0], pytest.approx(sum(alpha[1:5]) / 4), alpha[5]]
    assert (text.end, text.end_values["alpha"]) == ("<|end|>", alpha[6])


def test_top_tokens_tell_who_led_and_what_is_accepted(record, reader):
    """Guards: a log ratio with the wrong sign, and an acceptance over the places of two lists in
    place of their tokens."""
    text = spanned_text(record("1+1", top=3), reader)
    assert text.columns["log_ratio"] == pytest.approx([math.log(0.9 / 0.3)] * 3, abs=2e-3)
    assert text.columns["acceptance"] == pytest.approx([0.3 + 0.1 + 0.01] * 3, abs=2e-3)


def test_a_token_outside_of_one_list_has_a_bound(record, reader):
    """Guards: no colour at the very tokens that the student would not have drawn."""
    text = spanned_text(record("1+1", top=1), reader)
    assert text.columns["log_ratio"] == pytest.approx([math.log(0.9 / 0.6)] * 3, abs=2e-3)


def test_an_alpha_that_says_nothing_is_left_out(record, reader):
    """Guards: a text all orange, because it was drawn from one model alone."""
    assert "alpha" not in spanned_text(record("1+1", values={"alpha": 1.0}), reader).columns
    assert "alpha" in spanned_text(record("1+1", values={"alpha": 0.5}), reader).columns


def test_bytes_are_shown_where_they_were_kept(record, reader):
    """Guards: sums over the bytes of a token in place of the diagnostics of each."""
    found = record("a🙂") | {
        "byte_alpha": [0.1, 0.2, 0.2, 0.4, 0.4, 0.9],
        "byte_kl_student": [1.0] * 6,
        "byte_kl_teacher": [1.0] * 6,
    }
    text = spanned_text(found, reader)
    assert (text.unit, text.columns["alpha"]) == ("byte", pytest.approx([0.1, 0.3]))


def test_a_text_that_the_tokens_do_not_make_is_shown_as_recorded(record):
    """Guards: words that the model never wrote, after its tokenizer was replaced."""
    other = TokenReader(lambda ids: "x" * len(ids))
    text = spanned_text(record("1+1"), other)
    assert [piece.text for piece in text.pieces] == ["1+1"]
    assert (text.unit, text.columns) == ("none", {})
    assert "another text" in text.note


def test_a_failed_sample_has_no_pieces(record, reader):
    """Guards: an error in place of the error of the sample."""
    failed = record("1") | {"completion": "", "completion_ids": [], "finish_reason": "error"}
    assert spanned_text(failed, reader).pieces == []


def test_alpha_has_no_colour_where_the_models_agree():
    """Guards: a colour that looks like a preference where every alpha gives the same q."""
    differ = {"alpha": 1.0, "kl_student": 0.5, "kl_teacher": 0.0}
    assert colour_of("alpha", differ) is not None
    assert colour_of("alpha", differ | {"kl_student": 1e-4}) is None


def test_the_ends_of_a_scale():
    """Guards: student's and teacher's hues exchanged; a low acceptance without a colour."""
    blue, orange = colour_of("alpha", {"alpha": 0.0}), colour_of("alpha", {"alpha": 1.0})
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    assert colour_of("acceptance", {"acceptance": 1.0}) is None
    assert colour_of("acceptance", {"acceptance": 0.2})[3] > 0.4
    assert colour_of("kl_student", {"kl_student": 99.0})[3] == colour_of("vetoed", {"vetoed": 1})[3]
    assert all(scale_text(name) for name in METRICS)


def test_html_is_text(record, reader):
    """Guards: markup of a completion that a notebook runs."""
    html = spans_html(spanned_text(record(HOSTILE), reader))
    assert "<script" not in html
    assert "</style" not in html
    assert unescape(re.sub(r"<[^>]*>", "", html)) == HOSTILE


def test_html_has_no_mark_of_direction(record, reader):
    """Guards: a completion that turns around what a notebook shows beside it."""
    html = spans_html(spanned_text(record("a\u202eb\x00"), reader))
    assert unescape(re.sub(r"<[^>]*>", "", html)) == "a<202E>b␀"


def test_a_notebook_shows_the_first_records(tmp_path):
    """Guards: an iterator that is used up by being shown, and markup of a record's error."""
    draws = [Draw(HOSTILE), *[Draw(f"{row}", row=row) for row in range(1, 15)]]
    run = write_run(tmp_path / "run", draws)
    records = load(run)
    html = records._repr_html_()
    assert "the first 10 records" in html
    assert ("row 9, sample 0" in html, "row 10, sample 0" in html) == (True, False)
    assert "<script" not in html
    assert "rgba(214,112,22," in html
    assert len(list(records)) == 15
    failed = write_run(tmp_path / "failed", [Draw(error="<b>no</b>")])
    assert "failed: &lt;b&gt;no" in load(failed, failed=True)._repr_html_()
    assert "holds no records" in load(tmp_path)._repr_html_()
    (failed / "config.json").unlink()
    assert "not coloured" in load(failed, failed=True)._repr_html_()


def test_a_terminal_obeys_no_completion(record, reader):
    """Guards: escape sequences of a completion that clear the screen or set the title, and
    direction marks that reorder the line."""
    text = "\x1b]0;owned\x07 \x9b2J \u202eabc\r\n ok"
    console = Console(file=None, force_terminal=True, color_system="truecolor", width=200)
    with console.capture() as said:
        console.print(rich_text(spanned_text(record(text), reader)))
    for character in ("\x1b]", "\x07", "\x9b", "\u202e", "\r"):
        assert character not in said.get()
    assert visible(text) == "␛]0;owned␇ <009B>2J <202E>abc␍\n ok"


def test_colours_reach_the_terminal(record, reader):
    """Guards: a text without any colour, which every other test accepts."""
    text = rich_text(spanned_text(record("1+1"), reader))
    assert text.plain == "1+1"
    grounds = [span.style.bgcolor.triplet for span in text.spans if span.style.bgcolor]
    assert len(grounds) == 2  # alpha is 0.5 at the first token
    assert grounds[1].red > grounds[0].red
