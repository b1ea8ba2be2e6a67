"""The bytes that may follow against Python's decoder."""

import pytest

from optimal_sampling.engines.bytes import utf8


def test_every_character_and_nothing_else():
    """Guards: overlong forms, surrogates, code points above 0x10FFFF; a character left out."""
    found = set()

    def walk(state, text):
        if text and state == utf8.BETWEEN:
            found.add(text.decode())
            return
        bytes_ = [byte for byte in range(256) if utf8.after(state, byte) is not None]
        # of long characters only the ends of each range
        for byte in bytes_ if len(text) < 1 else {bytes_[0], bytes_[1], bytes_[-1]}:
            walk(utf8.after(state, byte), text + bytes([byte]))

    walk(utf8.BETWEEN, b"")
    assert {chr(c) for c in (0, 127, 128, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF)} <= found
    assert {chr(0x10000), chr(0x10FFFF)} <= found
    leads = {c.encode()[0] for c in map(chr, (*range(0xD800), *range(0xE000, 0x110000, 64)))}
    assert leads == {byte for byte in range(256) if utf8.after(utf8.BETWEEN, byte) is not None}


@pytest.mark.parametrize("text", ["", "a\u20ac", "\u00e9\u20ac\U0001f642", "a\u00e9b"])
def test_the_state_follows_from_the_last_bytes(text):
    """Guards: a complete character taken for one that goes on, a first byte three bytes back that
    is not seen.
    """
    state = utf8.BETWEEN
    for count, byte in enumerate(text.encode()):
        assert utf8.state_of(text.encode()[:count]) == state
        assert utf8.can_follow(state, text.encode()[count:])
        state = utf8.after(state, byte)
    assert utf8.state_of(text.encode()) == state == utf8.BETWEEN


def test_what_breaks_a_text():
    """Guards: bytes in the middle of a token that are never looked at."""
    within = utf8.state_of("\u20ac".encode()[:1])
    for state, written in (
        (utf8.BETWEEN, b"\x82"),
        (utf8.BETWEEN, b"a\xff"),
        (utf8.BETWEEN, b"\xe2\x82a"),
        (within, b"a"),
        (within, b"\x82\xac\xac"),
    ):
        assert not utf8.can_follow(state, written)
    assert utf8.can_follow(within, b"\x82\xaca\xe2")


def test_whole_characters():
    """Guards: half a character kept, or a whole one cut."""
    text = "a\U0001f642".encode()
    assert [utf8.whole_characters(text[:n]) for n in range(6)] == [b"", *[b"a"] * 4, text]
