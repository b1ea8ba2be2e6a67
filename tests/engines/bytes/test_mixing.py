"""q* of bytes from two byte views, against the enumeration of all texts."""

from functools import cache

import numpy as np
import pytest
from scipy import stats

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.bytes.byte_view import END, SYMBOLS
from optimal_sampling.engines.bytes.mixing import Place, SymbolMixer
from optimal_sampling.types import TRACE_FIELDS
from tests.engines.bytes.tables import LETTERS, STUDENT, TEACHER, TableModel, exact_law, prefixes

FREE = MixtureConfig(alpha_min=0.0)


def mixed(student, teacher, alpha):
    """q and E_q[log p_teacher - log p_student], on the common support."""
    common = (student > 0) & (teacher > 0)
    s, t = np.log(student[common]), np.log(teacher[common])
    q = np.exp((1 - alpha) * s + alpha * t)
    q /= q.sum()
    law = np.zeros(SYMBOLS)
    law[common] = q
    return law, (q * (t - s)).sum()


def symmetric(student, teacher):
    """q where both KLs are equal, by bisection in float64."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mixed(student, teacher, middle)[1] < 0 else (low, middle)
    return mixed(student, teacher, low)[0]


class Pair:
    """Both table models, their texts, and q* of every text by the chain rule."""

    def __init__(self, seed):
        self.models = TableModel(STUDENT, ("S", seed)), TableModel(TEACHER, ("T", seed))
        self.texts = [model.texts() for model in self.models]
        self.starts = [prefixes(texts) for texts in self.texts]

    def q_of_texts(self, law_of):
        """`law_of`: (prefix) -> q of the next symbol."""
        found = {}

        def walk(text, p):
            q = law_of(text)
            if q[END] > 0:
                found[text] = p * q[END]
            for byte in LETTERS:
                if q[byte] > 0:
                    walk(text + bytes([byte]), p * q[byte])

        walk(b"", 1.0)
        return found

    def exact(self, text):
        pairs = zip(self.texts, self.starts, strict=True)
        return symmetric(*(exact_law(texts, starts, text) for texts, starts in pairs))

    def viewed(self, text):
        return symmetric(*(model.view(text).law() for model in self.models))


@pytest.mark.parametrize("seed", range(2))
def test_texts_have_mass_one_and_equal_divergences(seed):
    """Guards: mass lost between bytes, and a q* whose symmetry holds for bytes and not for texts:
    by the chain rule it has to hold for whole texts.
    """
    pair = Pair(seed)
    q = pair.q_of_texts(pair.viewed)
    expected = pair.q_of_texts(pair.exact)
    assert sum(q.values()) == pytest.approx(1, abs=1e-12)
    assert q.keys() == expected.keys()
    assert max(abs(q[text] - expected[text]) for text in q) < 1e-12
    to_student, to_teacher = (
        sum(p * np.log(p / texts[text]) for text, p in q.items()) for texts in pair.texts
    )
    assert to_student > 0.1
    assert to_student == pytest.approx(to_teacher, abs=1e-12)


def test_samples_follow_q():
    """Guards: noise that depends on the bytes before, a symbol drawn from another row's law. The
    power check: the same samples do not follow the teacher.
    """
    pair, count = Pair(0), 20_000
    law = cache(lambda text: [model.view(text).law() for model in pair.models])
    mixer = SymbolMixer(FREE, "mixture")
    texts = dict.fromkeys(range(count), b"")
    done = {}
    while texts:
        rows = list(texts)
        laws = [np.stack(x) for x in zip(*(law(texts[row]) for row in rows), strict=True)]
        places = [Place(row * 2**32 + 7, len(texts[row]), 0) for row in rows]
        symbols, _ = mixer.draw(laws, places)
        for row, symbol in zip(rows, symbols, strict=True):
            if symbol == END:
                ended = texts.pop(row)
                done[ended] = done.get(ended, 0) + 1
            else:
                texts[row] += bytes([symbol])
    q = pair.q_of_texts(pair.exact)
    assert set(done) <= set(q)
    assert p_value(done, q, count) > 1e-3
    assert p_value(done, {text: pair.texts[1].get(text, 0.0) for text in q}, count) < 1e-6


def p_value(seen, law, count):
    """Of a chi-square test; texts that are expected less than 5 times are counted together."""
    often = [text for text, p in law.items() if p * count >= 5]
    observed = [seen.get(text, 0) for text in often]
    expected = [law[text] * count for text in often]
    observed.append(count - sum(observed))
    expected.append(count - sum(expected))
    return stats.chisquare(observed, expected).pvalue


def test_alpha_is_that_of_the_bisection():
    """Guards: laws handed over in the wrong order, and probabilities taken for their logarithms."""
    pair = Pair(1)
    mixer = SymbolMixer(FREE, "mixture")
    for text in (b"", b"a", b"bc", b"abc", b"caab"):
        laws = [model.view(text).law() for model in pair.models]
        _, [trace] = mixer.draw([law[None] for law in laws], [Place(1, 0, 0)])
        values = dict(zip(TRACE_FIELDS, trace, strict=True))
        q, gap = mixed(*laws, values["alpha"])
        assert abs(gap) < 1e-5
        common = q > 0
        expected = (q[common] * np.log(q[common] / laws[0][common])).sum()
        assert values["kl_student"] == pytest.approx(expected, abs=1e-6)


def test_the_teachers_support_and_the_names_of_the_trace():
    """Guards: a byte outside of the support; divergences to the restricted student under the plain
    names.
    """
    rng = np.random.default_rng(0)
    student = rng.dirichlet(np.ones(SYMBOLS))
    teacher = np.zeros(SYMBOLS)
    teacher[:9] = rng.dirichlet(np.ones(9))
    mixer = SymbolMixer(MixtureConfig(teacher_support_top_k=4, alpha_min=0.0), "mixture")
    places = [Place(key, 0, 0) for key in range(300)]
    symbols, traces = mixer.draw([np.stack([law] * 300) for law in (student, teacher)], places)
    assert max(symbols) < 9
    values = dict(zip(TRACE_FIELDS, traces[0], strict=True))
    inside = np.where(teacher > 0, student, 0)
    q = symmetric(inside / inside.sum(), teacher)
    kept = q > 0
    assert values["kl_student"] == pytest.approx(
        (q[kept] * np.log(q[kept] / student[kept])).sum(), abs=1e-5
    )
    assert values["kl_student_restricted"] == pytest.approx(values["kl_teacher"], abs=1e-5)
    assert values["vetoed"] == pytest.approx(1 - inside.sum(), abs=1e-6)
    assert values["log_p_student"] == pytest.approx(np.log(student[symbols[0]]), abs=1e-5)


def test_supports_that_do_not_meet_give_the_teacher():
    """Guards: a text that ends in an error where the bytes that are left of the student are none of
    the teacher's support.
    """
    laws = np.zeros((2, 2, SYMBOLS))
    laws[0, :, 65] = 1.0
    laws[1, 0, 66] = laws[1, 1, 65] = 1.0
    mixer = SymbolMixer(MixtureConfig(teacher_support_top_k=1), "mixture")
    symbols, traces = mixer.draw(list(laws), [Place(1, 0, 0), Place(2, 0, 0)])
    assert symbols == [66, 65]
    columns = dict(zip(TRACE_FIELDS, zip(*traces, strict=True), strict=True))
    assert columns["fallback"] == (1, 0)
    assert columns["vetoed"] == (1, 0)
    assert columns["kl_teacher"] == (0, 0)
    assert columns["kl_student"] == (np.inf, 0)
