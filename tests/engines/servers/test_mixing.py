"""Tokens drawn from the lists of many places in one call."""

from dataclasses import replace

import numpy as np
import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.mixing import ListMixer, Place
from optimal_sampling.engines.servers.model import TokenList
from optimal_sampling.engines.servers.table_model import token_list
from optimal_sampling.engines.servers.union import ROLES, join

VOCAB, PADDED, PLACES = 90, 97, 24
MIXTURES = {
    "kl_symmetry": MixtureConfig(),
    "hot nucleus": MixtureConfig(temperature=1.4, top_k=7, top_p=0.9),
    "trust region": MixtureConfig(alpha_method="trust_region", force_first_token=True),
    "supports": MixtureConfig(teacher_support_top_p=0.9, teacher_support_min_p=0.01),
    "veto": MixtureConfig(alpha_method="veto", veto_min_p=0.05, temperature=0.8),
    "arithmetic": MixtureConfig(alpha_method="arithmetic"),
}


def rows_of(rng):
    """log p of both models over a vocabulary with padding; some ids impossible."""
    student = rng.choice([1.0, 4.0]) * rng.standard_normal(PADDED)
    teacher = student + rng.choice([0.3, 2.0]) * rng.standard_normal(PADDED)
    teacher[rng.random(PADDED) < 0.1] = -np.inf
    return [row - np.logaddexp.reduce(row) for row in (student, teacher)]


def whole(row):
    known = row[:VOCAB] - np.logaddexp.reduce(row[:VOCAB])
    return replace(token_list(known, VOCAB), is_full=True)


def places(seed):
    """Lists of every length: short, with ids that were asked for, and of all ids."""
    rng = np.random.default_rng(seed)
    found = []
    for place in range(PLACES):
        rows = rows_of(rng)
        if place % 8 == 5:
            found.append([whole(row) for row in rows])
            continue
        k = 6 if place % 8 == 3 else 20
        lists = [token_list(row, k) for row in rows]
        if place % 8 == 2:
            lists = [token_list(row, k, [3, 5, 8]) for row in rows]
        if place % 8 == 6:
            lists[0] = whole(rows[0])
        found.append(lists)
    return found


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("mode", ["mixture", *ROLES])
def test_a_place_has_the_same_bits_whatever_places_are_beside_it(name, mode):
    """Guards: a token, or a bound, that changes with how far a draft went."""
    mixer = ListMixer(MIXTURES[name], mode, VOCAB)
    lists = [[each[ROLES.index(role)] for role in mixer.roles] for each in places(0)]
    asked = [Place(each, 7 + place // 20, place % 20) for place, each in enumerate(lists)]
    together = mixer.draw(asked)
    alone = [mixer.draw([place])[0] for place in asked]
    some = [*mixer.draw(asked[:5]), *mixer.draw(asked[5:])]
    assert repr(together) == repr(alone) == repr(some)  # NaN is not equal to itself
    assert len({each.token for each in together}) > 5


@pytest.mark.parametrize("name", ["kl_symmetry", "hot nucleus"])
def test_drafts_of_many_places_are_those_of_each(name):
    """Guards: noise of another place, and ids that one model has alone."""
    mixer = ListMixer(MIXTURES[name], "mixture", VOCAB)
    lists = [each[0] for each in places(1)]
    asked = [Place([each], 9, 3 + place) for place, each in enumerate(lists)]
    drafted = mixer.draft(asked)
    assert drafted == [mixer.draft([place])[0] for place in asked]
    drawn = ListMixer(MIXTURES[name], "student", VOCAB).draw(asked)
    assert drafted == [each.token for each in drawn]


def test_a_union_has_the_ids_of_both_lists():
    """Guards: an id that is taken for another's, in rows of which one has more ids."""
    lists = [
        [TokenList(np.array([9, 2, 5]), np.log([0.5, 0.2, 0.1]), 3) for _ in range(2)],
        [
            TokenList(np.array([2, 9, 5]), np.log([0.6, 0.2, 0.1]), 3),
            TokenList(np.array([7, 95, 5]), np.log([0.6, 0.3, 0.05]), 3),
        ],
    ]
    union = join(*lists, VOCAB)
    assert union.ids.T.tolist() == [[2, 5, 9, VOCAB], [2, 5, 7, 9]]
    assert union.count.tolist() == [3, 4]
    assert union.present.T.tolist() == [[True, True, True, False], [True] * 4]
    probabilities = np.exp(union.teacher.log_p.T).round(6).tolist()
    assert probabilities == [[0.6, 0.1, 0.2, 0.0], [0.05, 0.05, 0.6, 0.05]]
    assert union.teacher.known.T.tolist() == [[True] * 4, [False, True, True, False]]
    assert union.teacher.listed.T.tolist() == [
        [True, True, True, False],
        [False, True, True, False],
    ]
    assert union.teacher.covered.tolist() == pytest.approx([0.9, 0.65])
    assert not union.is_whole.any()
