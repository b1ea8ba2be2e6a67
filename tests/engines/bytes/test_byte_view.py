"""The byte view against the enumeration of all token sequences."""

import numpy as np
import pytest

from optimal_sampling.engines.bytes.byte_view import END
from tests.engines.bytes.tables import LETTERS, STUDENT, TEACHER, TableModel, exact_law, prefixes

PAIRS = [(STUDENT, "S"), (TEACHER, "T")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "name"), PAIRS)
def test_law_and_prefix_equal_the_enumeration(tokens, name, seed):
    """Guards: a tokenisation left out or counted twice, tokens that end at a node counted among
    the longer ones, ids with the same bytes taken as one.
    """
    model = TableModel(tokens, (name, seed))
    texts = model.texts()
    starts = prefixes(texts)
    assert sum(texts.values()) == pytest.approx(1, abs=1e-12)
    assert len(starts) == 364
    for text, p in starts.items():
        view = model.view(text)
        assert np.abs(view.law() - exact_law(texts, starts, text)).max() < 1e-12
        assert abs(view.log_prefix - np.log(p)) < 1e-12
        assert view.lost == 0


@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.05])
@pytest.mark.parametrize(("tokens", "name"), PAIRS)
def test_unseen_share_bounds_the_law(tokens, name, tolerance):
    """Guards: mass given up that is not counted, or counted as less than it is."""
    model = TableModel(tokens, (name, 0))
    texts = model.texts()
    starts = prefixes(texts)
    lost = 0
    for text in starts:
        view = model.view(text, tolerance)
        distance = 0.5 * np.abs(view.law() - exact_law(texts, starts, text)).sum()
        assert distance <= view.unseen_share + 1e-12
        lost += distance > 1e-4
    assert lost > 10  # else the tolerance gave nothing up


@pytest.mark.parametrize("tolerance", [0.003, 0.02, 0.05])
@pytest.mark.parametrize(("tokens", "name"), PAIRS)
def test_lost_bounds_the_law_of_texts(tokens, name, tolerance):
    """Guards: the number in the records, the sum of what was given up, below what it is said to
    bound in the mean: the total variation of the law of whole texts.
    """
    model = TableModel(tokens, (name, 1))
    texts = model.texts()
    found, lost = {}, 0.0

    def walk(text, p):
        nonlocal lost
        view = model.view(text, tolerance)
        law = view.law()
        if law[END] > 0:
            found[text] = p * law[END]
            lost += p * law[END] * view.lost
        for byte in LETTERS:
            if law[byte] > 0:
                walk(text + bytes([byte]), p * law[byte])

    walk(b"", 1.0)
    distance = 0.5 * sum(abs(found.get(text, 0.0) - p) for text, p in texts.items())
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert 1e-5 < distance <= lost


def test_a_text_that_no_hypothesis_writes_takes_up_what_was_given_up():
    """Guards: a view without hypotheses, where the other model led the text to what was given
    up.
    """
    model = TableModel(TEACHER, ("T", 2))
    texts = model.texts()
    starts = prefixes(texts)
    for text in starts:
        view = model.view(text, 0.05)
        assert view.live
        assert view.law().sum() == pytest.approx(1)
        assert set(np.flatnonzero(view.law())) <= set(
            np.flatnonzero(exact_law(texts, starts, text))
        )


def test_small_masses_keep_their_digits():
    """Guards: differences of cumulative sums, which have lost the mass of unlikely tokens."""
    model = TableModel((b"a", b"ba", b"bb", b"c", None), 0, longest=9)
    log_p = np.array([-1e-9, -60.0, -61.0, -62.0, -70.0])
    model.log_p = lambda context: log_p
    view = model.view(b"b")
    law = view.law()
    assert law[ord("a")] / law[ord("b")] == pytest.approx(np.e, rel=1e-12)
    assert view.log_prefix == pytest.approx(-60 + np.log1p(np.exp(-1)), abs=1e-12)
