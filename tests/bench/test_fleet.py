"""What a driver costs, measured with workers that answer at once."""

import json

import pytest

from optimal_sampling.bench import fleet
from optimal_sampling.bench.harness import Report, Spent
from optimal_sampling.bench.subcommands import FleetOptions
from optimal_sampling.errors import ConfigError


def test_the_driver_alone_writes_the_records_that_it_counts(tmp_path, monkeypatch):
    """Guards: a cost per record of records that were never written, or of other lengths."""
    monkeypatch.chdir(tmp_path)
    cost = fleet.driver_cost(40, 16)
    assert (cost.rows, cost.tokens) == (40, 16)
    assert cost.cpu > 0
    assert 0 < cost.before <= cost.after
    assert cost.tokens_per_second == pytest.approx(16_000 / cost.cpu)
    assert not [*tmp_path.iterdir()]


def test_the_answer_of_a_worker_has_the_number_of_its_request():
    """Guards: completions of other requests, from a message that was prepared for none."""
    worker = fleet.InstantWorker(0, 3)
    worker.start()
    [ready] = worker.events()
    assert ready.capacity == 32
    request = fleet.Request("a", 0, 0, (1,), (1,), 3)
    worker.begin(fleet.Run(5, fleet.MixtureConfig(), "mixture", fleet.ToyOptions()))
    worker.submit(5, {7: request, 123: request})
    assert [(each.run, each.number, len(each.token_ids)) for each in worker.events()] == [
        (5, 7, 3),
        (5, 123, 3),
    ]
    assert not worker.has_events


def test_shares_are_of_the_first_fleet():
    """Guards: an ideal that counts workers twice, or not at all."""
    timings = {"2": [Spent(100, 1.0, 2.0)], "4": [Spent(100, 0.625, 2.5)]}
    report = Report()
    fleet._show_speeds(FleetOptions(workers=(2, 4)), timings, report)
    assert [row["of_ideal"] for row in report.results] == [1.0, pytest.approx(0.8)]
    assert report.results[1]["tokens_per_cpu_second"] == pytest.approx(40)
    json.dumps(report.results)


@pytest.mark.slow
def test_two_sizes_of_a_fleet_draw_the_same_work():
    """Guards: a fleet that is timed while it loads, or that is given other prompts."""
    options = FleetOptions(workers=(1, 2), num_prompts=8, repeats=1)
    timings = fleet.speeds(options, Report())
    assert timings.keys() == {"1", "2"}
    assert timings["1"][0].tokens == timings["2"][0].tokens > 0
    assert all(spent.cpu > 0 for [spent] in timings.values())


@pytest.mark.parametrize(
    "options", [{"workers": (0,)}, {"workers": ()}, {"rows": (0,)}, {"record_tokens": 0}]
)
def test_impossible_options_are_refused(options):
    """Guards: a traceback, or an empty table, for a mistyped option."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        FleetOptions(**options)
