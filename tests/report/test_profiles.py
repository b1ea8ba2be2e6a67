"""Counts along the position against NumPy on all values at once; which samples are chosen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from optimal_sampling.report.overview import RunOverview
from optimal_sampling.report.profiles import Profiles
from optimal_sampling.report.selection import Selection


def record(alphas, kl=0.5, **more):
    size = len(alphas)
    lists = {"token_kl_student": [kl] * size, "token_kl_teacher": [kl] * size}
    return {"mode": "mixture", "token_alpha": list(alphas), **lists, **more}


def test_quantiles_along_the_position():
    """Guards: bands over the wrong axis, and a bin that is one off."""
    values = np.random.default_rng(0).uniform(0.2, 0.9, (400, 30))
    profiles = Profiles()
    for row in values:
        profiles.add(record(row))
    found = profiles.data()["alpha"]
    assert found["width"] == 1
    assert found["n"] == [400] * 30
    np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-3)
    expected = np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9], axis=0)
    np.testing.assert_allclose(found["quantiles"], expected, atol=1 / 60)
    np.testing.assert_array_equal(found["histogram"], np.histogram(values, 60, (0, 1))[0])


def test_a_long_record_widens_the_intervals():
    """Guards: memory that grows with the longest record, and values counted before that lost."""
    profiles = Profiles()
    profiles.add(record([0.25] * 100))
    profiles.add(record([0.75] * 30_000))
    found = profiles.data()["alpha"]
    assert found["width"] == 256
    assert sum(found["n"]) == 30_100
    assert len(found["n"]) <= 128
    assert found["mean"][1:] == [0.75] * (len(found["n"]) - 1)
    assert found["mean"][0] == pytest.approx((100 * 0.25 + 256 * 0.75) / 356, abs=1e-3)


def test_tokens_without_a_number_are_left_out():
    """Guards: a null counted as 0, or a column of nulls that ends the command."""
    profiles = Profiles()
    profiles.add(record([None, 0.5, None]))
    assert profiles.data()["alpha"]["n"] == [0, 1]
    assert profiles.data()["alpha"]["mean"] == [None, 0.5]
    empty = Profiles()
    empty.add(record([None, None]))
    empty.add({"mode": "mixture", "token_alpha": []})
    empty.add({"mode": "mixture"})
    assert "alpha" not in empty.data()


def test_alpha_where_the_models_differ():
    """Guards: a second chart that is the first one again."""
    profiles = Profiles()
    profiles.add(record([0.9] * 4, kl=0.5))
    profiles.add(record([0.5] * 4, kl=1e-6))
    data = profiles.data()
    assert data["alpha"]["total_mean"] == pytest.approx(0.7)
    assert data["alpha_differ"]["total_mean"] == pytest.approx(0.9)


def test_an_alpha_by_definition_has_no_chart():
    """Guards: a chart of the number 1, for a baseline of one model alone."""
    teacher, veto = Profiles(), Profiles()
    teacher.add(record([1.0] * 3, mode="teacher"))
    veto.add(record([0.0] * 3))
    assert "alpha" not in teacher.data() | veto.data()
    assert "kl_student" in veto.data()


def test_the_choice_depends_on_nothing_but_the_samples():
    """Guards: other samples at the next call, after records were merged or written in another
    order; other rows in two runs of one dataset."""
    records = [
        {"row_index": row, "sample_index": k, "id": f"{row}"} for row in range(50) for k in range(2)
    ]
    chosen = []
    for seed in range(3):
        random.Random(seed).shuffle(records)
        selection = Selection(10)
        for each in records:
            selection.add({**each, "id": f"{seed} {each['id']}"}, None)
        chosen.append([(r["row_index"], r["sample_index"]) for r, _ in selection.samples()])
    assert chosen[0] == chosen[1] == chosen[2] == sorted(chosen[0])
    assert len({row for row, _ in chosen[0]}) > 7  # not the first ones
    assert max(chosen[0])[0] > 30


def test_a_selection_of_all_and_of_none():
    """Guards: a record lost at the edge, or kept although no sample was asked for."""
    for count, expected in ((0, 0), (4, 4), (9, 5)):
        selection = Selection(count)
        for row in range(5):
            selection.add({"row_index": row, "sample_index": 0, "id": "x"}, None)
        assert len(selection.samples()) == expected


def test_the_score_is_a_mean_over_rows():
    """Guards: rows with more samples that count more, ungradable ones as wrong, and an interval
    of the samples as if they were independent."""
    overview = RunOverview()
    verdicts = {0: ["correct"] * 8, 1: ["wrong"] * 2, 2: ["skipped"]}
    for row, each in verdicts.items():
        for verdict in each:
            overview._count_right(row, {"verdict": verdict})
    found = overview._accuracy(has_stages=False)
    assert (found["value"], found["rows"]) == (0.5, 2)
    assert found["low"] < 0.15  # two rows say little
    overview._count_right(1, {"verdict": "correct"})
    assert overview._accuracy(has_stages=True)["value"] == 1.0
