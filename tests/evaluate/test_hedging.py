"""The share of hedging words."""

import pytest

from optimal_sampling.evaluate.hedging import HEDGING_WORDS, hedging_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("1 + 1 = 2", 0),
        ("Wait, maybe it is 7.", 2 / 4),
        ("I am NOT SURE about it", 2 / 6),
        ("Let me double-check that.", 1 / 4),
        ("waiting, mightily and seemsly", 0),
        ("await-wait wait-a", 0),
    ],
)
def test_share(text, share):
    """Guards: numbers that count as words, parts of words, and phrases that count once."""
    assert hedging_share(text) == share


def test_each_word_is_found():
    """Guards: an entry of the list that the pattern never matches."""
    for word in HEDGING_WORDS:
        assert hedging_share(f"so, {word}: it is") > 0
    assert sorted(HEDGING_WORDS) == list(HEDGING_WORDS)
