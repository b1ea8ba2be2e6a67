"""The summary and the three forms of it."""

import io
import json
import re

import pytest
from rich.console import Console
from tests.evaluate.scoring import scores_of

from optimal_sampling.errors import ConfigError
from optimal_sampling.evaluate.statistics import Metric, paired_difference, score
from optimal_sampling.evaluate.tables import (
    Evaluation,
    json_text,
    markdown_text,
    rich_table,
    summarize,
)

BASE = scores_of("RRA-", "AAAT", "RAAA", "AB-T")
BETTER = scores_of("RRRR", "AAAT", "RRAA", "RB-T")
METRICS = [Metric("avg", 4), Metric("pass", 2), Metric("maj", 4)]


def evaluations(**settings):
    return [
        Evaluation("base", "gsm8k", BASE, {"temperature": 1.0}),
        Evaluation("step_100", "gsm8k", BETTER, {"temperature": 1.0} | settings),
    ]


def shown(summary, width=200):
    console = Console(file=io.StringIO(), width=width)
    console.print(rich_table(summary))
    return console.file.getvalue()


def test_the_summary_holds_the_scores_and_differences():
    """Guards: a column that shows another metric's numbers, differences with the wrong sign."""
    base, better = summarize(evaluations(), METRICS)["rows"]
    for metric in METRICS:
        expected = score(BETTER, metric)
        found = better["scores"][str(metric)]
        assert (found["value"], found["low"]) == (expected.value, expected.low)
        difference = paired_difference(BETTER, BASE, metric)
        assert better["differences"][str(metric)]["value"] == difference.value > 0
    assert base["differences"] == {}
    assert (base["questions"], base["samples"], base["skipped"]) == (4, 4, 0)
    assert base["truncated"]["value"] == 2 / 16
    assert base["no_answer"]["value"] == 2 / 16
    assert base["mean_tokens"] == 16.5


def test_all_forms_show_the_same_numbers():
    """Guards: Markdown, JSON and terminal that are made from different data."""
    summary = summarize(evaluations(), METRICS)
    read = json.loads(json_text(summary))
    assert read == summary
    for text in (markdown_text(read), shown(read)):
        assert "18.8% [" in text  # 3 of 16 samples of the base
        assert "+25.0 [" in text  # 7 of 16 samples, minus those
        for row in read["rows"]:
            for estimate in row["scores"].values():
                low, high = 100 * estimate["low"], 100 * estimate["high"]
                assert f"[{low:.1f}, {high:.1f}]" in text


def test_a_markdown_table_has_as_many_cells_in_every_row():
    """Guards: a name with a pipe that shifts the numbers into other columns."""
    rows = [Evaluation("a|b", "my | set", BASE), Evaluation("c\nd", "my | set", BETTER)]
    text = markdown_text(summarize(rows, METRICS))
    lines = [re.sub(r"\\\|", "", line) for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [5] * 7 + [6] * 4


def test_rich_markup_in_a_name_is_text():
    """Guards: `[red]` in a checkpoint's name that is swallowed, or raises."""
    text = shown(summarize([Evaluation("[red]x[/]", "b", BASE)], METRICS))
    assert "[red]x[/]" in text


def test_a_narrow_terminal_loses_no_digit():
    """Guards: numbers that are cut with an ellipsis."""
    assert "…" not in shown(summarize(evaluations(), METRICS), width=60)


def test_unequal_settings_are_named():
    """Guards: a comparison of greedy with sampled answers that looks like one of checkpoints."""
    summary = summarize(evaluations(temperature=0.0, hint="right"), METRICS)
    assert any("different settings: hint, temperature" in note for note in summary["notes"])
    assert summarize(evaluations(), METRICS)["notes"] == []


def test_a_benchmark_without_the_baseline_has_scores_only():
    """Guards: a crash, or differences from another checkpoint than the one named."""
    rows = [*evaluations(), Evaluation("step_100", "aime24", scores_of("RA-T", "SSSS"))]
    summary = summarize(rows, METRICS)
    assert summary["rows"][2]["differences"] == {}
    text = markdown_text(summary)
    assert "aime24: no scores of base" in text
    assert "aime24: 1 questions without a usable reference" in text


def test_several_checkpoints_come_with_a_warning():
    """Guards: the best of many arms reported with the interval of a single comparison."""
    several = [*evaluations(), Evaluation("step_200", "gsm8k", BETTER)]
    assert "best of 2 checkpoints" in markdown_text(summarize(several, METRICS))
    assert "best of" not in markdown_text(summarize(evaluations(), METRICS))


def test_another_baseline_turns_the_difference_round():
    """Guards: `baseline` that is ignored."""
    first = summarize(evaluations(), METRICS)["rows"][1]["differences"]["avg@4"]
    second = summarize(evaluations(), METRICS, "step_100")["rows"][0]["differences"]["avg@4"]
    assert first["value"] == -second["value"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no scores to show"),
        (evaluations() * 2, {}, "twice"),
        (evaluations(), {"baseline": "step-100"}, "did you mean 'step_100'"),
    ],
)
def test_what_makes_no_table_is_refused(rows, options, message):
    """Guards: an empty table, one checkpoint's scores shown as another's."""
    with pytest.raises(ConfigError, match=message):
        summarize(rows, METRICS, **options)
