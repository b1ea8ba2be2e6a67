"""The bytes that may follow against Python's decoder."""

from optimal_sampling.engines.bytes import utf8
from optimal_sampling.engines.bytes.byte_view import END


def test_every_character_and_nothing_else():
    """Guards: overlong forms, surrogates, code points above 0x10FFFF; a character left out."""
    found = set()

    def walk(state, text):
        symbols = utf8.allowed(state)
        assert symbols[END] == (not state)
        if text and not state:
            found.add(text.decode())
            return
        bytes_ = [byte for byte in range(256) if symbols[byte]]
        # of long characters only the ends of each range
        for byte in bytes_ if len(text) < 1 else {bytes_[0], bytes_[1], bytes_[-1]}:
            walk(utf8.after(state, byte), text + bytes([byte]))

    walk((), b"")
    assert {chr(c) for c in (0, 127, 128, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF)} <= found
    assert {chr(0x10000), chr(0x10FFFF)} <= found
    leads = {c.encode()[0] for c in map(chr, (*range(0xD800), *range(0xE000, 0x110000, 64)))}
    assert leads == {byte for byte in range(256) if utf8.allowed(())[byte]}


def test_whole_characters():
    """Guards: half a character kept, or a whole one cut."""
    text = "a\U0001f642".encode()
    assert [utf8.whole_characters(text[:n]) for n in range(6)] == [b"", *[b"a"] * 4, text]
