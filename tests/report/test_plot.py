"""`plot_alpha`: what is drawn is what was sampled."""

import math
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from optimal_sampling import OptimalSamplingOutput, SamplingOutput, plot_alpha
from optimal_sampling.errors import ConfigError, MissingDependencyError

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def output(*rows):
    """As `OptimalSamplingModel.generate` returns it: padded with NaN."""
    length = max(map(len, rows))
    padded = [[*row, *[math.nan] * (length - len(row))] for row in rows]
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    return SamplingOutput(None, ids, torch.tensor(padded), torch.zeros(len(rows), length))


def test_few_completions_are_lines():
    """Guards: padding that is drawn, a line of another completion, labels in another order."""
    axes = plot_alpha(output([0.5, 0.75, 0.625], [1.0]), ["first", "second"])
    assert [line.get_label() for line in axes.lines] == ["first", "second"]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.75, 0.625], [1.0]]
    assert axes.lines[1].get_marker() == "o"  # a line of one point shows nothing
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]
    assert axes.get_ylim()[0] <= 0
    assert axes.get_ylim()[1] >= 1


def test_many_completions_are_quantiles_over_those_that_go_on():
    """Guards: padding counted as alpha, and a median of the whole text in place of a step's."""
    rng = np.random.default_rng(0)
    rows = [rng.uniform(size=5 if i % 2 else 9).tolist() for i in range(20)]
    axes = plot_alpha(output(*rows))
    assert len(axes.lines) == 1
    medians = [np.median([row[i] for row in rows if len(row) > i]) for i in range(9)]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), medians, rtol=1e-5)
    ends = [band.get_paths()[0].vertices for band in axes.collections]
    assert len(ends) == 2
    at_0 = [sorted(v[v[:, 0] == 0][:, 1])[:: len(v)] for v in ends]
    lowest = [np.quantile([row[0] for row in rows], share) for share in (0.1, 0.25)]
    np.testing.assert_allclose([low for (low, *_) in at_0], lowest, rtol=1e-5)
    assert len(plot_alpha(output(*rows), bands=False).lines) == 20


def test_outputs_of_vllm_and_plain_lists():
    """Guards: a figure for one of the two classes alone."""
    stats = {"per_request": [{"alpha": [0.5, 0.6]}, {"alpha": [0.7]}]}
    of_vllm = OptimalSamplingOutput(["a", "b"], [[1, 2], [3]], [2, 1], stats)
    for outputs in (of_vllm, [[0.5, 0.6], [0.7]]):
        axes = plot_alpha(outputs)
        assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.6], [0.7]]


def test_it_draws_where_it_is_told():
    """Guards: a second figure beside the caller's, and settings that stay changed."""
    figure, axes = pyplot.subplots()
    before = dict(mpl.rcParams)
    assert plot_alpha([[0.5, 0.6]], ax=axes) is axes
    assert pyplot.get_fignums() == [figure.number]
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        (OptimalSamplingOutput(["a"], [[1]], [1], None), None, "track_alpha_stats"),
        (output([math.nan]), None, "no alpha"),
        ([], None, "no alpha"),
        ([0.5, 0.6], None, "no alpha"),
        ([[0.5]], ["a", "b"], "2 labels were given for 1"),
    ],
)
def test_what_has_no_alpha_is_refused(outputs, labels, said):
    """Guards: an empty figure, or matplotlib's traceback."""
    with pytest.raises(ConfigError, match=said):
        plot_alpha(outputs, labels)


def test_absent_matplotlib_is_named(monkeypatch):
    """Guards: an ImportError that does not say how to install it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[plot\]'"):
        plot_alpha([[0.5]])
