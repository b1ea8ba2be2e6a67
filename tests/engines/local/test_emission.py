"""Which tokens of a round go into the texts, against the same rule written out token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.engines.local.emission import Drawing, Emission

STOP = 0


def one_row(tokens, drafts, bad, left):
    """(tokens of the text, why it ended or None) of one row."""
    text = []
    for place, token in enumerate(tokens):
        if bad[place]:
            return text, "error"
        text.append(token)
        if token == STOP:
            return text, "stop"
        if len(text) >= left:
            return text, "length"
        if place < len(drafts) and token != drafts[place]:
            break
    return text, None


@st.composite
def rounds(draw):
    """Tokens, drafts, bad logits, tokens left and readiness of some rows."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def array(values, columns):
        made = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
        return np.array(made).reshape(rows, columns)

    tokens = array(st.integers(0, 3), width)
    drafts = np.where(array(st.booleans(), width), tokens, array(st.integers(0, 3), width))
    bad = array(st.sampled_from([False] * 7 + [True]), width)
    left, ready = array(st.integers(1, 5), 1)[:, 0], array(st.booleans(), 1)[:, 0]
    return Drawing(tokens, drafts[:, :-1], bad, tokens == STOP, left), ready.tolist()


@given(rounds())
def test_rows_get_the_tokens_that_a_loop_would_give_them(made):
    """Guards: a token after a rejection, an end or bad logits; an end that takes the wrong name."""
    drawing, ready = made
    emission = Emission.of(drawing, ready)
    for row, count in enumerate(emission.counts.tolist()):
        text, reason = one_row(
            drawing.tokens[row].tolist(),
            drawing.drafts[row].tolist(),
            drawing.bad[row],
            drawing.left[row],
        )
        assert count == (len(text) if ready[row] else 0)
        assert emission.ended.get(row) == (reason if ready[row] else None)
