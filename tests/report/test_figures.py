"""Figures for papers: the numbers in them are those of the records."""

import struct

import numpy as np
import pytest
from matplotlib import pyplot

from optimal_sampling.cli import main
from optimal_sampling.errors import ConfigError, RunFolderError
from optimal_sampling.records import load
from optimal_sampling.report import figures
from optimal_sampling.report.figures import write_figures

NAMES = ("alpha", "alpha_histogram", "divergences", "lengths")


def draw(folder, *options):
    """A run folder of the toy engine."""
    arguments = ["--engine", "toy", "--num-examples", "12", "--max-new-tokens", "9"]
    assert main(["generate", *arguments, "--output-dir", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [draw(folder / "_$free", "--alpha-min", "0"), draw(folder / "clamped")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were drawn, by name; they are saved too."""
    found = {}
    for name, function in list(figures._FIGURES.items()):

        def keep(read, name=name, function=function):
            found[name] = function(read)
            return found[name]

        monkeypatch.setitem(figures._FIGURES, name, keep)
    return found


def test_every_figure_in_every_form(runs, tmp_path):
    """Guards: a file that is missing or empty, a figure that changes with the day, and figures that
    stay open.
    """
    first = write_figures(runs, tmp_path / "a")
    second = write_figures(runs, tmp_path / "b")
    assert [path.name for path in first] == [
        f"{name}.{kind}" for name in NAMES for kind in ("svg", "pdf", "png")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(tmp_path.glob("a/*")) == sorted(first)
    heads = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    for path in first:
        data = path.read_bytes()
        assert data.startswith(heads[path.suffix[1:]])
        if path.suffix == ".png":
            width, _ = struct.unpack(">II", data[16:24])
            assert width in (round(3.4 * 300), round(6.9 * 300))
    assert pyplot.get_fignums() == []


def test_alpha_is_the_median_of_the_records(runs, tmp_path, drawn):
    """Guards: quantiles of another column, of all positions, or of bins so wide that a bound of
    alpha is drawn beside where it is.
    """
    write_figures(runs, tmp_path, ["svg"])
    lines = drawn["alpha"].axes[0].lines
    assert [line.get_label() for line in lines] == ["\u200b_\\$free", "clamped"]
    for run, line in zip(runs, lines, strict=True):
        lists = [record["token_alpha"] for record in load(run)]
        number = [sum(len(row) > i for row in lists) for i in range(9)]
        for place, count in enumerate(number):
            found = line.get_ydata()[place] if place < len(line.get_ydata()) else np.nan
            if count < min(10, number[0]):
                assert np.isnan(found)
                continue
            row = sorted(row[place] for row in lists if len(row) > place)
            low, high = row[(count - 1) // 2], row[count // 2]
            assert low - 0.002 <= found <= high + 0.002
    assert lines[0].get_ydata()[0] != lines[1].get_ydata()[0]


def test_divergences_are_means_of_the_records(runs, tmp_path, drawn):
    """Guards: the student's panel with the teacher's numbers."""
    write_figures(runs, tmp_path, ["svg"])
    for ax, name in zip(drawn["divergences"].axes, ("student", "teacher"), strict=True):
        assert name in ax.get_title()
        first = [record[f"token_kl_{name}"][0] for record in load(runs[1])]
        assert ax.lines[1].get_ydata()[0] == pytest.approx(np.mean(first), rel=1e-3)


def test_shares_are_of_all_tokens_and_completions(runs, tmp_path, drawn):
    """Guards: counts in place of shares, where runs have different sizes."""
    write_figures(runs, tmp_path, ["svg"])
    for name in ("alpha_histogram", "lengths"):
        for ax in drawn[name].axes:
            for stairs in ax.patches:
                assert stairs.get_data().values.sum() == pytest.approx(100)


def test_one_run_has_bands_and_no_legend_of_one(runs, tmp_path, drawn):
    """Guards: a legend that names the only run in place of the bands."""
    write_figures(runs[1:], tmp_path, ["svg"])
    ax = drawn["alpha"].axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["middle 80%", "middle 50%", "median"]
    assert drawn["lengths"].axes[0].get_legend() is None


def test_a_run_without_token_lists_is_said(tmp_path):
    """Guards: a figure that is left out in silence, and one that is empty."""
    run = draw(tmp_path / "run", "--no-token-lists")
    with pytest.warns(UserWarning, match="no run has the numbers") as said:
        files = write_figures([run], tmp_path / "figures", ["svg"])
    assert len(said) == 3
    assert {path.stem for path in files} == {"lengths"}


def test_the_command_writes_the_page_and_the_figures(runs, tmp_path, capsys):
    """Guards: an option that is parsed and forgotten."""
    page, folder = tmp_path / "page.html", tmp_path / "figures"
    words = ["report", str(runs[0]), "--output", str(page), "--figures", str(folder)]
    assert main(words) == 0
    assert page.exists()
    assert {path.stem for path in folder.iterdir()} == {*NAMES}
    assert str(folder / "alpha.pdf") in capsys.readouterr().out


def test_what_cannot_be_drawn_or_written(runs, tmp_path):
    """Guards: a traceback for a wrong folder."""
    with pytest.raises(ConfigError):
        write_figures([], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError):
        write_figures(runs[1:], tmp_path / "file")
