"""The driver with workers that are simulated: queue, faults, suspects, retirement."""

import time
from itertools import groupby

import pytest

from optimal_sampling.engines.fleet.driver import Driver
from optimal_sampling.engines.fleet.messages import Broken
from optimal_sampling.engines.fleet.supervision import Patience
from optimal_sampling.errors import EngineError, ModelError
from tests.engines.fleet.fakes import RUN, Behaviour, FakeLauncher, FakeWorker, requests


def served(launcher, asked, **patience):
    """Completions by id of all requests, none twice; and the lines that were reported."""
    lines = []
    driver = Driver(launcher, Patience(**patience), lines.append)
    found = {}
    for completion in driver.generate(RUN, asked):
        assert completion.request.id not in found
        found[completion.request.id] = completion
    return found, lines


def test_a_thousand_workers_that_fail():
    """Guards: a request lost or served twice in a crowd of failures; a driver whose turns cost
    more with every worker.
    """
    # one request in 200 meets a death: 150 deaths, and 50 starts that fail
    behaviour = Behaviour(death_rate=0.005, load_failure_rate=0.05)
    launcher = FakeLauncher(1000, behaviour)
    started = time.process_time()
    found, lines = served(launcher, requests(30_000), loads_at_once=1000)
    assert len(found) == 30_000
    assert not any(completion.error for completion in found.values())
    assert len(lines) > 200
    assert time.process_time() - started < 30


@pytest.mark.parametrize("loses_events", [False, True], ids=["process", "machine"])
def test_nobody_is_blamed_for_chance(loses_events):
    """Guards: a request that fails because its worker was killed while it had it."""
    behaviour = Behaviour(death_rate=0.1, loses_events=loses_events)
    found, lines = served(FakeLauncher(3, behaviour), requests(400))
    assert len(found) == 400
    assert len(lines) > 20
    assert not any(completion.error for completion in found.values())


@pytest.mark.parametrize("loses_events", [False, True], ids=["process", "machine"])
@pytest.mark.parametrize("workers", [1, 3])
def test_requests_that_kill_are_found(workers, loses_events):
    """Guards: an innocent request that fails with the guilty one, and a guilty one that takes all
    workers with it, or all machines: those tell nobody what they had begun.
    """
    guilty = frozenset({"prompt 0", "prompt 7", "prompt 8", "prompt 39"})
    launcher = FakeLauncher(workers, Behaviour(kills=guilty, loses_events=loses_events))
    found, _ = served(launcher, requests(40))
    assert len(found) == 40
    assert {name for name, completion in found.items() if completion.error} == guilty
    for name in guilty:
        assert "killed by SIGKILL" in found[name].error
        assert found[name].finish_reason == "error"


def test_a_request_that_hangs_is_found():
    """Guards: a worker that waits for ever."""
    launcher = FakeLauncher(2, Behaviour(hangs=frozenset({"prompt 5"})))
    found, lines = served(launcher, requests(30), timeout=50.0)
    assert [name for name, completion in found.items() if completion.error] == ["prompt 5"]
    assert "no progress for 50 s" in found["prompt 5"].error
    assert any("no progress for 50 s" in line for line in lines)


def test_loading_is_no_hang():
    """Guards: a worker that is killed while it loads, or in its first round."""
    launcher = FakeLauncher(2, Behaviour(load_seconds=500.0))
    found, lines = served(launcher, requests(30), timeout=30.0)
    assert len(found) == 30
    assert lines == []


def test_a_slow_first_round_is_no_hang():
    """Guards: a worker that is killed while it records graphs or compiles kernels."""
    slow = Behaviour(first_round_seconds=200.0, request_seconds=400.0)
    found, lines = served(FakeLauncher(2, slow), requests(20), timeout=30.0)
    assert len(found) == 20
    assert lines == []


class PausedLauncher(FakeLauncher):
    """Its driver is paused for an hour, once, while its workers go on."""

    paused = False

    def wait(self, workers, seconds):
        if self.finished > 20 and not self.paused:
            self.paused = True
            return super().wait(workers, 0.0) or self.sleep()
        return super().wait(workers, seconds)

    def sleep(self):
        self.now += 3600.0
        return []


def test_a_pause_of_the_driver_is_no_slowness_of_its_workers():
    """Guards: workers killed after Ctrl-Z and `fg`, or a timeout that has become 20 hours."""
    launcher = PausedLauncher(3)
    driver = Driver(launcher, Patience())
    found = list(driver.generate(RUN, requests(100)))
    assert launcher.paused
    assert len(found) == 100
    assert driver.longest_gap < 60
    assert not any(member.all_failures for member in driver.members)


def test_rounds_that_stop_are_a_hang():
    """Guards: a worker that never ends, because its completions take long anyway."""
    behaviour = Behaviour(
        first_round_seconds=5.0, request_seconds=400.0, hangs=frozenset({"prompt 18"})
    )
    found, lines = served(FakeLauncher(2, behaviour), requests(20), timeout=30.0)
    assert [name for name, completion in found.items() if completion.error] == ["prompt 18"]
    assert all("no progress for 30 s" in line for line in lines)


def test_few_workers_load_at_once():
    """Guards: eight copies of the weights in the host's memory at the same time."""
    launcher = FakeLauncher(8)
    found, _ = served(launcher, requests(2000), loads_at_once=3)
    assert len(found) == 2000
    assert launcher.most_loading == 3


def test_the_timeout_follows_what_requests_take():
    """Guards: slow models taken for hanging ones where no timeout was given."""
    launcher = FakeLauncher(2, Behaviour(capacity=1, request_seconds=1000.0))
    found, lines = served(launcher, requests(10), first_round=4000.0)
    assert len(found) == 10
    assert lines == []


def test_workers_hold_what_they_run_and_one_refill():
    """Guards: a dataset that is read into memory."""
    launcher = FakeLauncher(4, Behaviour())
    pulled = 0

    def source():
        nonlocal pulled
        for request in requests(1000):
            pulled += 1
            assert pulled - launcher.finished <= 4 * (8 + 2) + 1
            yield request

    found, _ = served(launcher, source())
    assert len(found) == 1000
    assert launcher.most_held == 10


def test_a_worker_that_cannot_load_is_given_up():
    """Guards: a run that waits for a worker which never comes."""
    behaviour = Behaviour(never_loads={1: Broken("it raised RuntimeError: no")})
    launcher = FakeLauncher(2, behaviour)
    lines = []
    driver = Driver(launcher, Patience(), lines.append)
    assert len(list(driver.generate(RUN, requests(3000)))) == 3000
    assert driver.members[1].worker.starts == Patience().failures
    assert "worker 1 (nowhere) is given up after 5 failures in a row" in lines[-1]
    assert [line.rpartition(" in ")[2] for line in lines[:-1]] == ["1 s", "2 s", "4 s", "8 s"]


def test_where_no_worker_is_left_the_run_says_why():
    """Guards: an endless wait, and an error without its cause."""
    broken = Broken("it raised RuntimeError: out of memory")
    launcher = FakeLauncher(2, Behaviour(never_loads={0: broken, 1: broken}))
    with pytest.raises(EngineError, match=r"no worker is left:\n  worker 1.*out of memory"):
        served(launcher, requests(3))


def test_an_error_that_only_the_user_can_help_is_not_tried_again():
    """Guards: five loads of a model that is not there, and exit code 1 for a wrong path."""
    broken = Broken("there is no model 'missing'", "ModelError")
    launcher = FakeLauncher(2, Behaviour(never_loads={0: broken, 1: broken}))
    driver = Driver(launcher)
    with pytest.raises(ModelError, match=r"^there is no model 'missing'$"):
        driver.open()
    assert [each.worker.starts for each in driver.members] == [1, 1]


def test_a_machine_that_kills_everything_is_not_the_requests_fault():
    """Guards: a broken machine on which every request of the dataset is recorded as failed."""
    launcher = FakeLauncher(1, Behaviour(kills=frozenset(r.id for r in requests(50))))
    failed = []
    with pytest.raises(EngineError, match=r"5 requests in a row each ended|no worker is left"):
        failed.extend(Driver(launcher).generate(RUN, requests(50)))
    assert len(failed) <= 5


def test_a_slow_worker_holds_up_nobody():
    """Guards: the same share for a worker that is ten times slower, and a long end."""
    launcher = FakeLauncher(4, Behaviour(load_seconds=0.0, slowness={0: 10.0}))
    found, _ = served(launcher, requests(2000), loads_at_once=4)
    assert len(found) == 2000
    ideal = 2000 * 10.0 / (8 * 3.1)  # of the slow one a tenth
    longest = 200.0
    assert launcher.now < ideal + longest


class ChangingCluster(FakeLauncher):
    """Of two machines. It counts a third for 60 s, which is lost, and from 300 s on, when it joins.

    A worker of the third machine waits for its place while there is none.
    """

    def __init__(self):
        super().__init__(2, Behaviour(load_seconds=1.0))
        self.joined = 300.0
        self.made = []

    @property
    def size(self):
        return 2 + (self.now < 60.0 or self.now > self.joined)

    @size.setter
    def size(self, number):
        pass

    def worker(self, index):
        kind = FakeWorker if index < 2 or self.now > self.joined else HomelessWorker
        self.made.append(kind(index, self))
        return self.made[-1]


class HomelessWorker(FakeWorker):
    """Its machine is lost, and it waits for a place until it is stopped."""

    is_waiting = True

    def start(self):
        self.starts += 1
        self.is_alive = True


def test_a_lost_machine_that_is_still_counted():
    """Guards: a worker that waits to the end for a machine which was counted after its loss, and
    none for the machine that comes.
    """
    launcher, rows = ChangingCluster(), []
    driver = Driver(launcher, Patience(loads_at_once=3))
    driver.on_tick = lambda: rows.append([row.name for row in driver.status()])
    assert len(list(driver.generate(RUN, requests(1500)))) == 1500
    three = ["worker 0", "worker 1", "worker 2"]
    assert [names for names, _ in groupby(rows)] == [three, three[:2], three]
    _, _, homeless, joined = launcher.made
    assert homeless.starts == 1
    assert not homeless.is_alive
    assert driver.members[2].worker is joined
    assert driver.members[2].tokens > 0


def test_few_requests_are_spread():
    """Guards: one worker that has everything beside others that have nothing."""
    launcher = FakeLauncher(4, Behaviour(load_seconds=1.0))
    driver = Driver(launcher, Patience(loads_at_once=4))
    driver.open(ready=4)
    stream = driver.generate(RUN, requests(8))
    next(stream)
    assert sorted(len(each.held) for each in driver.members) == [1, 2, 2, 2]


def test_a_view_that_is_closed_leaves_nothing_behind():
    """Guards: completions of a call that was given up, in the next one."""
    launcher = FakeLauncher(2, Behaviour(death_rate=0.05))
    driver = Driver(launcher)
    stream = driver.generate(RUN, requests(100))
    for _ in range(20):
        next(stream)
    stream.close()
    assert driver.members[0].held == {}
    run = type(RUN)(2, RUN.mixture, RUN.mode, RUN.options)
    again = [each.request.id for each in driver.generate(run, requests(50))]
    assert sorted(again) == sorted(each.id for each in requests(50))
