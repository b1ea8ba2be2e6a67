"""Workers that are Ray actors, on two machines that are processes of this one."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optimal_sampling.config import FleetConfig, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines.fleet import FleetEngine, open_fleet
from optimal_sampling.engines.fleet.driver import Driver
from optimal_sampling.engines.fleet.messages import Setup
from optimal_sampling.engines.fleet.ray_cluster import Cluster
from optimal_sampling.engines.fleet.ray_worker import Need, RayLauncher, _check_precision
from optimal_sampling.engines.fleet.supervision import Patience
from optimal_sampling.engines.toy import ToyEngine
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.generate.fingerprint import model_facts
from optimal_sampling.types import Request
from optimal_sampling.version import __version__
from tests.engines.conformance import EngineConformance, Harness
from tests.engines.fleet.conftest import ROOT
from tests.engines.fleet.engines import CONTEXT, SmallTablesOptions

pytest.importorskip("ray", reason="needs the extra ray")
# ray leaves sockets and processes to the end of the interpreter
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ONE_CPU = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}


def patient(start):
    """Start a machine; a second time where Ray gives up, which it does after 30 s."""
    try:
        return start()
    except Exception as error:
        if "timed out" not in str(error):
            raise
    return start()


@pytest.fixture(scope="module")
def machines():
    """A Ray cluster of one machine with one CPU, to which others can be added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.syspath_prepend(str(ROOT))  # the workers import the small engines from here
        from ray._common.utils import get_ray_address_file
        from ray.cluster_utils import Cluster as Machines

        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets must be short
        known = Path(get_ray_address_file(None))  # written, but its folder is not made
        known.parent.mkdir(exist_ok=True)
        head = {**ONE_CPU, "include_dashboard": False, "temp_dir": folder}
        made = patient(lambda: Machines(initialize_head=True, head_node_args=head))
        connection = Cluster(made.address)
        yield made
        connection.close()
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        known.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def open_on(machines, vocabulary, tmp_path_factory):
    """(workers) -> a fleet of toy engines on the machines, as a context."""

    @contextlib.contextmanager
    def open_it(workers=None, report=lambda line: None):
        with open_fleet(
            SmallTablesOptions(),
            ModelConfig(device="cpu"),
            MixtureConfig(),
            vocabulary,
            fleet=FleetConfig(workers=workers, ray=machines.address),
            logs=tmp_path_factory.mktemp("logs"),
            report=report,
        ) as fleet:
            yield fleet

    return open_it


@pytest.fixture
def second(machines):
    """A second machine, for the time of a test."""
    node = patient(lambda: machines.add_node(**ONE_CPU))
    yield node
    if node in machines.worker_nodes:
        machines.remove_node(node)


def plain_tokens(requests):
    """What one engine in this process draws for the same requests, by key."""
    engine = ToyEngine.random(MixtureConfig(), context_length=CONTEXT)
    return {done.request.key: done.token_ids for done in engine.generate(requests)}


def endless(asked, until):
    """Requests, noted in a list, until a condition holds."""
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline
        request = Request(f"prompt {len(asked)}", 0, 0, (1, 2), (3,), 50)
        asked.append(request)
        yield request


class TestFleetOfRayActors(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, machines, open_on):
        node = patient(lambda: machines.add_node(**ONE_CPU))
        tables = ToyEngine.random(MixtureConfig(), context_length=CONTEXT).tables
        with open_on(workers=2) as fleet:
            fleet.driver.open(ready=2)
            yield Harness(
                open=lambda mixture, batch_size: fleet.view(mixture),
                logits=lambda role, ids: tables[role][ids[-1]].double().numpy(),
                prompts=[([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])],
                context_length=CONTEXT,
                samples=500,
            )
        machines.remove_node(node)


def test_machines_that_are_lost_and_that_join(machines, second, open_on):
    """Guards: requests lost with a machine or made twice, and a new machine that nobody uses."""
    asked, done, said = [], [], []
    with open_on(report=said.append) as fleet:
        members = fleet.driver.members
        assert len(members) == 2

        def state(member):
            return member.state == "ready" and member.tokens > 0

        stages = iter(
            [
                lambda: all(map(state, members)),
                lambda: any("was lost" in line for line in said),
                lambda: len(members) == 3 and all(map(state, members)),
            ]
        )
        for action in (
            lambda: machines.remove_node(second, allow_graceful=False),
            lambda: [patient(lambda: machines.add_node(**ONE_CPU)) for _ in range(2)],
            lambda: None,
        ):
            start = len(asked)
            done += fleet.generate(endless(asked, next(stages)))
            assert len(asked) > start
            for member in members:
                member.tokens = 0
            action()
    assert sorted(each.request.key for each in done) == sorted(each.key for each in asked)
    assert {each.request.key: each.token_ids for each in done} == plain_tokens(asked)
    for node in [*machines.worker_nodes]:
        machines.remove_node(node)


@pytest.fixture
def launch(machines, tmp_path):
    """(need, and changes of the setup) -> an engine whose driver has been opened."""
    opened = []

    def launch_it(need, place_seconds=60.0, report=lambda line: None, **setup):
        made = Setup(
            ModelConfig(device="cpu"), MixtureConfig(), SmallTablesOptions(), "mixture", __version__
        )
        cluster = Cluster(machines.address)
        made = replace(made, **setup)
        launcher = RayLauncher(cluster, need, made, tmp_path, 1, report, place_seconds)
        driver = Driver(launcher, Patience(failures=2, backoff=0.1), report)
        opened.append(driver)
        driver.open()
        return FleetEngine(driver, made)

    yield launch_it
    for driver in opened:
        driver.close()


def test_too_few_gpus(launch):
    """Guards: a run that waits for ever, and does not say for what."""
    said = []
    with pytest.raises(ConfigError, match="had 4 GPUs and 1 CPU for a worker within 2 s"):
        launch(Need(1.0, 4.0), place_seconds=2.0, report=said.append)
    assert said[0].startswith("waits for 4 GPUs and 1 CPU on one machine, for at most 2 s")
    assert re.search(r"the cluster has 0 GPUs, 0 of them free and 1 CPUs", said[0])


class HeadlessCluster:
    """A cluster of four CPUs whose head answers now and then; without it, its calls wait."""

    ray = SimpleNamespace(remote=lambda **options: lambda actor: actor)

    def __init__(self, answers):
        self.answers = iter(answers)

    def head_answers(self):
        self.has_head = next(self.answers)
        return self.has_head

    def nodes(self):
        assert self.has_head
        return [{"CPU": 4.0}]


def test_the_head_of_the_cluster_is_lost(tmp_path, machines):
    """Guards: a driver that waits for the head in the middle of its work, and a command that Ray
    ends without a word about what is safe.
    """
    assert Cluster(machines.address).head_answers()
    said, sizes, now = [], [], iter(range(0, 100, 2))
    setup = Setup(ModelConfig(), MixtureConfig(), SmallTablesOptions(), "mixture", __version__)
    cluster = HeadlessCluster([True, False, False, True])
    launcher = RayLauncher(cluster, Need(1.0, 0.0), setup, tmp_path, report=said.append)
    launcher.clock = lambda: next(now)
    for _ in range(4):
        launcher.wait([], 0.0)
        sizes.append(launcher.size)
    assert sizes == [4, 4, 4, 4]
    assert [line.split(". ")[0] for line in said] == [
        "the head of the Ray cluster does not answer",
        "the head of the Ray cluster answers again",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is a machine without a GPU")
def test_workers_with_gpus_of_a_driver_without(tmp_path):
    """Guards: records of bfloat16 that say float32, because the driver has no GPU."""
    setup = Setup(ModelConfig(), MixtureConfig(), LocalOptions(), "mixture", __version__)
    with pytest.raises(ConfigError, match=r"no GPU and the workers have GPUs.*--device cuda"):
        _check_precision(Need(1.0, 1.0), setup)
    _check_precision(Need(1.0, 0.0), setup)
    for models in (ModelConfig(device="cuda"), ModelConfig(dtype="bfloat16")):
        _check_precision(Need(1.0, 1.0), replace(setup, models=models))
    with pytest.raises(ConfigError, match="finds no CUDA GPU here"):
        model_facts(ModelConfig(device="cuda"))
    assert model_facts(ModelConfig(device="cuda"), elsewhere=True)["precision"] == "bfloat16"


def test_another_version_on_a_machine(launch):
    """Guards: workers of another version, whose records nobody can tell apart."""
    with pytest.raises(ConfigError, match=f"{__version__}.*its driver 0.0.0: install the same"):
        launch(Need(1.0, 0.0), version="0.0.0")


def test_a_model_that_a_machine_does_not_have(launch, tmp_path):
    """Guards: five attempts, and an error or a log that stays on a machine where nobody looks."""
    said = []
    models = ModelConfig(student="/nowhere/student", teacher="/nowhere/teacher", device="cpu")
    with pytest.raises(ModelError, match=rf"/nowhere/.*\(on CPU of {socket.gethostname()}\)"):
        launch(Need(1.0, 0.0), report=said.append, models=models, options=LocalOptions())
    assert "after 1 failures" in said[0]
    assert "Traceback" in (tmp_path / "worker-0.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_lost_at_a_random_moment(machines, open_on, seed):
    """Five runs: 0 lost, 0 repeated, equal to one engine."""
    rng = random.Random(seed)
    node = patient(lambda: machines.add_node(**ONE_CPU))
    requests = [Request(f"prompt {i}", 0, seed, (1, 2), (3,), 50) for i in range(600)]
    lost_at, done = rng.randrange(1, 500), []
    with open_on(workers=2) as fleet:
        fleet.driver.open(ready=2)
        for completion in fleet.generate(requests):
            done.append(completion)
            if len(done) == lost_at:
                machines.remove_node(node, allow_graceful=False)
        assert any(member.last_failure for member in fleet.driver.members)
    assert sorted(each.request.key for each in done) == sorted(each.key for each in requests)
    assert {each.request.key: each.token_ids for each in done} == plain_tokens(requests)
